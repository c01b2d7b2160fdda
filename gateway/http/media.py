"""The forms that bodies come in: what each costs in memory, which bodies are large, how each is parsed.

One table for the gateway and for the process that parses large bodies. Knows parsers and sizes; nothing of
routes or headers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from gateway.http import bodies, v2_inputs
from gateway.http.bodies import Parsed

#: A body above either of these, in bytes as sent or as it will be in memory, is parsed elsewhere.
RAW_BYTES: Final = 256 << 10
PARSED_BYTES: Final = 8 << 20


class Media(NamedTuple):
    """The form of a body, and what its parser needs besides the bytes (`v2`: the length of the JSON)."""

    form: str
    parameter: str = ""


def cost(media: Media) -> Callable[[bytes], int]:
    """What tells the memory of such a body once it is parsed, in bytes. It raises Problem."""
    if media.form == "v2":
        return lambda body: v2_inputs.memory(body, media.parameter)
    return bodies.COSTS[media.form]


def is_large(media: Media, body: bytes, becomes: int) -> bool:
    """Whether a body that becomes so many bytes should be parsed in another process. Raw binary data costs
    nothing to read: only the JSON in front of it counts."""
    size = len(body)
    if media.form == "v2" and media.parameter:
        size = int(media.parameter)
        becomes -= 2 * (len(body) - size)
    return size > RAW_BYTES or becomes > PARSED_BYTES


def parse(media: Media, body: bytes) -> Parsed:
    """The body as untyped raw input. Raises Problem."""
    if media.form == "v2":
        return v2_inputs.parse(body, media.parameter)
    return bodies.PARSERS[media.form](body)
