"""`multipart/form-data` bodies, as a browser's form and curl send them: one part that is the model's input,
and perhaps `params`.

Strict: what RFC 7578 does not allow is refused, because two readers must not see two bodies. Knows bytes;
what the part holds is for `wholebodies`.
Source: https://www.rfc-editor.org/rfc/rfc7578 and https://www.rfc-editor.org/rfc/rfc2046#section-5.1
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from gateway.errors import Problem

KIND: Final = "multipart/form-data"
#: The name of the part with the model's params, a JSON object.
PARAMS: Final = "params"

_MOST_HEAD: Final = 4096
_BOUNDARY: Final = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]\Z")
_PARAMETER: Final = re.compile(r'\s*;\s*([\w*-]+)\s*=\s*("(?:[^"\\\r\n]|\\.)*"|[^\s;"]+)')
_DISPOSITION: Final = re.compile(r"\s*form-data\s*(?=;|\Z)", re.IGNORECASE)


class Part(NamedTuple):
    """One part. `kind`: its content type in lower case, "" without one; `file`: its file's name or None."""

    name: str
    kind: str
    file: str | None
    content: memoryview


def boundary(header: bytes) -> str:
    """The boundary in a Content-Type header. Raises UNSUPPORTED_MEDIA_TYPE."""
    text = header.decode("latin-1")
    kind = text.partition(";")[0]
    found, end = _parameters(text, len(kind))
    given = found.get("boundary", "")
    if (
        kind.strip().lower() != KIND
        or end != len(text.rstrip())
        or len(found) != 1
        or not _BOUNDARY.match(given)
    ):
        raise Problem(
            "UNSUPPORTED_MEDIA_TYPE",
            f"{KIND} needs a valid boundary and no other parameter",
            hint="let the HTTP client make the header: curl -F file=@picture.png",
        )
    return given


def parts(body: bytes, given: str) -> tuple[Part, Part | None]:
    """The part that is the input, and the part `params`. Raises MALFORMED_BODY."""
    found = [_part(head, content) for head, content in _split(body, f"--{given}".encode("latin-1"))]
    params = [part for part in found if part.name == PARAMS]
    inputs = [part for part in found if part.name != PARAMS]
    if len(inputs) != 1 or len(params) > 1:
        raise Problem(
            "MALFORMED_BODY",
            "the form must have one part with the model's input, and at most one part `params`",
            hint="send one file or text: curl -F file=@picture.png",
        )
    return inputs[0], params[0] if params else None


def _split(body: bytes, delimiter: bytes) -> list[tuple[bytes, memoryview]]:
    """(head, content) of each part, at most three: more are refused at the fourth."""
    view = memoryview(body)
    start = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if start == 1:
        raise _malformed("it has no part")
    found: list[tuple[bytes, memoryview]] = []
    at = start + len(delimiter)
    while body[at : at + 2] != b"--":
        if len(found) > 2:
            raise _malformed("it has too many parts")
        if body[at : at + 2] != b"\r\n":
            raise _malformed("a boundary is not on a line of its own")
        at += 2
        end_of_head = body.find(b"\r\n\r\n", at, at + _MOST_HEAD)
        if end_of_head < 0:
            raise _malformed(f"a part has no head, or one of more than {_MOST_HEAD} bytes")
        end = body.find(b"\r\n" + delimiter, end_of_head + 2)
        if end < 0:
            raise _malformed("it ends too early")
        found.append((body[at:end_of_head], view[min(end_of_head + 4, end) : end]))
        at = end + 2 + len(delimiter)
    if body[at + 2 :].strip(b" \t\r\n"):
        raise _malformed("something follows its end")
    return found


def _part(head: bytes, content: memoryview) -> Part:
    fields: dict[str, str] = {}
    for line in head.split(b"\r\n"):
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        if not colon or name.lower() in fields:
            raise _malformed("the head of a part is not valid")
        fields[name.lower()] = value.strip()
    disposition = fields.get("content-disposition", "")
    match = _DISPOSITION.match(disposition)
    if match is None:
        raise _malformed("a part is not form-data")
    given, end = _parameters(disposition, match.end())
    if end != len(disposition) or "name" not in given:
        raise _malformed("a part has no name, or a head that is not valid")
    if fields.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
        raise _malformed("a part has a transfer encoding: send its bytes as they are")
    kind, _, parameters = fields.get("content-type", "").lower().partition(";")
    charset = parameters.strip().replace('"', "")
    if charset not in ("", "charset=utf-8", "charset=us-ascii"):
        raise _malformed("a part has a content type with parameters other than charset=utf-8")
    return Part(given["name"], kind.strip(), given.get("filename", given.get("filename*")), content)


def _parameters(text: str, at: int) -> tuple[dict[str, str], int]:
    """The parameters of a header from a position on, and where they end. A name twice ends them."""
    found: dict[str, str] = {}
    while (match := _PARAMETER.match(text, at)) and match[1].lower() not in found:
        value = match[2]
        found[match[1].lower()] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value[0] == '"' else value
        at = match.end()
    return found, at


def _malformed(reason: str) -> Problem:
    return Problem("MALFORMED_BODY", f"the form is not valid: {reason}", hint="curl -F file=@picture.png")
