"""The manager: single flight, leases before waiting, room by the ledger, failures remembered."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.errors import Problem
from gateway.events import Loaded, LoadFailed, Unloaded
from gateway.serving.manager import Lease
from gateway.serving.servable import Options, Status
from tests.support.controlled import MB, Behaviour, Bench, bounded, turns, version


async def use(bench: Bench, number: int) -> None:
    lease = bench.manager.lease(version(number))
    await bench.manager.ready(lease)
    lease.release()


@pytest.mark.anyio
@bounded
async def test_promise_6_simultaneous_requests_cause_one_load(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    leases = [bench.manager.lease(version()) for _ in range(100)]
    await asyncio.gather(*(bench.manager.ready(lease) for lease in leases))
    assert bench.behaviour(version()).starts == 1
    assert bench.ledger[leases[0].servable].leases == 100


@pytest.mark.anyio
@bounded
async def test_promise_6_a_caller_who_leaves_does_not_cancel_the_load(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    hold = bench.behaviour(version()).hold = asyncio.Event()
    leaving, staying = bench.manager.lease(version()), bench.manager.lease(version())
    left = asyncio.create_task(bench.manager.ready(leaving))
    stayed = asyncio.create_task(bench.manager.ready(staying))
    await turns()
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    leaving.release()
    hold.set()
    assert (await stayed).status is Status.READY
    assert bench.behaviour(version()).starts == 1


@pytest.mark.anyio
@bounded
async def test_a_wait_that_is_too_long_ends_and_the_load_goes_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    hold = bench.behaviour(version()).hold = asyncio.Event()
    lease = bench.manager.lease(version())
    with pytest.raises(Problem) as caught:
        await bench.manager.ready(lease, 0.0)
    assert (caught.value.code, caught.value.status) == ("MODEL_LOADING", 503)
    assert caught.value.retry_after is not None
    hold.set()
    assert (await bench.manager.ready(lease)).status is Status.READY


@pytest.mark.anyio
@bounded
async def test_promise_7_a_leased_model_is_never_evicted(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limit=25 * MB, capacity_wait=0.01)
    held = [bench.manager.lease(version(n)) for n in (1, 2)]
    for lease in held:
        await bench.manager.ready(lease)
    with pytest.raises(Problem) as caught:
        await use(bench, 3)
    assert caught.value.code == "CAPACITY_EXCEEDED"
    assert [lease.servable.status for lease in held] == [Status.READY, Status.READY]
    held[0].release()
    await use(bench, 3)
    assert bench.manager.find(version(1)) is None
    assert bench.manager.is_ready(version(2))
    bench.ledger.check()


@pytest.mark.anyio
@bounded
async def test_a_load_waits_until_a_lease_ends(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limit=15 * MB)
    first = bench.manager.lease(version(1))
    await bench.manager.ready(first)
    second = asyncio.create_task(use(bench, 2))
    await turns()
    assert not second.done()
    first.release()
    await second
    assert [event.reason for event in bench.of(Unloaded)] == ["evicted"]


@pytest.mark.anyio
@bounded
async def test_the_wait_for_memory_is_no_cost_of_a_load(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limit=15 * MB)
    first = bench.manager.lease(version(1))
    await bench.manager.ready(first)
    second = bench.manager.lease(version(2))
    loading = asyncio.create_task(bench.manager.ready(second))
    await turns()
    bench.clock.now += 3.0
    first.release()
    await loading
    assert bench.ledger[second.servable].load_seconds == 0.0
    assert bench.of(Loaded)[-1].seconds == 3.0
    second.release()
    await use(bench, 1)
    assert bench.manager.find(version(2)) is None, "it was not too young to be evicted"


@pytest.mark.anyio
@bounded
async def test_a_load_whose_callers_have_left_takes_no_memory_from_others_and_is_tried_again_at_once(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, limit=15 * MB)
    bench.manager.serves(version(1), True)
    await use(bench, 1)
    left = bench.manager.lease(version(2))
    left.release()
    await left.servable.gone.wait()
    assert [event.reason for event in bench.of(Unloaded)] == ["unneeded"]
    assert (bench.of(LoadFailed), bench.manager.is_ready(version(1))) == ([], True)
    await use(bench, 2)
    assert bench.manager.find(version(1)) is None
    bench.ledger.check()


@pytest.mark.anyio
@bounded
async def test_a_model_larger_than_the_limit_is_refused_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limit=5 * MB)
    with pytest.raises(Problem, match="the limit of all models is 5 MB"):
        await use(bench, 1)
    assert bench.ledger.accounted == 0


@pytest.mark.anyio
@bounded
async def test_a_measurement_above_the_estimate_makes_room_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limit=40 * MB)
    await use(bench, 1)
    bench.on[version(2)] = Behaviour(measured=35 * MB)
    await use(bench, 2)
    assert bench.manager.find(version(1)) is None
    assert bench.ledger.accounted == 35 * MB
    bench.on[version(3)] = Behaviour(measured=50 * MB)
    with pytest.raises(Problem) as caught:
        await use(bench, 3)
    assert caught.value.code == "CAPACITY_EXCEEDED"
    assert bench.behaviour(version(3)).closes == 1
    bench.ledger.check()


@pytest.mark.anyio
@bounded
async def test_a_broken_version_costs_one_load_per_pause(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.on[version()] = Behaviour(fails="ValueError: no such layer")
    with pytest.raises(Problem, match="no such layer") as caught:
        await use(bench, 1)
    assert caught.value.code == "MODEL_UNAVAILABLE"
    for _ in range(20):
        with pytest.raises(Problem) as again:
            await use(bench, 1)
        assert again.value.retry_after is not None
        assert 0 < again.value.retry_after <= 1.0
    assert bench.behaviour(version()).starts == 1
    bench.clock.now += 1.1
    with pytest.raises(Problem):
        await use(bench, 1)
    assert bench.behaviour(version()).starts == 2
    assert len(bench.of(LoadFailed)) == 2
    assert bench.ledger.accounted == 0


@pytest.mark.anyio
@bounded
async def test_a_load_for_a_dry_run_is_recorded_only_if_somebody_else_wants_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for _ in range(2):
        lease = bench.manager.lease(version(), dry_run=True)
        await bench.manager.ready(lease)
        lease.release()
        assert bench.events == []
        gone = bench.manager.retire(version(), "unloaded")
        assert gone is not None
        await gone.gone.wait()
    assert bench.events == []
    bench.on[version(2)] = Behaviour(fails="OSError: not yet")
    lease = bench.manager.lease(version(2), dry_run=True)
    with pytest.raises(Problem):
        await bench.manager.ready(lease)
    assert bench.events == []

    lease = bench.manager.lease(version(3), dry_run=True)
    await bench.manager.ready(lease)
    await use(bench, 3)
    await use(bench, 3)
    lease.release()
    assert len(bench.of(Loaded)) == 1


@pytest.mark.anyio
@bounded
async def test_the_operator_may_retry_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.on[version()] = Behaviour(fails="OSError: not yet")
    with pytest.raises(Problem):
        await use(bench, 1)
    bench.on[version()].fails = None
    bench.manager.retry(version())
    await use(bench, 1)
    assert len(bench.of(Loaded)) == 1


@pytest.mark.anyio
@bounded
async def test_everybody_who_waits_hears_of_the_failure(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.on[version()] = Behaviour(fails="ImportError: lightgbm")
    leases: list[Lease] = [bench.manager.lease(version()) for _ in range(5)]
    results = await asyncio.gather(*(bench.manager.ready(lease) for lease in leases), return_exceptions=True)
    assert all(isinstance(result, Problem) for result in results)
    assert len({id(result) for result in results}) == 5, "each has an exception of its own"
    for lease in leases:
        lease.release()
    assert bench.ledger.accounted == 0


@pytest.mark.anyio
@bounded
async def test_retiring_waits_for_leases_and_a_new_request_loads_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    lease = bench.manager.lease(version())
    await bench.manager.ready(lease)
    servable = bench.manager.retire(version(), "unloaded")
    assert servable is not None
    assert servable.status is Status.DRAINING
    await use(bench, 1)
    assert bench.behaviour(version()).starts == 2
    assert not servable.gone.is_set()
    lease.release()
    await servable.gone.wait()
    assert bench.behaviour(version()).closes == 1
    bench.ledger.check()


@pytest.mark.anyio
@bounded
async def test_at_most_so_many_loads_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_concurrent_loads=2)
    hold = asyncio.Event()
    for number in range(1, 6):
        bench.on[version(number)] = Behaviour(hold=hold)
    tasks = [asyncio.create_task(use(bench, number)) for number in range(1, 6)]
    await turns()
    assert sum(bench.behaviour(version(number)).starts for number in range(1, 6)) == 2
    hold.set()
    await asyncio.gather(*tasks)


@pytest.mark.anyio
@bounded
async def test_closing_cancels_loads_and_frees_all(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await use(bench, 1)
    bench.on[version(2)] = Behaviour(hold=asyncio.Event())
    loading = asyncio.create_task(use(bench, 2))
    await turns()
    await bench.manager.close()
    with pytest.raises(Problem) as caught:
        await loading
    assert caught.value.code == "SHUTTING_DOWN"
    assert bench.behaviour(version(1)).closes == 1
    assert bench.behaviour(version(2)).closes == 1
    assert bench.ledger.accounted == 0


@pytest.mark.anyio
@bounded
async def test_a_pinned_model_stays_and_an_idle_one_goes(tmp_path: Path) -> None:
    options = {"pinned": Options(pin=True), "idle": Options(idle_ttl=60.0)}
    bench = Bench(tmp_path, limit=25 * MB, capacity_wait=0.01, options=lambda name: options[name])
    for name in options:
        lease = bench.manager.lease(version(1, name))
        await bench.manager.ready(lease)
        lease.release()
    bench.clock.now += 59
    bench.manager.retire_idle()
    assert bench.manager.is_ready(version(1, "idle"))
    bench.clock.now += 2
    bench.manager.retire_idle()
    await turns()
    assert [(event.model, event.reason) for event in bench.of(Unloaded)] == [("idle", "idle")]
    leases = [bench.manager.lease(version(n, "idle")) for n in (2, 3)]
    await bench.manager.ready(leases[0])
    with pytest.raises(Problem):
        await bench.manager.ready(leases[1])
    assert bench.manager.is_ready(version(1, "pinned"))


@pytest.mark.anyio
@bounded
async def test_a_model_that_grew_makes_others_go_and_the_books_stay_right(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limit=40 * MB)
    for number in (1, 2):
        bench.on[version(number)] = Behaviour(measured=15 * MB)
        await use(bench, number)
    grown = bench.manager.find(version(2))
    assert grown is not None
    assert grown.runner is not None
    grown.runner.measured_bytes = 30 * MB  # type: ignore[misc]
    bench.manager.remeasure(0)
    await turns()
    bench.manager.remeasure(0)
    assert bench.manager.find(version(1)) is None
    assert bench.ledger.accounted == 30 * MB
    grown.runner.measured_bytes = 90 * MB  # type: ignore[misc]
    bench.manager.remeasure(0)
    assert bench.ledger.accounted <= 40 * MB
    grown.runner.measured_bytes = 5 * MB  # type: ignore[misc]
    bench.manager.remeasure(0)
    assert bench.ledger.accounted == 5 * MB
    bench.ledger.check()


@pytest.mark.anyio
@bounded
async def test_unloading_a_model_that_hangs_in_its_load_ends_the_load(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.behaviour(version()).hold = asyncio.Event()  # never set
    lease = bench.manager.lease(version())
    waiting = asyncio.create_task(bench.manager.ready(lease))
    await turns()
    servable = bench.manager.retire(version(), "unloaded")
    assert servable is not None
    await servable.gone.wait()
    with pytest.raises(Problem, match="was unloaded while it was loading") as caught:
        await waiting
    assert (caught.value.code, caught.value.retryable) == ("MODEL_LOADING", True)
    lease.release()
    assert bench.behaviour(version()).closes == 1
    assert bench.ledger.accounted == 0
    bench.behaviour(version()).hold = None
    await use(bench, 1)


@pytest.mark.anyio
@bounded
async def test_loads_that_hang_do_not_keep_others_out_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.serving.room.LONGEST_SLOT", 0.02)

    bench = Bench(tmp_path, max_concurrent_loads=2)
    for number in (1, 2):
        bench.behaviour(version(number)).hold = asyncio.Event()  # never set
        bench.manager.lease(version(number))
    await turns()
    await use(bench, 3)
    assert bench.manager.is_ready(version(3))
    await bench.manager.close()


@pytest.mark.anyio
@bounded
async def test_a_load_that_no_alias_and_no_request_wants_is_cancelled(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.behaviour(version()).hold = asyncio.Event()  # never set
    lease = bench.manager.lease(version())
    await turns()
    bench.manager.abandon(version())
    assert lease.servable.status is Status.LOADING, "a request still waits for it"
    lease.release()
    await lease.servable.gone.wait()
    assert bench.behaviour(version()).closes == 1
    assert bench.ledger.accounted == 0
    assert [event.reason for event in bench.of(Unloaded)] == ["superseded"]
    bench.behaviour(version()).hold = None
    await use(bench, 1)
    bench.manager.abandon(version())
    assert bench.manager.is_ready(version()), "what is loaded stays"


@pytest.mark.anyio
@bounded
async def test_a_request_that_comes_later_wants_an_abandoned_load_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    hold = bench.behaviour(version()).hold = asyncio.Event()
    first = bench.manager.lease(version())
    await turns()
    bench.manager.abandon(version())
    second = bench.manager.lease(version())
    first.release()
    second.release()
    hold.set()
    await turns()
    assert bench.manager.is_ready(version())


@pytest.mark.anyio
@bounded
async def test_a_load_that_is_given_up_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    lease = bench.manager.lease(version())
    waiting = asyncio.create_task(bench.manager.ready(lease))
    bench.manager.retire(version(), "unloaded")
    with pytest.raises(Problem, match="the next request loads it"):
        await waiting
    await lease.servable.gone.wait()
    assert list(bench.manager) == []
    bench.ledger.check()


@pytest.mark.anyio
@bounded
async def test_a_busy_model_drains_for_one_that_waits_and_comes_back(tmp_path: Path) -> None:
    """Memory for one model, and two models that get requests all the time: both answer."""

    bench = Bench(tmp_path, limit=15 * MB)
    first = bench.manager.lease(version(1))
    await bench.manager.ready(first)
    other = asyncio.create_task(use(bench, 2))
    await turns()
    assert not other.done()
    bench.clock.now += bench.ledger.shortest_turn
    bench.manager.lease(version(1)).release()  # what comes now still finds it, and shows that time passed
    await turns()
    assert first.servable.status is Status.DRAINING
    again = asyncio.create_task(use(bench, 1))
    await turns()
    first.release()
    await other
    await again
    assert bench.behaviour(version(1)).starts == 2
    gone = bench.manager.eviction(version(1))
    assert gone is not None
    assert gone.why.startswith("it was busy for")
    bench.ledger.check()


@pytest.mark.anyio
@bounded
async def test_a_pinning_lease_keeps_a_busy_model_from_draining(tmp_path: Path) -> None:
    """Promise 2: what serves while its replacement loads."""

    bench = Bench(tmp_path, limit=15 * MB, capacity_wait=0.01)
    held = bench.manager.lease(version(1), pin=True)
    await bench.manager.ready(held)
    bench.clock.now += 1000
    with pytest.raises(Problem, match="everything loaded is in use"):
        await use(bench, 2)
    assert held.servable.status is Status.READY
    held.release()
    await use(bench, 2)


@pytest.mark.anyio
@bounded
async def test_an_eviction_says_for_whom_and_why(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limit=15 * MB)
    await use(bench, 1)
    await use(bench, 2)
    eviction = bench.manager.eviction(version(1))
    assert eviction is not None
    assert bench.manager.eviction(version(2)) is None
    assert (eviction.version, eviction.asking) == (version(1), "iris/2")
    assert "least valuable of 1 idle" in eviction.why
    await turns()
    (event,) = bench.of(Unloaded)
    assert event.why.startswith("for iris/2: least valuable")


@pytest.mark.anyio
@bounded
async def test_a_load_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.serving.manager.STOP_GRACE", 0.01)

    bench = Bench(tmp_path)
    bench.behaviour(version()).hold = asyncio.Event()  # never set
    lease = bench.manager.lease(version())
    waiting = asyncio.create_task(bench.manager.ready(lease, 3600))
    await turns()
    bench.manager.stop_loading()
    with pytest.raises(Problem) as caught:
        await waiting
    assert (caught.value.code, caught.value.retry_after) == ("SHUTTING_DOWN", 1)
    lease.release()
    await bench.manager.close()


@pytest.mark.anyio
@bounded
async def test_a_hot_model_has_a_spare_process_where_there_is_room_and_gives_it_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limit=45 * MB)
    lease = bench.manager.lease(version())
    servable = await bench.manager.ready(lease)
    runner = servable.runner
    assert runner is not None
    runner.spare = False  # type: ignore[misc]
    bench.manager.tend()
    assert not runner.spare, "it is not hot"
    for _ in range(1000):
        servable.recent.answered(0.001)
    bench.manager.tend()
    assert runner.spare
    assert bench.ledger.accounted == 20 * MB
    lease.release()
    lease = bench.manager.lease(version(2))
    bench.behaviour(version(2)).size = 30 * MB
    runner.measured_bytes = 10 * MB  # type: ignore[misc]
    await bench.manager.ready(lease)
    assert not runner.spare
    assert bench.manager.is_ready(version()), "the spare went, the model stayed"
    bench.manager.tend()
    assert not runner.spare, "there is no room for two more"
    assert bench.behaviour(version()).tended == 3
    bench.ledger.check()


@pytest.mark.anyio
@bounded
async def test_a_model_that_is_stuck_is_counted(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await use(bench, 1)
    assert bench.manager.stuck() == {"iris": 0}
    servable = bench.manager.find(version())
    assert servable is not None
    assert servable.runner is not None
    servable.runner.stuck = "process 7: stopped"  # type: ignore[misc]
    assert bench.manager.stuck() == {"iris": 1}
