"""Edits YAML in place. The rest of the text stays unchanged, including comments and order.

Editing replaces spans of the text. In comparison, ruamel.yaml's round trip is ten times slower (3.2 s for a
thousand models), and moved a comment to another model. Every edit is verified: the new text is parsed and
compared with the wanted content. In a large text only the changed part becomes a tree, because a tree of
5,000 models takes a second. Must not know registries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from gateway.yamltext import InvalidText, Node, data, events, parse

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./@%+-]*\Z")
_NUMBER_OR_WORD = re.compile(r"(?i)(?:[-+0-9._]+(?:e[-+0-9]+)?|0[xo].*|y|n|yes|no|on|off|true|false|null)\Z")
_WHOLE = re.compile(r"[1-9][0-9]*\Z")


def put(where: Any, path: Sequence[str], value: Any) -> Any:
    """Returns a copy of plain data with `value` at `path`; None removes the old value."""
    result = dict(where) if isinstance(where, dict) else {}
    below = result
    for key in path[:-1]:
        below[key] = dict(below[key]) if isinstance(below.get(key), dict) else {}
        below = below[key]
    if value is None:
        below.pop(path[-1], None)
    else:
        below[path[-1]] = value
    return result


def changed(text: str, changes: Sequence[tuple[Sequence[str], Any]]) -> tuple[str, bool]:
    """Returns the text with each (path, value) applied (None removes), and True if the rest of the text is
    unchanged. The text must be valid.

    If no edit gives the wanted content, usually because of anchors, the text is rewritten without its
    comments. Values are dicts, lists and strings; all scalars are read back as text.
    """
    prefix = tuple(changes[0][0][:2])
    if all(len(path) > 2 and tuple(path[:2]) == prefix for path, _ in changes):
        part = _part(text, *prefix)
        if part is not None and (edited := _edited_part(text, part, changes)) is not None:
            return edited, True
    return _changed(text, changes)


def _changed(text: str, changes: Sequence[tuple[Sequence[str], Any]]) -> tuple[str, bool]:
    """Does the same with a tree of the whole text."""
    tree = parse(text)
    wanted = data(tree, typed=False)
    edited: str | None = text
    try:
        for path, value in changes:
            wanted = put(wanted, path, _as_read(value))
            if edited is not None and (edited := _edited(edited, tree, path, value)) is not None:
                tree = parse(edited)
        if edited is not None and data(tree, typed=False) == wanted:
            return edited, True
    except InvalidText:
        pass  # the edit made the text invalid
    return block(wanted), False


@dataclass(frozen=True, slots=True)
class _Part:
    """The lines of one entry of a block mapping, from character `start` to `end`. The line of the mapping's
    key begins at `head`, its first entry at `first`. Lines between entries belong to the previous entry."""

    head: int
    first: int
    start: int
    end: int


class _NotApart(Exception):
    """An entry is not on separate lines, or anchors may refer to other lines."""


class _Walk:
    """The events of a valid text, node by node. Raises _NotApart for anchors."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._events = events(text)

    def next(self) -> Any:
        event = next(self._events)
        if type(event) is yaml.AliasEvent or getattr(event, "anchor", None):
            raise _NotApart
        return event

    def skip(self, event: Any) -> None:
        """Continues to the end of the node that begins with `event`."""
        depth = 0
        while True:
            kind = type(event)
            if kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
                depth += 1
            elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
                depth -= 1
            if not depth:
                return
            event = self.next()

    def line(self, event: Any) -> int:
        """Returns the index where the line of an event begins. The event must be the first on its line."""
        mark = event.start_mark
        start: int = mark.index - mark.column
        if self._text[start : mark.index].strip(" "):
            raise _NotApart
        return start


def _part(text: str, below: str, name: str) -> _Part | None:
    """Returns the lines of the entry `name` in the mapping at the key `below`, or of the last entry if there
    is no such entry. Returns None if an entry cannot be edited separately."""
    walk = _Walk(text)
    try:
        for _ in ("stream", "document"):
            walk.next()
        _check_block(walk.next())
        while (key := walk.next()).value != below:
            walk.skip(walk.next())
        head = walk.line(key)
        _check_block(walk.next())
        first = start = walk.line(key := walk.next())
        while key.value != name:
            walk.skip(walk.next())
            key = walk.next()
            if type(key) is yaml.MappingEndEvent:
                break
            start = walk.line(key)
        else:
            walk.skip(walk.next())
            key = walk.next()
        end = len(text) if not text[key.start_mark.index :].strip() else walk.line(key)
    except (_NotApart, AttributeError):  # a flow collection, an end, or a key that is not a scalar
        return None
    return _Part(head, first, start, end)


def _check_block(event: Any) -> None:
    if type(event) is not yaml.MappingStartEvent or event.flow_style:
        raise _NotApart


def _edited_part(text: str, part: _Part, changes: Sequence[tuple[Sequence[str], Any]]) -> str | None:
    lead = text[part.head : part.first]
    new, kept = _changed(lead + text[part.start : part.end], changes)
    if not kept or not new.startswith(lead) or (part.end < len(text) and not new.endswith("\n")):
        return None
    return text[: part.start] + new[len(lead) :] + text[part.end :]


