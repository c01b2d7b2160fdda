"""Loaded models: their memory and their life cycle. Decides which version may load and which is evicted.
Knows versions; must not know a registry or an alias.

A version's life: `servable` (its phases as a table, top to bottom), `manager` (all servables, leases),
`preparation` (where it runs), `failures` (a version that failed is not loaded again at once).

Memory: `ledger` (who may load, who must go), `eviction` (in which order), `room` (carries that out), `spares`
(processes made in advance), `governor` (stops a model that grows).

Requests: `admission` (who may wait in a model's queue, or gets 429), `batching` (the queue), `recent` (the
last minute).
"""
