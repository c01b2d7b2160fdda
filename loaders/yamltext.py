"""Hostile YAML as plain data: the reader of `MLmodel` and of the YAML files next to it.

The language is YAML 1.1 as PyYAML reads it, because MLflow writes and reads these files with PyYAML. The
limits are those of the gateway's own reader (`gateway.yamltext`). Imports PyYAML when called; a worker never
does.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

from loaders.files import PackageError

MAX_DEPTH: Final = 64
MAX_NODES: Final = 500_000
MAX_NUMBER: Final = 4_000
"""The characters of the longest number."""

_NUMBERS: Final = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)\Z"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
"""PyYAML's own forms without those to the base 60, such as `1:30`: reading one takes quadratic time."""


def parse_yaml(text: bytes, place: str) -> Any:
    """Hostile YAML as plain data: mappings with string keys, lists, text, numbers, booleans, null.

    Times stay text, also `1:30`. Numbers of more than 4,000 characters, more than 500,000 nodes with aliases
    expanded, more than 64 levels, aliases that contain themselves and any other tag raise PackageError.
    """
    import yaml

    loader = _loader()
    try:
        depth = 0
        # The events come from an iterative parser: the depth is known before anything recurses into it.
        for nodes, event in enumerate(yaml.parse(text, Loader=loader)):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH or nodes > MAX_NODES:
                raise PackageError(place, "is nested too deeply" if depth > MAX_DEPTH else "is too large")
        instance = loader(text)
        try:
            node = instance.get_single_node()
            if node is None:
                return None
            if _expanded(node, {}, place) > MAX_NODES:
                raise PackageError(place, "is too large once its aliases are expanded")
            return _plain(instance.construct_document(node), place)
        finally:
            instance.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise PackageError(place, f"is not valid YAML{where}: {problem}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise PackageError(place, f"holds a value that cannot be read: {error}") from None


@lru_cache(maxsize=1)
def _loader() -> Any:
    """PyYAML's safe reader with these forms of numbers, and without times."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    timestamp = "tag:yaml.org,2002:timestamp"
    resolvers = {
        first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in entries if tag != timestamp]
        for first, entries in base.yaml_implicit_resolvers.items()
    }
    return type("_Loader", (base,), {"yaml_implicit_resolvers": resolvers})


def _expanded(node: Any, known: dict[int, int | None], place: str) -> int:
    """How many nodes there are below one, aliases counted each time they are used."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise PackageError(place, "holds an alias that contains itself")
        return count
    known[id(node)] = None
    count = 1
    if node.tag in _NUMBERS and len(node.value) > MAX_NUMBER:
        raise PackageError(place, f"holds a number of more than {MAX_NUMBER:,} characters")
    if not isinstance(node.value, str):
        for child in node.value:
            pair = child if isinstance(child, tuple) else (child,)
            count += sum(_expanded(part, known, place) for part in pair)
    known[id(node)] = min(count, MAX_NODES + 1)
    return count


def _plain(value: Any, place: str) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, list):
        return [_plain(item, place) for item in value]
    if isinstance(value, dict):
        plain = {}
        for key, item in value.items():
            if not isinstance(key, (str, int, float)):
                raise PackageError(place, f"has {kind_of(key)} as a key")
            plain[key if isinstance(key, str) else str(key)] = _plain(item, place)
        return plain
    raise PackageError(place, f"holds {kind_of(value)}, which has no place in it")


def kind_of(value: object) -> str:
    """Names the kind of a value, for messages."""
    if value is None:
        return "null"
    kinds = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
