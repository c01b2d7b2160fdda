"""Where models run: in processes of their own, together in packs, or in the gateway's process.

The contract is `base`. `placement` chooses: `process` (1..N processes of one model), `packed` (a place in a
pack), `inline` (this process). Must not know registries, aliases or requests.

A process: `zygote` (forks it), `worker` (calls it), `pool` (the idle ones), `child` (ends it), `pulse` (is it
stuck?), `restarts` (what happens after it died), `suspects` (which inputs killed it), `orphans` (what a
killed zygote leaves), `output` (what it prints), `memory` and `files` (what it takes), `environments` (its
Python).

A process dies: `worker` fails its call, `serving.batching` runs the requests again, `restarts` starts another
process or quarantines the model, and `serving.failures` ends the quarantine.

A pack: `packs` (all of them), `places` (one process and the models in it).

Confinement: `confinement` (what a model process may do), `unconfined` (what this machine cannot enforce). The
gateway's own heap: `heap`.
"""
