"""The gateway over HTTP. `build.build` makes the ASGI application from `parts`; the other modules are its
parts.

Predictions: `predict` (from the request to the answer), `dialects` (how protocols differ), `media` (forms of
a body), `bodies`, `large`, `wholebodies`, `jsonbody`, `arrow` (reading), `cost` (memory of a body), `answers`
(writing).

Protocols: `invocations` (MLflow, SageMaker), `v2`, `v2_models`, `v2_inputs`, `v2_outputs` (Open Inference),
`lookalikes` (V1 and others).

Control: `control` (its routes), `schemas` (its bodies), `auth` (who may), `feed` (events), `documents`
(OpenAPI and pages).

All requests: `problems` (what each error code looks like), `protocol` and `connections` (before there is a
request), `tracing`, `access_log`.
"""
