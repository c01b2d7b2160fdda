"""Aliases: the desired, serving and last good version of each, and the moves between them.

May version 2 replace version 1? First `gates.Gates.check`, then, with a canary, `phases.next_step`.

An alias: `alias` (its facts), `aliases` (all of them: what a request gets, what the registry says),
`reconciler` (moves serving towards desired), `records` (the facts about an alias before a decision),
`lingering` (replaced versions stay loaded for a while).

An operator's moves: `promotions` (promote and roll back, for the server and the command line), `residency`
(load and unload), `preload` (what readiness waits for), `offline` (the same gates without a server),
`preflight` (`gateway check`: one package by itself, and its signature against a version in service).

A rollout: `policy` (which policy applies), `phases` (what comes next), `rollout` (a candidate next to the
version in service), `canary` (which caller gets it), `guards` (is it worse on the same minutes?), `before`
and `afterwards` (is it worse than the version before it was?), `agreement` (does it answer the same?),
`replay` and `shadow` (of what),
`conductor` (carries it out), `verdicts` (what it found, where the registry cannot hold it; what peers found).
"""
