"""YAML as people write it: read strictly into plain data, and changed in place so that the rest of the
text stays as it is, comments and order included.

Reading refuses ambiguous YAML: the same key twice, keys that are not scalars, text nested deeper
than `MAX_DEPTH`, anchors that repeat into more than `MAX_REPEATED` nodes. It builds its tree from parser
events because the library's own composer recurses, and a megabyte of `[` ends the process.

Editing replaces spans of the text. ruamel.yaml's round trip was measured against it: ten times slower (3.2 s
for a thousand models), and it moved a comment to another model. An edit is never trusted: callers
compare what the new text reads as with what they wanted (see `changed`).

A large text whose mapping has very many entries is cut into one piece for each (`split`): pieces that did
not change need not be read again, and an edit touches one of them.

Knows nothing of registries or settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

MAX_DEPTH = 50
MAX_REPEATED = 100_000

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# The JSON-like core of YAML 1.2: `no`, `1_000`, `1:30` and dates stay text.
_TYPED = re.compile(r"(?P<null>~|null|)|(?P<true>true)|(?P<false>false)|(?P<int>[-+]?[0-9]+)|"
                    r"(?P<float>[-+]?(?:[0-9]+\.[0-9]*|\.?[0-9]+)(?:[eE][-+]?[0-9]+)?)")  # fmt: skip
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./@%+-]*\Z")
_NUMBER_OR_WORD = re.compile(r"(?i)(?:[-+0-9._]+(?:e[-+0-9]+)?|0[xo].*|y|n|yes|no|on|off|true|false|null)\Z")
_WHOLE = re.compile(r"[1-9][0-9]*\Z")


class InvalidText(ValueError):
    """The text cannot be read. `problems`: (place, what is wrong), all that were found."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{place}: {what}" if place else what for place, what in problems))
        self.problems = problems


@dataclass(slots=True, eq=False)
class Node:
    """A piece of the text, from character `start` to `end`. A scalar has `text`; a mapping has `entries`,
    pairs of key and value; a sequence `items`."""

    start: int
    end: int
    column: int
    text: str | None = None
    plain: bool = False
    flow: bool = False
    entries: list[tuple[Node, Node]] | None = None
    items: list[Node] = field(default_factory=list)

    def find(self, key: str) -> tuple[Node, Node] | None:
        return next((pair for pair in self.entries or () if pair[0].text == key), None)

    @property
    def leaf_end(self) -> int:
        """Where the last character of a block collection stands: its own end is the next token's start."""
        if self.flow or self.text is not None:
            return self.end
        last = self.entries[-1][1] if self.entries else self.items[-1] if self.items else None
        if last is None:
            return self.end
        return max(last.leaf_end, self.entries[-1][0].end) if self.entries else last.leaf_end


def parse(text: str) -> Node:
    """The text as a tree. Raises InvalidText."""
    return _events(text, _tree)


def check(text: str) -> None:
    """Makes sure that the text is valid YAML, without keeping anything of it. Raises InvalidText."""
    _events(text, lambda events: sum(1 for _ in events))


