"""Pages of names: each name is on one page, for every request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.views.paging import Names, Page

NAMES = st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=30)


@given(NAMES, st.integers(1, 7), st.sampled_from([None, "a", "É"]), st.booleans())
def test_the_pages_are_the_list(names: list[str], limit: int, search: str | None, guarded: bool) -> None:
    def reads(name: str) -> bool:
        return len(name) % 2 == 0

    wanted = sorted(
        name
        for name in names
        if (search is None or search.lower() in name.lower()) and (not guarded or reads(name))
    )
    pages, after = Names(), None
    found: list[str] = []
    while True:
        listed = pages.page(names, "1", Page(limit, after, search, reads if guarded else None))
        assert len(listed.items) <= limit
        found += listed.items
        if listed.next is None:
            break
        assert listed.next == found[-1]
        after = listed.next
    assert found == wanted
    assert [*pages.page(names, "1", Page(None, None, search, reads if guarded else None)).items] == wanted


def test_another_content_has_another_order() -> None:
    pages = Names()
    assert pages.page(["b", "a"], "1", Page()).items == ["a", "b"]
    assert pages.page(["never read"], "1", Page()).items == ["a", "b"]
    assert pages.page(["c"], "2", Page()).items == ["c"]
    assert pages.page(["c"], "2", Page(1, "b")).next is None
