"""The forms of a body: what each costs in memory, which bodies are large, how each is parsed.

The gateway and the process for large bodies share this table. Must not know routes or headers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from gateway.http import bodies, v2_inputs, wholebodies
from gateway.http.bodies import Parsed

#: A body above either limit, in bytes as sent or in memory once parsed, is parsed in another process.
RAW_BYTES: Final = 256 << 10
PARSED_BYTES: Final = 8 << 20

_PARSERS: Final = {**bodies.PARSERS, **wholebodies.PARSERS}
_COSTS: Final = {**bodies.COSTS, **wholebodies.COSTS}


class Media(NamedTuple):
    """The form of a body, and what its parser needs in addition (for `v2` the length of the JSON part)."""

    form: str
    parameter: str = ""


def cost(media: Media) -> Callable[[bytes], int]:
    """The function that computes the memory of such a body once it is parsed, in bytes. It raises Problem."""
    if media.form == "v2":
        return lambda body: v2_inputs.memory(body, media.parameter)
    return _COSTS[media.form]


def is_large(media: Media, body: bytes, becomes: int) -> bool:
    """Whether to parse a body in another process. `becomes`: its bytes in memory. Raw binary data costs
    nothing to read, so only the JSON in front of it counts."""
    if media.form in wholebodies.PARSERS:
        return False  # one value: nothing is parsed
    size = len(body)
    if media.form == "v2" and media.parameter:
        size = int(media.parameter)
        becomes -= 2 * (len(body) - size)
    return size > RAW_BYTES or becomes > PARSED_BYTES


def parse(media: Media, body: bytes) -> Parsed:
    """The body as untyped raw input. Raises Problem."""
    if media.form == "v2":
        return v2_inputs.parse(body, media.parameter)
    return _PARSERS[media.form](body)
