"""Models that share a process: what one of them does costs the others nothing but a moment."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.runners import memory
from gateway.runners import packs as packs_module
from gateway.runners.base import ModelError, RunnerCrashed, RunnerTimeout
from gateway.runners.confinement import Confinement
from gateway.runners.environments import Environment
from gateway.runners.packed import PROOF_ANSWERS, Record
from gateway.runners.places import LEAST, RESTLESS
from loaders.batch import Tensors
from loaders.worker import wire
from tests.support.hostile import write_package
from tests.support.packs import HELD, PackBench, answered_by, given, pid, rows, scaled
from tests.support.processes import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")


@pytest.mark.anyio
async def test_each_caller_gets_the_answer_to_its_own_rows(tmp_path: Path, bench: PackBench) -> None:
    runners = [await bench.started(scaled(tmp_path / str(i), i)) for i in range(6)]
    assert len({pid(runner) for runner in runners}) == 1
    large = np.arange(60_000.0)  # read elsewhere than on the loop: it must not be overtaken

    async def call(i: int, n: int) -> None:
        asked = Tensors({"": large + n}, len(large)) if n % 10 == 0 else rows(n, n + 0.5)
        answer = await runners[i].predict(asked, {})
        assert given(answer) == (asked.arrays[""] * i).tolist()

    await asyncio.gather(*(call(i, n) for n in range(20) for i in range(6)))
    assert bench.observed == []


@pytest.mark.anyio
async def test_what_a_model_says_it_takes_is_never_more_than_its_process_has(
    tmp_path: Path, bench: PackBench
) -> None:
    facts = {"op": "loaded", "merges": False, "known": {}, "prewarms": "", "confinement": {}, "grown": 10**15}
    frame = b"".join(map(bytes, wire.encode(facts)))
    package = write_package(
        tmp_path / "p",
        at_load=f"""
            import stat, time
            for fd in range(3, 50):
                try:
                    if stat.S_ISSOCK(os.fstat(fd).st_mode):
                        os.write(fd, {frame!r})
                except OSError:
                    pass
            time.sleep(600)
        """,
    )
    runner = await bench.started(package)
    assert runner.isolation == "pack"
    assert runner.measured_bytes is not None
    assert runner.measured_bytes < 10**10
    bench.pack.processes[0].worker.kill(RunnerCrashed("the test has ended"))


@pytest.mark.anyio
async def test_the_load_of_a_small_model_does_not_measure_the_whole_process(
    tmp_path: Path, bench: PackBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.started(scaled(tmp_path / "first", 2))
    (process,) = bench.pack.processes
    monkeypatch.setattr(process.worker, "memory", lambda: pytest.fail("it read the memory of the process"))
    runner = await bench.started(scaled(tmp_path / "second", 3))
    assert runner.measured_bytes == LEAST
    monkeypatch.undo()


@pytest.mark.anyio
async def test_a_call_of_many_objects_is_not_encoded_by_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    runner = await bench.started(write_package(tmp_path / "p"))
    encoders: list[bool] = []
    encode = wire.encode

    def encoded(message: Any, *args: Any, **options: Any) -> Any:
        encoders.append(threading.current_thread() is threading.main_thread())
        return encode(message, *args, **options)

    monkeypatch.setattr(wire, "encode", encoded)
    many, one = [Tensors({"": np.array(["x"] * rows, dtype=object)}, rows) for rows in (20_001, 1)]
    for asked, on_loop in ((many, False), (one, True)):
        encoders.clear()
        assert (await runner.predict(asked, {})).rows == asked.rows
        assert encoders == [on_loop]


@pytest.mark.anyio
async def test_a_killed_process_fails_only_the_call_it_worked_on(tmp_path: Path, bench: PackBench) -> None:
    held = write_package(tmp_path / "held", at_predict=HELD)
    begun, go = tmp_path / "begun", tmp_path / "go"
    one, two, three = [
        await bench.started(p) for p in (held, scaled(tmp_path / "2", 2), scaled(tmp_path / "3", 3))
    ]
    await answered_by(three, 1.0)
    params = {"begun": str(begun), "go": str(go)}
    stuck = asyncio.ensure_future(one.predict(rows(13), params))
    await until(begun.exists)
    waiting = [asyncio.ensure_future(two.predict(rows(n), {})) for n in range(5)]
    waiting.append(asyncio.ensure_future(one.predict(rows(1), {})))
    await asyncio.sleep(0)
    before = pid(two)
    os.kill(before, signal.SIGKILL)
    with pytest.raises(RunnerCrashed) as crashed:
        await stuck
    assert crashed.value.outside
    assert [given(answer) for answer in await asyncio.gather(*waiting)] == [[0], [2], [4], [6], [8], [1]]
    assert pid(two) != before
    # A model without calls is loaded again at its next request.
    assert await answered_by(three, 1.0) == [3]
    assert pid(three) == pid(two)
    # The suspect runs alone until it is proved.
    assert one.isolation == "process"
    assert "killed by SIGKILL" in one.placement
    assert pid(one) != pid(two)
    assert [what for what, _ in bench.observed] == ["crashed"]
    one._back_at = 0.0
    one.tend()
    assert one._moving is None, "it was not proved yet"
    for _ in range(20):
        assert await answered_by(one, 1) == [1]
    one.tend()
    await until(lambda: one.isolation == "pack")
    assert await answered_by(one, 5) == [5]
    assert pid(one) == pid(two)


@pytest.mark.anyio
async def test_what_ended_two_packs_stays_alone(tmp_path: Path, bench: PackBench) -> None:
    package = write_package(tmp_path / "p", at_predict="if data[0] == 13: os._exit(3)")
    record = Record()
    for _ in range(2):
        runner = await bench.started(package, record=record)
        assert runner.isolation == "pack"
        with pytest.raises(RunnerCrashed):
            await answered_by(runner, 13)
        await runner.close()
    runner = await bench.started(package, record=record)
    assert runner.isolation == "process"
    assert "not for the first time" in runner.placement


@pytest.mark.anyio
async def test_packs_that_end_again_and_again_give_way_to_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    monkeypatch.setattr(packs_module, "ENDS", 2)
    runner = await bench.started(scaled(tmp_path / "p", 2))
    for _ in range(2):
        await answered_by(runner, 1)
        process = bench.pack._process
        assert process is not None
        os.kill(pid(runner), signal.SIGKILL)
        await until(lambda process=process: process.left)
    assert await answered_by(runner, 1) == [2]
    assert runner.isolation == "process"
    assert "ended 2 times" in runner.placement


@pytest.mark.anyio
async def test_a_call_that_holds_the_others_is_left_behind_and_still_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    monkeypatch.setattr(packs_module, "HOLD", 0.0)
    begun, go = tmp_path / "begun", tmp_path / "go"
    held = write_package(tmp_path / "held", at_predict=HELD)
    slow, other = await bench.started(held), await bench.started(scaled(tmp_path / "2", 2))
    call = asyncio.ensure_future(slow.predict(rows(13), {"begun": str(begun), "go": str(go)}))
    await until(begun.exists)
    waiting = asyncio.ensure_future(other.predict(rows(4), {}))
    await asyncio.sleep(0)
    bench.packs.tend()
    assert given(await waiting) == [8]
    assert not call.done()
    go.touch()
    assert given(await call) == [13]
    await until(lambda: slow.isolation == "process")
    assert "blocked the other models" in slow.placement
    assert bench.pack.refuses() is None
    assert [what for what, _ in bench.observed if what != "moved"] == []


@pytest.mark.anyio
@pytest.mark.parametrize("waits", ["a call", "a load"])
async def test_a_load_that_holds_the_others_is_ended_and_goes_on_alone(
    waits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    monkeypatch.setattr(packs_module, "HOLD" if waits == "a call" else "LOAD_HOLD", 0.0)
    begun, go = tmp_path / "begun", tmp_path / "go"
    held = write_package(
        tmp_path / "held",
        at_load=f"""
            import time
            open({str(begun)!r}, "w").close()
            while not os.path.exists({str(go)!r}):
                time.sleep(0.002)
        """,
    )
    other = bench.runner(scaled(tmp_path / "2", 2))
    if waits == "a call":
        await other.start()
    slow = bench.runner(held)
    loading = asyncio.ensure_future(slow.start())
    await until(begun.exists)
    waiting = asyncio.ensure_future(answered_by(other, 4))
    await until(lambda: bench.pack.processes[0].worker.waiting or bench.pack._taking_in == 2)
    bench.packs.tend()
    assert await asyncio.wait_for(waiting, 60) == [8]
    assert other.isolation == "pack"
    assert not loading.done()
    go.touch()
    await loading
    assert await answered_by(slow, 5) == [5]
    assert slow.isolation == "process"
    assert "its load blocked the other models" in slow.placement
    assert bench.pack.refuses() is None


@pytest.mark.anyio
async def test_a_timeout_is_the_affair_of_its_model_alone(tmp_path: Path, bench: PackBench) -> None:
    held = write_package(tmp_path / "held", at_predict=HELD)
    slow = await bench.started(held, timeout=4.0)
    other = await bench.started(scaled(tmp_path / "2", 2), timeout=120.0)
    params = {"begun": str(tmp_path / "begun"), "go": str(tmp_path / "never")}
    call = asyncio.ensure_future(slow.predict(rows(13), params))
    await until((tmp_path / "begun").exists)
    waiting = asyncio.ensure_future(other.predict(rows(4), {}))
    with pytest.raises(RunnerTimeout):
        await call
    assert given(await waiting) == [8]
    assert other.isolation == "pack"
    assert await answered_by(slow, 1) == [1]
    assert slow.isolation == "process"


@pytest.mark.anyio
async def test_a_model_that_cannot_be_loaded_is_tried_alone_and_says_why(
    tmp_path: Path, bench: PackBench
) -> None:
    refusing = write_package(tmp_path / "r", at_load="raise ValueError('no weights')")
    ending = write_package(tmp_path / "e", at_load="os._exit(3)")
    good = await bench.started(scaled(tmp_path / "2", 2))
    with pytest.raises(ModelError, match="ValueError: no weights"):
        await bench.started(refusing)
    with pytest.raises(RunnerCrashed, match="exited with code 3"):
        await bench.started(ending)
    assert await answered_by(good, 1) == [2]
    assert good.isolation == "pack"


@pytest.mark.parametrize(
    "other",
    [
        {"group": "of another team"},
        {"threads": 2},
        {"variables": (("TOKEN", "secret"),)},
        {"confinement": Confinement(filesystem=False, user="same", network=False)},
        {"confinement": Confinement(filesystem=False, user="same", readable=("/srv",))},
        {"environment": Environment(preload=("numpy", "pandas"))},
    ],
    ids=str,
)
@pytest.mark.anyio
async def test_models_under_different_conditions_never_share_a_process(
    tmp_path: Path, other: dict[str, Any], bench: PackBench
) -> None:
    first = await bench.started(scaled(tmp_path / "1", 1))
    second = await bench.started(scaled(tmp_path / "2", 2), **other)
    assert pid(first) != pid(second)


@pytest.mark.anyio
async def test_unloading_returns_the_memory(tmp_path: Path, bench: PackBench) -> None:
    """The same in small as the cycles of `bench/bench_packs.py`."""
    package = write_package(
        tmp_path / "p", at_load="import numpy as np; global kept; kept = np.ones(20 << 17)"
    )
    await bench.started(scaled(tmp_path / "2", 2))
    process = bench.pack._process
    assert process is not None
    sizes = []
    for _ in range(15):
        runner = await bench.started(package)
        assert runner.measured_bytes is not None
        assert 20e6 < runner.measured_bytes < 24e6
        await runner.close()
        sizes.append(process.worker.memory().private)
    assert sizes[-1] < sizes[2] * 1.05
    bench.packs.tend()
    assert bench.packs.overhead + process.models >= 0.98 * process.worker.memory().private


@pytest.mark.anyio
async def test_small_models_that_leave_are_not_waste(tmp_path: Path, bench: PackBench) -> None:
    """Each counts with more bytes than it takes; the difference is nothing that unloading left."""
    await bench.started(scaled(tmp_path / "stays", 1))
    runners = [await bench.started(scaled(tmp_path / str(i), 1)) for i in range(30)]
    process = bench.pack._process
    assert process is not None
    bench.packs.tend()
    for runner in runners:
        await runner.close()
    bench.packs.tend()
    assert process.waste < 10 * LEAST


@pytest.mark.anyio
async def test_a_model_that_comes_or_goes_is_not_waste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    monkeypatch.setattr(memory, "RECENT", -1.0)  # each reading is a new one
    large = "import numpy as np; global kept; kept = np.ones(40 << 17)"
    await bench.started(scaled(tmp_path / "stays", 1))
    await (await bench.started(scaled(tmp_path / "left", 1))).close()
    process = bench.pack._process
    assert process is not None
    bench.packs.tend()
    hold = tmp_path / "hold"
    waits = f"""
