"""Aliases: what the registry wants, what serves, what has proved itself, and the moves between them.

May a version replace another? `gates`: the one set of checks, whether a signature is compatible among them.

An alias: `alias` (its facts), `aliases` (all of them: what a request gets, what the registry says),
`reconciler` (moves serving towards desired), `records` (what is known of an alias before a decision),
`lingering` (replaced versions stay loaded for a moment).

A person's moves: `promotions` (promote and roll back, for the server and the command line), `residency` (load
and unload), `preload` (what readiness waits for), `preflight` and `offline` (the same gates without a
server).

A canary: `policy` (which one holds), `phases` (what comes next), `rollout` (a candidate beside the version in
service), `canary` (which caller gets it), `guards` (is it worse?), `conductor` (carries it out).
"""
