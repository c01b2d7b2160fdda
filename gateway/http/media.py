"""The forms of a body: what each costs in memory, which bodies are large, how each is parsed.

The gateway and the process for large bodies share this table. Must not know routes or headers.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from gateway.http import bodies, v2_inputs, wholebodies
from gateway.http.bodies import Parsed

#: A body above either limit, in bytes as sent or in memory once parsed, is parsed in another process.
RAW_BYTES: Final = 256 << 10
PARSED_BYTES: Final = 8 << 20

_PARSERS: Final = {**bodies.PARSERS, **wholebodies.PARSERS}
_COSTS: Final = {**bodies.COSTS, **wholebodies.COSTS}


class Media(NamedTuple):
    """The form of a body, and what its parser needs in addition: for `v2` the length of the JSON part, for
    `multipart` the boundary."""

    form: str
    parameter: str = ""


def weigh(media: Media, body: bytes) -> tuple[int, bool]:
    """The memory that such a body takes once it is parsed, in bytes, and whether to parse it in another
    process. Raw binary data costs nothing to read, so only the JSON in front of it counts. Raises Problem."""
    form, size = media.form, len(body)
    if form == "v2":
        becomes = v2_inputs.memory(body, media.parameter)
        size, raw = (int(media.parameter), len(body) - int(media.parameter)) if media.parameter else (size, 0)
        return becomes, size > RAW_BYTES or becomes - 2 * raw > PARSED_BYTES
    if form == "multipart":
        return wholebodies.cost_of_form(body, media.parameter), False
    becomes = _COSTS[form](body)
    if form == "parquet":
        return becomes, True  # whatever its size: only reading it shows what it becomes
    if form in wholebodies.PARSERS:
        return becomes, False  # one value: nothing is parsed
    return becomes, size > RAW_BYTES or becomes > PARSED_BYTES


def parse(media: Media, body: bytes) -> Parsed:
    """The body as untyped raw input. Raises Problem."""
    if media.form == "v2":
        return v2_inputs.parse(body, media.parameter)
    if media.form == "multipart":
        return wholebodies.parse_form(body, media.parameter)
    return _PARSERS[media.form](body)