import time
{large}
open({str(hold)!r}, "w").close()
while os.path.exists({str(hold)!r}):
    time.sleep(0.002)
"""
    coming = asyncio.ensure_future(bench.started(write_package(tmp_path / "large", at_load=waits)))
    await until(hold.exists)
    bench.packs.tend()
    hold.unlink()
    runner = await coming
    assert process.private > 40e6
    assert process.waste < 16 << 20
    bench.packs.tend()
    going = asyncio.ensure_future(runner.close())
    await until(lambda: len(process.places) == 1)
    bench.packs.tend()  # its memory is not free yet, or was not when it was last read
    await going
    assert process.waste < 16 << 20
    bench.packs.tend()
    assert process.waste < 16 << 20
    assert bench.pack._process is process


@pytest.mark.anyio
async def test_what_is_left_behind_is_seen_although_models_come_and_go_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    monkeypatch.setattr(memory, "RECENT", -1.0)  # each reading is a new one
    kept = "import builtins, numpy as np; builtins.kept = np.ones(5 << 20)"
    hold = tmp_path / "hold"
    waits = f"""
import time
open({str(hold)!r}, "w").close()
while os.path.exists({str(hold)!r}):
    time.sleep(0.002)
"""
    await bench.started(scaled(tmp_path / "stays", 1))
    process = bench.pack._process
    assert process is not None
    bench.packs.tend()
    leaves = await bench.started(write_package(tmp_path / "leak", at_load=kept))
    going = asyncio.ensure_future(leaves.close())
    coming = asyncio.ensure_future(bench.started(write_package(tmp_path / "waits", at_load=waits)))
    await until(hold.exists)
    await going
    for _ in range(RESTLESS - 1):
        bench.packs.tend()
        assert process.waste == 0, "it may belong to the model that comes"
    bench.packs.tend()
    assert process.waste > 16 << 20
    hold.unlink()
    await coming
    await until(lambda: bench.pack._process is not process)


@pytest.mark.anyio
async def test_what_is_left_behind_has_the_pack_made_again_without_a_failed_call(
    tmp_path: Path, bench: PackBench
) -> None:
    leaking = write_package(
        tmp_path / "leak",
        at_load="import builtins, numpy as np; builtins.kept = np.ones(5 << 20)",
    )
    stays = await bench.started(scaled(tmp_path / "2", 2))
    bench.packs.tend()
    before = pid(stays)
    asked = 0

    async def keep_asking() -> None:
        nonlocal asked
        while pid(stays) == before:
            assert await answered_by(stays, asked) == [2 * asked]
            asked += 1

    asking = asyncio.ensure_future(keep_asking())
    leaves = await bench.started(leaking)
    await leaves.close()
    bench.packs.tend()
    await asking
    await until(lambda: len(bench.pack.processes) == 1)
    assert asked
    assert await answered_by(stays, 1) == [2]
    assert stays.isolation == "pack"
    await until(lambda: not Path(f"/proc/{before}").exists())
    assert bench.observed == []


@pytest.mark.anyio
async def test_a_hot_model_moves_out_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: PackBench
) -> None:
    monkeypatch.setattr(packs_module, "HOT_TICKS", 2)
    hot, other = (
        await bench.started(scaled(tmp_path / "1", 1)),
        await bench.started(scaled(tmp_path / "2", 2)),
    )
    for _ in range(2):
        await answered_by(hot, 1)
        await answered_by(other, 1)
        assert hot._place is not None
        hot._place.seconds = 0.9  # of the last second
        bench.packs.tend()
    await until(lambda: hot.isolation == "process")
    assert "it is hot" in hot.placement
    assert await answered_by(hot, 3) == [3]
    assert other.isolation == "pack"
    hot.tend()
    assert hot.isolation == "process", "it has not been alone for long enough"
    for _ in range(PROOF_ANSWERS):
        await answered_by(hot, 3)
    hot._back_at = 0.0  # as if the time had passed
    hot.tend()
    await until(lambda: hot.isolation == "pack")
    assert await answered_by(hot, 3) == [3]
    assert pid(hot) == pid(other)


@pytest.mark.anyio
async def test_an_empty_pack_ends_at_once_if_others_need_the_memory(tmp_path: Path, bench: PackBench) -> None:
    runner = await bench.started(scaled(tmp_path / "1", 1))
    process = pid(runner)
    bench.packs.end_empty()
    assert await answered_by(runner, 1) == [1]
    assert pid(runner) == process, "it is not empty"
    await runner.close()
    bench.packs.end_empty()
    await until(lambda: not Path(f"/proc/{process}").exists())


@pytest.mark.anyio
async def test_an_empty_pack_ends(tmp_path: Path, bench: PackBench) -> None:
    bench.packs.idle = 0.0
    runner = await bench.started(scaled(tmp_path / "1", 1))
    ended = pid(runner)
    await runner.close()
    bench.packs.tend()
    bench.packs.tend()
    await until(lambda: not Path(f"/proc/{ended}").exists())
    again = await bench.started(scaled(tmp_path / "2", 2))
    assert await answered_by(again, 1) == [2]
