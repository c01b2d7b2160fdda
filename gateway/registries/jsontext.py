"""Reads JSON text member by member, with the position of each. So unchanged members need not be read, and a
change can be written in place.

The library's decoder reads the values. Between two values other threads can take the interpreter's lock,
which they cannot while a document of many megabytes is read at once. Must not know registries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")


class Scanner:
    """A position that moves along a text. `decode` gives a value and its end, as
    `json.JSONDecoder.raw_decode` does. Raises json.JSONDecodeError."""

    def __init__(self, text: str, decode: Callable[[str, int], tuple[Any, int]]) -> None:
        self.text = text
        self.at = 0
        self._decode = decode
        self._skip_space()

    def begins(self, character: str) -> bool:
        return self.text.startswith(character, self.at)

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here. After each key the caller must move past its value, with
        `value` or otherwise. Ends after the object."""
        self._take("{", "Expecting value")
        if self.begins("}"):
            self._take("}", "")
            return
        while True:
            if not self.begins('"'):
                raise self._error("Expecting property name enclosed in double quotes")
            yield self._key()
            self._skip_space()
            if self.begins("}"):
                self._take("}", "")
                return
            self._take(",", "Expecting ',' delimiter")

    def value(self) -> Any:
        """The value that begins here; moves to its end."""
        value, self.at = self._decode(self.text, self.at)
        return value

    def end(self) -> None:
        """Raises an error if anything follows."""
        self._skip_space()
        if self.at < len(self.text):
            raise self._error("Extra data")

    def _key(self) -> str:
        key = self.value()
        self._skip_space()
        self._take(":", "Expecting ':' delimiter")
        assert isinstance(key, str)
        return key

    def _take(self, character: str, otherwise: str) -> None:
        if not self.begins(character):
            raise self._error(otherwise)
        self.at += 1
        self._skip_space()

    def _skip_space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def _error(self, what: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(what, self.text, self.at)
