"""How usage is divided: by calls inside a pack, by rows among teams; the rest is idle or shared."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.access.principal import Principal
from gateway.metrics import Metrics
from gateway.record import RequestRecord
from gateway.registries.base import Version
from gateway.state import State
from gateway.usage import AT_ONCE, BY, INTERVAL, MAX_TEAMS, SAVED_EVERY, Held, Process, Usage, _trees
from gateway.usagememory import UsageMemory, Used

ONE, TWO = Version("one", "1", "file:///one"), Version("two", "1", "file:///two")


def usage(sums: Any = None) -> Usage:
    manager: Any = SimpleNamespace()
    return Usage(manager, Metrics(), sums)


def kept(state: State, **options: Any) -> UsageMemory:
    """The sums in a state, written at once."""
    return UsageMemory(state, "registry", lambda write: write(), **options)


def ask(made: Usage, version: Version, team: str, rows: int) -> None:
    made.request(RequestRecord(version=version, rows=rows, principal=Principal("a", "token", team)))


def seen(made: Usage, by: tuple[str, ...] = BY) -> dict[str, Any]:
    return asyncio.run(made.view(by))


def cpu(made: Usage, by: str) -> dict[Any, float]:
    return {tuple(one.get(name) for name in by.split(",")): one["cpu_seconds"] for one in seen(made)["usage"]}


def test_a_process_with_the_processes_below_it_is_its_models() -> None:
    processes = {5: Process(1, 2.0), 6: Process(5, 1.0), 7: Process(6, 0.5), 8: Process(1, 9.0)}
    assert _trees(processes, {5, 99}) == {5: 3.5}


def test_the_time_of_calls_divides_a_pack_and_rows_divide_a_model() -> None:
    made = usage()
    ask(made, ONE, "blue", 1)
    ask(made, ONE, "red", 3)
    ask(made, TWO, "red", 5)
    held = [Held(ONE, (5,), 1.0, 10), Held(TWO, (5,), 3.0, 10)]
    made._divide_cpu(held, own=2.0, ended=0.5, processes={5: Process(1, 8.0), 9: Process(1, 1.0)})
    assert cpu(made, "team,model") == {("blue", "one"): 0.5, ("red", "one"): 1.5, ("red", "two"): 6.0}
    view = seen(made)
    assert view["shared"]["gateway"]["cpu_seconds"] == 2.0
    assert view["shared"]["others"]["cpu_seconds"] == 1.5
    assert view["total"]["cpu_seconds"] == 11.5
    # From then on only what was used since counts; without a request it is idle.
    made._rows.clear()
    held = [Held(ONE, (5,), 2.0, 10), Held(TWO, (5,), 3.0, 10)]
    made._divide_cpu(held, own=2.0, ended=0.5, processes={5: Process(1, 9.0), 9: Process(1, 1.0)})
    assert seen(made)["idle"] == [{"model": "one", "cpu_seconds": 1.0, "memory_byte_seconds": 0}]
    # A process that has ended, and one with its number that has used less, take nothing back.
    made._divide_cpu(held, own=2.0, ended=9.5, processes={5: Process(1, 0.1)})
    view = seen(made)
    parts = [one["cpu_seconds"] for key in ("usage", "idle") for one in view[key]]
    parts += [one["cpu_seconds"] for one in view["shared"].values()]
    assert sum(parts) == pytest.approx(view["total"]["cpu_seconds"])


def test_teams_are_bounded_and_unknown_models_are_not_counted() -> None:
    made = usage()
    for number in range(MAX_TEAMS + 50):
        ask(made, ONE, f"team {number}", 1)
    made.request(RequestRecord(principal=Principal("a", "token", "late")))
    teams = {one["team"] for one in seen(made, ("team",))["usage"]}
    assert len(teams) == MAX_TEAMS + 1
    assert "other" in teams
    assert seen(made, ())["usage"] == [
        {"requests": MAX_TEAMS + 50, "rows": MAX_TEAMS + 50, "cpu_seconds": 0.0, "memory_byte_seconds": 0}
    ]


def test_a_long_view_leaves_the_event_loop_to_others() -> None:
    async def turns() -> int:
        made, taken, done = usage(), 0, asyncio.Event()
        for number in range(4 * AT_ONCE):
            ask(made, Version(f"model {number}", "1", "file:///m"), "", 1)

        async def other() -> None:
            nonlocal taken
            while not done.is_set():
                taken += 1
                await asyncio.sleep(0)

        others = asyncio.create_task(other())
        view = await made.view()
        done.set()
        await others
        assert len(view["usage"]) == view["total"]["requests"] == 4 * AT_ONCE
        return taken

    assert asyncio.run(turns()) >= 8


def test_the_sums_outlive_the_gateway_and_add_up_with_those_of_others(tmp_path: Path) -> None:
    state = State(tmp_path)
    first, other = usage(kept(state)), usage(kept(state))
    ask(first, ONE, "blue", 3)
    first._divide_cpu([Held(ONE, (5,), 1.0, 10)], own=2.0, ended=0.0, processes={5: Process(1, 8.0)})
    first.save()
    ask(first, ONE, "blue", 1)
    first.save()
    first.save()  # nothing was used since
    ask(other, TWO, "red", 5)  # another gateway with the same state
    other._divide_cpu([], own=1.0, ended=0.0, processes={})
    other.save()
    state.close()
    state = State(tmp_path)
    again = usage(kept(state))
    ask(again, ONE, "blue", 1)
    view = seen(again)
    assert view["since"] == seen(first)["since"]
    shown = {(one["team"], one["model"]): one for one in view["usage"]}
    assert {key: (one["requests"], one["rows"]) for key, one in shown.items()} == {
        ("blue", "one"): (3, 5),
        ("red", "two"): (1, 5),
    }
    assert shown["blue", "one"]["cpu_seconds"] == 8.0
    assert view["shared"]["gateway"]["cpu_seconds"] == 3.0
    assert view["total"]["cpu_seconds"] == 11.0
    assert view["total"]["requests"] == 4
    assert UsageMemory(state, "another", lambda write: write()).read() == ([], None)
    assert INTERVAL * SAVED_EVERY <= 60  # what a killed gateway loses
    state.close()


def test_the_state_keeps_a_bounded_number_of_sums(tmp_path: Path) -> None:
    now = iter(range(1000))
    state = State(tmp_path)
    sums = kept(state, most=4, clock=lambda: float(next(now)))
    for number in range(10):
        sums.add(0.0, [Used("asked", "", f"model {number}", 1, 1, 0.0, 0.0)])
    assert [one.model for one in sums.read()[0]] == [f"model {number}" for number in range(6, 10)]
    state.close()
