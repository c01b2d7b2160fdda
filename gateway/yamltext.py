"""YAML as people write it, read strictly into plain data: the one parser of YAML that others wrote.

Reading refuses ambiguous YAML: the same key twice, keys that are not scalars, text nested deeper than
`MAX_DEPTH`, anchors that repeat into more than `MAX_REPEATED` nodes. It reads parser events, because the
library's own composer recurses, and a megabyte of `[` ends the process.

Two ways read the same: `plain` is fast and streams, and gives up on what is rare (anchors, a key that comes
twice); `data(parse(text))` keeps the place of each node, for errors and for edits. Knows no registry and no
settings.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

# The same as those of `loaders.yamltext`, which reads the YAML in packages.
MAX_DEPTH = 64
MAX_REPEATED = 500_000

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

EMPTY = "it is empty"
# The library's words name what it reads, and not what a person did.
_USUAL = "look here and above for a tab, a wrong indentation, and a bracket or quote that is not closed"

# The JSON-like core of YAML 1.2: `no`, `1_000`, `1:30` and dates stay text.
_TYPED = re.compile(r"(?P<null>~|null|)|(?P<true>true)|(?P<false>false)|(?P<int>[-+]?[0-9]+)|"
                    r"(?P<float>[-+]?(?:[0-9]+\.[0-9]*|\.?[0-9]+)(?:[eE][-+]?[0-9]+)?)")  # fmt: skip


class InvalidText(ValueError):
    """The text cannot be read. `problems`: (place, what is wrong), all that were found."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{place}: {what}" if place else what for place, what in problems))
        self.problems = problems

    @property
    def empty(self) -> bool:
        """Returns True if nothing is wrong but that there is no text."""
        return self.problems == [("", EMPTY)]


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
    return _tree(events(text))


def events(text: str) -> Iterator[Any]:
    """The library's parser events. Raises InvalidText."""
    with _refused(), contextlib.closing(_Parser(text)) as parser:
        while True:
            event = parser.next_event()
            yield event
            if type(event) is yaml.StreamEndEvent:
                return


class _Parser:
    def __init__(self, text: str) -> None:
        self._loader = _Loader(text)
        self.next_event: Callable[[], Any] = self._loader.get_event

    def close(self) -> None:
        self._loader.dispose()


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Turns what the library raises into InvalidText, with the place."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = f"not YAML: {error.problem or error.context or 'it cannot be read'}; {_USUAL}"
        raise InvalidText([(place, problem)]) from None
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
                raise InvalidText([(f"line {line}", "a key that is not a scalar")])
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
        raise InvalidText([("", EMPTY)])
    return root


class NotPlain(InvalidText):
    """The text may be valid, but holds what `plain` does not read."""


def plain(text: str, entries: str = "", take: Callable[[str, Any], None] | None = None) -> Any:
    """What `data(parse(text), typed=False)` gives, several times faster. Raises InvalidText, and NotPlain for
    anchors, keys that come twice and text nested too deep: the slow way says what is wrong, and where.

    `take` gets each entry of the mapping at the key `entries` of the outermost mapping as soon as it is read.
    The result has null in its place: a text with very many entries takes little memory, and no step is long.
    """
    with _refused(), contextlib.closing(_Parser(text)) as parser:
        # Not through `events`: a generator takes a third of the time.
        return _plain(parser.next_event, entries, take)


def _plain(
    next_event: Callable[[], Any], entries: str = "", take: Callable[[str, Any], None] | None = None
) -> Any:
    root: Any = None
    below: dict[str, Any] | list[Any] | None = None
    taken: dict[str, Any] | None = None  # the mapping whose entries `take` gets
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
                    raise NotPlain([("", f"{value} is given twice")])
                key = value
                continue
            if not event.style and value in ("", "~", "null"):
                value = None
        elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            value = {} if kind is yaml.MappingStartEvent else []
            if type(below) is dict and key is None:
                raise NotPlain([("", "a key that is not a scalar")])
            if len(open_) >= MAX_DEPTH:
                raise NotPlain([("", "nested too deep")])
            if take is not None and len(open_) == 1 and key == entries and type(value) is dict:
                taken = value
        elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
            value, below = below, open_.pop()
            if take is not None and below is taken and taken is not None:
                name = next(reversed(taken))
                taken[name] = None
                take(name, value)
            continue
        elif kind is yaml.StreamEndEvent:
            if not begun:
                raise NotPlain([("", EMPTY)])
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
            if kind is yaml.ScalarEvent and take is not None and below is taken:
                taken[key or ""] = None
                take(key or "", value)
            key = None
        else:
            below.append(value)  # type: ignore[union-attr]
        if kind is not yaml.ScalarEvent:
            open_.append(below)
            below = value


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
                    twice.append((below, "is given twice"))
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