def _events(text: str, use: Callable[[Iterator[Any]], T]) -> T:
    try:
        return use(yaml.parse(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InvalidText([(place, error.problem or error.context or "not YAML")]) from None
    except yaml.YAMLError as error:
        raise InvalidText([("", f"not YAML: {' '.join(str(error).split())}")]) from None
    except UnicodeEncodeError:
        raise InvalidText([("", "not text: it holds half of a surrogate pair")]) from None


def _tree(events: Iterator[Any]) -> Node:
    root: Node | None = None
    anchors: dict[str, Node] = {}
    open_: list[Node] = []
    keys: list[Node | None] = []  # parallel to `open_`: the key that waits for its value

    def place(node: Node, line: int) -> None:
        nonlocal root
        if not open_:
            if root is not None:
                raise InvalidText([(f"line {line}", "a second document; write one")])
            root = node
            return
        parent = open_[-1]
        if parent.entries is None:
            parent.items.append(node)
        elif (key := keys[-1]) is None:
            if node.text is None:
                raise InvalidText([(f"line {line}", "a key that is no scalar")])
            keys[-1] = node
        else:
            parent.entries.append((key, node))
            keys[-1] = None

    for event in events:
        kind = type(event).__name__
        line = event.start_mark.line + 1 if event.start_mark else 0
        if kind in ("MappingEndEvent", "SequenceEndEvent"):
            open_.pop().end = event.end_mark.index
            keys.pop()
            continue
        if kind == "AliasEvent":
            if event.anchor not in anchors:
                raise InvalidText([(f"line {line}", f"the anchor {event.anchor} is not defined")])
            place(anchors[event.anchor], line)
            continue
        if kind not in ("ScalarEvent", "MappingStartEvent", "SequenceStartEvent"):
            continue
        node = Node(event.start_mark.index, event.end_mark.index, event.start_mark.column)
        if kind == "ScalarEvent":
            node.text = event.value
            node.plain = event.style in (None, "")
        else:
            node.flow = bool(event.flow_style)
            node.entries = [] if kind == "MappingStartEvent" else None
            if len(open_) >= MAX_DEPTH:
                raise InvalidText([(f"line {line}", f"nested deeper than {MAX_DEPTH} levels")])
        place(node, line)
        if event.anchor:
            anchors[event.anchor] = node
        if kind != "ScalarEvent":
            open_.append(node)
            keys.append(None)
    if root is None:
        raise InvalidText([("", "it is empty")])
    return root


class NotPlain(InvalidText):
    """The text may be valid, but holds what `plain` does not read."""


def plain(text: str | bytes) -> Any:
    """What `data(parse(text), typed=False)` gives, several times faster. Raises NotPlain for anchors, for
    keys that come twice, for what is nested as deep as `MAX_DEPTH` (so that a piece may stand in a mapping),
    and for what is not valid: the slow way says what is wrong, and where."""
    try:
        # Not `yaml.parse`: a generator over two calls an event is half of the time.
        loader = _Loader(text)
        try:
            return _plain(loader.get_event)
        finally:
            loader.dispose()
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        raise NotPlain([("", str(error))]) from None


def _plain(next_event: Callable[[], Any]) -> Any:
    root: Any = None
    below: dict[str, Any] | list[Any] | None = None
    key: str | None = None
    open_: list[dict[str, Any] | list[Any] | None] = []
    begun = False
    while True:
        event = next_event()
        kind = type(event)
        if kind is yaml.ScalarEvent:
            value = event.value
            if type(below) is dict and key is None and not event.anchor:
                if value in below:
                    raise NotPlain([("", f"{value} comes twice")])
                key = value
                continue
            if not event.style and value in ("", "~", "null"):
                value = None
        elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            value = {} if kind is yaml.MappingStartEvent else []
            if type(below) is dict and key is None:
                raise NotPlain([("", "a key that is no scalar")])
            if len(open_) >= MAX_DEPTH - 1:
                raise NotPlain([("", "nested too deep")])
        elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
            below = open_.pop()
            continue
        elif kind is yaml.StreamEndEvent:
            if not begun:
                raise NotPlain([("", "it is empty")])
            return root
        elif kind is yaml.AliasEvent:
            raise NotPlain([("", "an anchor")])
        else:
            continue  # where documents begin and end
        if event.anchor:
            raise NotPlain([("", "an anchor")])
        if below is None:
            if begun:
                raise NotPlain([("", "a second document")])
            root, begun = value, True
        elif type(below) is dict:
            below[key or ""] = value
            key = None
        else:
            below.append(value)  # type: ignore[union-attr]
        if kind is not yaml.ScalarEvent:
            open_.append(below)
            below = value


@dataclass(frozen=True, slots=True)
class Pieces:
    """A text in which one entry of the outermost mapping is a mapping again: piece i, from byte `starts[i]`
    to byte `starts[i + 1]`, is an entry of that one, with the comments behind it. `head` is the byte at which
    the line of its key begins; the keys of the pieces stand at `column`."""

    content: bytes
    head: int
    column: int
    starts: Sequence[int]

    def __iter__(self) -> Iterator[bytes]:
        content, starts = self.content, self.starts
        return (content[starts[i] : starts[i + 1]] for i in range(len(starts) - 1))

    def without(self, entry: bytes) -> bytes:
        """The text with `entry`, a line without its indentation, in the place of all pieces."""
        line = b" " * self.column + entry + b"\n"
        return self.content[: self.starts[0]] + line + self.content[self.starts[-1] :]


def split(content: bytes, key: str) -> Pieces | None:
    """The pieces of the block mapping at `key`, cut at its indentation; None where there is no such mapping.

    Where each piece alone, and `Pieces.without` them, reads as valid YAML without anchors and as one mapping,
    the whole text reads as the mapping of all of them. A scalar or a flow collection that goes over an edge
    leaves a piece that is not valid; a block ends at an edge in any case, because the next line is indented
    less; and what goes on at the same indentation (`-` below its key, `:` below `?`) is no mapping alone.
    """
    # No search goes over more of the text than one piece: a long one would keep other threads waiting. Each
    # begins with a line break and not with `^`, which is five times slower to look for.
    begin = b"%b:" % key.encode()
    head = 0 if content.startswith(begin) else content.find(b"\n" + begin) + 1
    line = re.compile(rb"%b:[ \t]*(?:#[^\r\n]*)?\r?\n" % re.escape(key.encode())).match(content, head)
    if line is None:
        return None
    first = re.compile(rb"(?:[ \t]*(?:#[^\n]*)?\r?\n)*( +)[^ \t\r\n#]").match(content, line.end())
    if first is None:
        return None
    column = len(first[1])
    starts: list[int] = []
    end = len(content)
    for edge in re.compile(rb"\n( {0,%d})([^ \r\n#])" % column).finditer(content, first.start(1) - 1):
        if len(edge[1]) < column:
            end = edge.start(1)
            break
        if edge[2] != b"\t":
            starts.append(edge.start(1))
    return Pieces(content, head, column, [*starts, end])


def data(root: Node, *, typed: bool, problems: list[tuple[str, str]] | None = None) -> Any:
    """The tree as dicts, lists and scalars. `typed`: numbers, true, false and null are read as such where
    they are not quoted; else every scalar is its text, and only an absent value, `~` and `null` are None.
    Raises InvalidText for runaway anchors and for keys that come twice; the latter go to `problems` instead,
    and reading goes on, where it is given."""
    twice: list[tuple[str, str]] = [] if problems is None else problems
    seen: set[int] = set()
    path: set[int] = set()
    repeated = 0

    def convert(node: Node, place: str) -> Any:
        nonlocal repeated
        if node.text is not None:
            return _scalar(node, typed)
        if id(node) in path:
            raise InvalidText([(place, "an anchor that holds itself")])
        # Nodes below an anchor count again at each repetition.
        repeated += sum(1 for _ in (node.entries or node.items)) + 1 if id(node) in seen else 0
        if repeated > MAX_REPEATED:
            raise InvalidText([(place, f"anchors repeat into more than {MAX_REPEATED:,} values")])
        seen.add(id(node))
        if len(path) >= MAX_DEPTH:
            raise InvalidText([(place, f"nested deeper than {MAX_DEPTH} levels")])
        path.add(id(node))
        try:
            if node.entries is None:
                return [convert(item, f"{place}[{i}]") for i, item in enumerate(node.items)]
            mapping: dict[str, Any] = {}
            for key, value in node.entries:
                name = key.text or ""
                below = f"{place}.{name}" if place else name
                if name in mapping:
                    twice.append((below, "comes twice"))
                    continue
                mapping[name] = convert(value, below)
            return mapping
        finally:
            path.discard(id(node))

    result = convert(root, "")
    if twice and problems is None:
        raise InvalidText(twice)
    return result


def _scalar(node: Node, typed: bool) -> Any:
    text = node.text or ""
    if not node.plain:
        return text
    if not typed:
        return None if text in ("", "~", "null") else text
    match = _TYPED.fullmatch(text)
    if match is None:
        return text
    kind = match.lastgroup
    if kind == "int":
        return int(text) if len(text) < 4000 else text  # beyond, Python itself refuses
    return float(text) if kind == "float" else {"true": True, "false": False}.get(kind or "")


def put(where: Any, path: Sequence[str], value: Any) -> Any:
    """Plain data with `value` at `path`, None removing what is there. What was given is not changed."""
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
    """The text with each (path, value) put in, None meaning removed, and whether all else of it was kept.

    Where the text cannot be edited so that it reads as wanted (anchors are the usual reason), it is
    rewritten without its comments. Values are dicts, lists and strings; all are read back as text.
    """
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
        pass  # the edit broke the text, which is what is checked for here
    return block(wanted), False


def _as_read(value: Any) -> Any:
    """The value as `data` gives it back: all scalars are text."""
    if isinstance(value, dict):
        return {str(key): _as_read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_read(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else None if value is None else str(value)


def _edited(text: str, node: Node, path: Sequence[str], value: Any) -> str | None:
    """The text, whose tree is `node`, with one change; None where it holds something this does not edit."""
    if not path[:-1] and value is None:
        return None
    key: Node | None = None
    parent: Node | None = None
    step = 2  # columns a level is indented by, learnt on the way down
    for depth, name in enumerate(path):
        if node.entries is None:  # a scalar, mostly an absent value, where a mapping belongs
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
    """The index of the line break (of `\\r\\n`: of its first character) at or after `at`."""
    newline = text.find("\n", at)
    if newline < 0:
        return len(text)
    return newline - 1 if newline > at and text[newline - 1] == "\r" else newline


def _is_deep(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(v, dict) for v in value.values())


def block(value: Any, column: int = 0) -> str:
    """Plain data as lines that begin at `column`; mappings without mappings in them in one line."""
    if not isinstance(value, dict):
        return " " * column + flow(value) + "\n"
    lines = ""
    for key, item in value.items():
        head = f"{' ' * column}{_scalar_text(key)}:"
        lines += f"{head}\n{block(item, column + 2)}" if _is_deep(item) else f"{head} {flow(item)}\n"
    return lines


def flow(value: Any) -> str:
    """Plain data in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar_text(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _scalar_text(str(value))


def _scalar_text(text: str) -> str:
    """The scalar bare where every YAML reader takes it for the same text or whole number, else quoted."""
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
