"""Selects the names on a page of a list, which may contain a hundred thousand models.

Sorting and searching so many names would block the event loop, so callers run `Names` in a thread. It keeps
the order until the registry's content changes. Knows names; must not know models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

#: Maximum items on a page.
MOST = 1000
#: Number of views made before the event loop does other work.
AT_ONCE = 25


@dataclass(frozen=True, slots=True)
class Page:
    """The page that a caller requests. `after`: the last item of the previous page. `search`: a part of the
    name, in any case. `limit`: None means everything. `reads`: returns True if the caller may see a model;
    None: all models."""

    limit: int | None = None
    after: str | None = None
    search: str | None = None
    reads: Callable[[str], bool] | None = None

    def takes(self, name: str) -> bool:
        """Returns True if a name belongs to the list, on any page."""
        found = self.search is None or self.search.lower() in name.lower()
        return found and (self.reads is None or self.reads(name))


@dataclass(frozen=True, slots=True)
class Listed:
    """The items of a page in their order. `next`: what the next page comes after; None: this is the last."""

    items: Sequence[str]
    next: str | None


class Names:
    """The names of a snapshot in their order. `page` blocks: call it in a thread."""

    def __init__(self) -> None:
        self._kept: tuple[object, Sequence[str]] = (None, ())

    def page(self, models: Iterable[str], stamp: object, page: Page) -> Listed:
        """The names after `page.after`, in the order of their code points. `models`: the names of a snapshot,
        which does not change while it has this stamp."""
        kept, ordered = self._kept
        if kept != stamp:
            ordered = sorted(models)
            self._kept = stamp, ordered
        start = 0 if page.after is None else bisect_left(ordered, page.after + "\0")
        if page.search is None and page.reads is None:
            if page.limit is None:
                return Listed(ordered[start:], None)
            end = start + page.limit
            more = len(ordered) > end
            return Listed(ordered[start:end], ordered[end - 1] if more else None)
        found: list[str] = []
        for place in range(start, len(ordered)):
            if page.takes(ordered[place]):
                if len(found) == page.limit:
                    return Listed(found, found[-1])
                found.append(ordered[place])
        return Listed(found, None)
