"""Why a message of a peer is refused, and what a refusal of a peer means.

Knows the reasons and the statuses by which gateways tell them to each other; must not know messages.
"""

from __future__ import annotations

from typing import Final, Literal

RefusalKind = Literal["signature", "header", "stale", "replayed", "malformed", "crowd"]

MEANINGS: Final = {
    400: "it cannot read the message: it is of another release",
    401: "it has another key, or is of an older release and its clock differs",
    403: "its clock differs",
    404: "it has no peers, or they have another port there",
    412: "it has heard a later message of this gateway",
    413: "the message is too large for it: it is of another release",
    429: "it knows too many gateways",
}
"""The meaning of the status of a peer's answer."""


class Refused(Exception):
    """A message that is not believed. The text says why, without a secret. `kind`: `signature` (it has none,
    or another key made it), `header` (it cannot be read), `stale` (its time is not the time here), `replayed`
    (a later one was heard), `malformed` (its body is not a message), `crowd` (too many gateways)."""

    def __init__(self, kind: RefusalKind, why: str) -> None:
        super().__init__(why)
        self.kind: Final = kind