def _as_read(value: Any) -> Any:
    """Returns the value as `data` reads it back: all scalars are text."""
    if isinstance(value, dict):
        return {str(key): _as_read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_read(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else None if value is None else str(value)


def _edited(text: str, node: Node, path: Sequence[str], value: Any) -> str | None:
    """Returns the text, whose tree is `node`, with one change; None if it contains an unsupported
    construct."""
    if not path[:-1] and value is None:
        return None
    key: Node | None = None
    parent: Node | None = None
    step = 2  # columns of indentation per level, updated from the text
    for depth, name in enumerate(path):
        if node.entries is None:  # a scalar, usually an absent value, instead of a mapping
            return _replaced(text, key, node, parent, _nested(path[depth:], value), step) if value else None
        pair = node.find(name)
        if pair is None:
            entry = _nested(path[depth:], value)
            return text if value is None else _inserted(text, key, node, parent, entry, step)
        if parent is not None and not parent.flow and not node.flow and key is not None:
            step = max(node.column - key.column, 1)
        parent, (key, node) = node, pair
    assert parent is not None
    if value is None:
        return _removed(text, parent, path[-1])
    return _replaced(text, key, node, parent, value, step)


def _replaced(
    text: str, key: Node | None, node: Node, parent: Node | None, value: Any, step: int
) -> str | None:
    if key is None or parent is None:
        return None
    empty = (node.text == "" and node.plain) or node.entries == []
    if empty and not parent.flow and _is_deep(value):
        lines = "".join(f"\n{line}" for line in block(value, key.column + step).splitlines())
        colon = text.index(":", key.end) + 1
        tail = text[max(colon, node.end) :]
        return text[:colon] + (tail[: _line_end(tail, 0)].rstrip() + lines + tail[_line_end(tail, 0) :])
    if node.text == "" and node.plain:
        colon = text.index(":", key.end) + 1
        return f"{text[:colon]} {flow(value)}{text[colon:]}"
    return text[: node.start] + flow(value) + text[node.leaf_end :]


def _inserted(
    text: str, key: Node | None, node: Node, parent: Node | None, entry: Any, step: int
) -> str | None:
    if not node.entries:
        return _replaced(text, key, node, parent, entry, step)
    if node.flow:
        last_key, last = node.entries[-1]
        at = max(last.leaf_end, last_key.end)
        return f"{text[:at]}, {flow(entry)[1:-1]}{text[at:]}"
    at = _line_end(text, max(node.leaf_end, node.start))
    ending = "\r\n" if "\r\n" in text else "\n"
    lines = block(entry, node.column).rstrip("\n").replace("\n", ending)
    return f"{text[:at]}{ending}{lines}{text[at:]}"


def _removed(text: str, node: Node, name: str) -> str | None:
    entries = node.entries or []
    i = next(i for i, pair in enumerate(entries) if pair[0].text == name)
    key, value = entries[i]
    end = max(value.leaf_end, key.end)
    if node.flow:
        if i:
            before_key, before = entries[i - 1]
            return text[: max(before.leaf_end, before_key.end)] + text[end:]
        return text[: key.start] + text[entries[1][0].start if len(entries) > 1 else end :]
    start = text.rfind("\n", 0, key.start) + 1
    if len(entries) == 1:
        colon = text.rindex(":", 0, start) + 1
        return f"{text[:colon]} {{}}{text[colon:start].rstrip()}{text[_line_end(text, end) :]}"
    return text[:start] + text[text.find("\n", end) + 1 or len(text) :]


def _nested(path: Sequence[str], value: Any) -> Any:
    for name in reversed(path):
        value = {name: value}
    return value


def _line_end(text: str, at: int) -> int:
    """Returns the index of the line break (of `\\r\\n`: of its first character) at or after `at`."""
    newline = text.find("\n", at)
    if newline < 0:
        return len(text)
    return newline - 1 if newline > at and text[newline - 1] == "\r" else newline


def _is_deep(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(v, dict) for v in value.values())


def block(value: Any, column: int = 0) -> str:
    """Writes plain data as lines that begin at `column`; a mapping without inner mappings is one line."""
    if not isinstance(value, dict):
        return " " * column + flow(value) + "\n"
    lines = ""
    for key, item in value.items():
        head = f"{' ' * column}{_scalar_text(key)}:"
        lines += f"{head}\n{block(item, column + 2)}" if _is_deep(item) else f"{head} {flow(item)}\n"
    return lines


def flow(value: Any) -> str:
    """Writes plain data as one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar_text(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _scalar_text(str(value))


def _scalar_text(text: str) -> str:
    """Writes a scalar without quotes if every YAML parser reads the same text or whole number, else
    quoted."""
    if _WHOLE.match(text) or (_PLAIN.match(text) and not _NUMBER_OR_WORD.match(text)):
        return text
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
