"""The gateway's own heap: what exists when it starts is not visited again after each load."""

from __future__ import annotations

import asyncio
import gc

import pytest

from gateway.runners import heap, inline
from gateway.runners.heap import Heap


@pytest.mark.anyio
async def test_only_what_is_new_is_collected_until_the_whole_heap_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heap, "FREEZE_AFTER", 0.0)
    monkeypatch.setattr(heap, "FREEZE_INTERVAL", 0.0)
    asked: asyncio.Queue[bool] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(heap, "freeze_heap", lambda whole: loop.call_soon_threadsafe(asked.put_nowait, whole))
    one = Heap()
    one.freeze_soon()
    assert await asyncio.wait_for(asked.get(), 60) is False
    monkeypatch.setattr(heap, "WHOLE_INTERVAL", 0.0)
    one.freeze_soon()
    assert await asyncio.wait_for(asked.get(), 60) is True
    one.close()


def test_what_was_frozen_is_not_visited_again() -> None:
    class Node:
        """A part of a cycle."""

        other: Node
        name: str

    def cycle(name: str) -> None:
        one, two = Node(), Node()
        one.other, two.other = two, one
        one.name = two.name = name

    def left() -> list[str]:
        gc.unfreeze()
        return [one.name for one in gc.get_objects() if type(one) is Node]

    try:
        inline.freeze_heap()
        gc.disable()
        cycle("frozen")
        gc.freeze()
        cycle("new")
        inline.freeze_heap(whole=False)
        assert left() == ["frozen", "frozen"], "only what is new is collected"
        inline.freeze_heap()
        assert left() == []
    finally:
        gc.enable()
        gc.unfreeze()
