"""A dialect: how a family of routes reads requests and writes answers.

Holds the differences between protocols that share one way to the model. Must not know sockets, models or
paths.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from gateway.http import bodies, multipart, problems
from gateway.http.media import Media

if TYPE_CHECKING:
    from gateway.errors import Problem
    from gateway.http.problems import Header
    from gateway.record import RequestRecord
    from gateway.service import Answer

#: Makes the headers and the body in parts from the request's record, the answer, the request's own wishes,
#: and the most bytes that an answer may have.
Encode: TypeAlias = "Callable[[RequestRecord, Answer, Any, int], Awaitable[tuple[list[Header], list[bytes]]]]"


def declared(headers: Mapping[bytes, bytes]) -> Media:
    """The form that the content type announces."""
    return _form(headers.get(b"content-type", b""))


@lru_cache(maxsize=256)
def _form(content_type: bytes) -> Media:
    if content_type[:19].lower() == b"multipart/form-data":
        return Media("multipart", multipart.boundary(content_type))
    return Media(bodies.media_type(content_type))


@dataclass(frozen=True, slots=True)
class Dialect:
    """One protocol.

    `media`: gives the form of a body from its headers. `document`: writes a problem as a body. `encode`: None
    means `{"predictions": …}`. `bare`: the answer holds only the predictions, and input errors are 400.
    `lenient`: if the setting `enforcement` is not set, inputs are cast as MLflow casts them. `positional`:
    rows without names are read by position, and the answer carries a warning.
    """

    media: Callable[[Mapping[bytes, bytes]], Media] = declared
    document: Callable[[Problem, bytes], bytes] = problems.document
    encode: Encode | None = None
    bare: bool = False
    lenient: bool = False
    positional: bool = False


PREDICT: Final = Dialect()
MLFLOW: Final = Dialect(bare=True, lenient=True)
