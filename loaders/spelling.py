"""Words of messages: the known name that is most like a given one, a number with its noun, the first of many
names.

The gateway has its own search for names in `gateway.names`: loaders never import the gateway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def near(word: str, known: Iterable[str], ratio: float = 0.6) -> str | None:
    """The known name most like `word`; None if none is. `ratio`: how alike, 0 to 1."""
    from difflib import get_close_matches  # only where something is wrong already

    found = get_close_matches(word, list(known), 1, ratio)
    return found[0] if found else None


def counted(count: int, noun: str) -> str:
    """`1 row`, `2 rows`, `2,000 entries`."""
    if count != 1:
        noun = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count:,} {noun}"


def few(names: Sequence[str], most: int) -> str:
    """The first `most` names, joined; `…` says that there are more: `a, b, …`."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
