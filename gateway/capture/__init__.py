"""Captured requests: a share of the typed requests and their answers, kept for a while under `state_dir`.

`records`: one request on disk, without its redacted columns. `store`: the file that holds them, with its
limits. `recorder`: takes requests from the event loop, and drops them when it cannot keep up.

Only control access reads them (`gateway capture`, `/captures`); a rollout replays them. Must not know models'
processes, aliases or HTTP.
"""
