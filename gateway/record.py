"""The record of one request. It is created when the request arrives, and filled as facts become known.
Answers, metrics and the access log read it. Must not know a protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway.access.principal import Principal
    from gateway.names import Reference
    from gateway.registries.base import Version
    from gateway.tracing import Work


@dataclass(slots=True)
class RequestRecord:
    """One request.

    `id` is the client's, or a new one. `headers` are by lower-case name, the last one of each. `twice`: the
    name of a header that came with two values, empty if none did. `version` and `alias` are the result of
    resolving the reference, None before that. `principal` is the caller, None while no credential was needed,
    as for a prediction where no credentials are configured. `administers`: it came on the listener for
    control calls. `reference`: the model that it asks, set once the caller may predict with it. `code` is
    `2xx` or the error code of the answer, empty before the answer. `began` is a time of `perf_counter`;
    `parse`, `queue`, `predict` and `encode` are in seconds. `predicts`: the request is for a prediction.
    `rows`: how many it has, 0 before they are counted. `lenient`: strict enforcement would have refused its
    input. `cached`: whether its version was loaded when it came; None if it did not get that far.
    `elsewhere`: the model runs in another environment than its own. `late`: it came when the gateway refused
    new work. Only where traces are exported: `work`, the call of the model that answered it; `span`, its
    span; `status`, the answer's.
    """

    id: bytes = b""
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    twice: str = ""
    principal: Principal | None = None
    administers: bool = False
    began: float = field(default_factory=perf_counter)
    predicts: bool = False
    rows: int = 0
    reference: Reference | None = None
    version: Version | None = None
    alias: str | None = None
    code: str = ""
    parse: float = 0.0
    queue: float = 0.0
    predict: float = 0.0
    encode: float = 0.0
    lenient: bool = False
    cached: bool | None = None
    elsewhere: bool = False
    late: bool = False
    work: Work | None = None
    span: Any = None
    status: int = 0

    @property
    def shown_id(self) -> str:
        """The id as text, for events and messages."""
        return self.id.decode("latin-1")
