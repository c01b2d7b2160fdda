"""A model in processes: answers, errors, timeouts, output, the end."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from gateway.pools import LARGE_THREAD
from gateway.runners.base import ModelError, NoProcess, RunnerCrashed, RunnerTimeout
from gateway.runners.confinement import Confinement
from gateway.runners.output import Output
from gateway.runners.restarts import Policy
from gateway.runners.worker import Worker
from loaders.batch import Batch, Columns, Opaque, Tensors, Value
from loaders.worker import wire
from tests.support.hostile import alive, write_package
from tests.support.processes import ONE, Processes, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")

OUR_NAMES = ("gateway/__init__.py", "loaders/__init__.py", "loaders/batch.py", "wire.py")


# ---- answers


@pytest.mark.anyio
async def test_it_answers_every_kind_of_batch(
    tmp_path: Path, start: Literal["fork", "spawn"], processes: Processes
) -> None:
    package = write_package(tmp_path / "p")
    runner = await processes.started(package)
    assert runner.slots == 1
    assert not runner.merges
    answer = await runner.predict(ONE, {})
    assert isinstance(answer, Tensors)
    np.testing.assert_array_equal(answer.arrays[""], ONE.arrays[""])
    assert (await runner.predict(Value(["a", b"b", None, {"c": [1]}], 4), {})).value == [
        "a",
        b"b",
        None,
        {"c": [1]},
    ]  # type: ignore[union-attr]
    table = Columns({"x": np.arange(3), "t": np.array(["a", None, "c"], dtype=object)}, 3)
    answer = await runner.predict(table, {})
    assert isinstance(answer, Columns)
    assert answer.arrays["x"].tolist() == [0, 1, 2]
    assert answer.arrays["t"].tolist() == ["a", None, "c"]
    status = runner.status()
    assert [p["pid"] for p in status["processes"]] == runner.pids
    assert status["confinement"]["new_privileges"] == "refused"


@pytest.mark.anyio
async def test_large_batches_go_both_ways(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p")
    runner = await processes.started(package)
    big = Tensors({"": np.random.default_rng(0).random((1000, 2000))}, 1000)
    answer = await runner.predict(big, {})
    assert isinstance(answer, Tensors)
    assert answer.arrays[""].tobytes() == big.arrays[""].tobytes()
    texts: Batch = Value([f"text {i}" for i in range(50_000)], 50_000)
    assert (await runner.predict(texts, {})).value == texts.value  # type: ignore[union-attr]


@pytest.mark.anyio
async def test_several_processes_answer_at_once(tmp_path: Path, processes: Processes) -> None:
    package = write_package(
        tmp_path / "p",
        at_predict="""
            import time
            open(os.path.join(params["meet"], str(os.getpid())), "w").close()
            while len(os.listdir(params["meet"])) < 2:
                time.sleep(0.001)
            return [os.getpid()]
        """,
    )
    meet = tmp_path / "meet"
    meet.mkdir()
    runner = await processes.started(
        package, processes=2, confinement=Confinement(filesystem=False, user="same")
    )
    assert runner.slots == 2
    answers = await asyncio.gather(*(runner.predict(ONE, {"meet": str(meet)}) for _ in range(2)))
    assert {a.value[0] for a in answers} == set(runner.pids)  # type: ignore[union-attr]


@pytest.mark.anyio
async def test_a_model_may_ship_packages_of_our_names(
    tmp_path: Path, start: Literal["fork", "spawn"], processes: Processes
) -> None:
    package = write_package(
        tmp_path / "p",
        at_import="import gateway, loaders, wire; from loaders import batch",
        at_predict="return [m.WHOSE for m in (gateway, loaders, wire, batch)]",
        extra=dict.fromkeys(OUR_NAMES, "WHOSE = 'mine'"),
    )
    runner = await processes.started(package)
    for _ in range(2):
        answer = await runner.predict(ONE, {})
        assert answer.value == ["mine"] * 4  # type: ignore[union-attr]


@pytest.mark.anyio
async def test_siblings_do_not_share_random_numbers(tmp_path: Path, processes: Processes) -> None:
    package = write_package(
        tmp_path / "p",
        at_predict="import random, numpy; return [random.random(), float(numpy.random.random())]",
    )
    runners = [await processes.started(package) for _ in range(2)]
    one, two = [(await r.predict(ONE, {})).value for r in runners]  # type: ignore[union-attr]
    assert one[0] != two[0]
    assert one[1] != two[1]


@pytest.mark.anyio
async def test_threads_are_the_models_share(
    tmp_path: Path, start: Literal["fork", "spawn"], processes: Processes
) -> None:
    package = write_package(
        tmp_path / "p", at_load="global N; N = os.environ['OMP_NUM_THREADS']", at_predict="return [N]"
    )
    for threads in (1, 2):
        runner = await processes.started(package, threads=threads)
        assert (await runner.predict(ONE, {})).value == [str(threads)]  # type: ignore[union-attr]


# ---- the model's errors


@pytest.mark.anyio
async def test_what_the_model_raises_is_its_error_and_it_goes_on(
    tmp_path: Path, start: Literal["fork", "spawn"], processes: Processes
) -> None:
    package = write_package(
        tmp_path / "p",
        at_predict="""
            if params.get("error") == "unprintable":
                class Odd(Exception):
                    def __str__(self): raise RuntimeError
                raise Odd
            if params.get("error") == "unsendable":
                return {"a": object()}
            if params.get("error") == "endless":
                endless = []
                endless.append(endless)
                return endless
            if params.get("error") == "treacherous":
                class Odd:
                    def tolist(self): raise SystemExit(4)
                return Odd()
            if params.get("error"):
                raise eval(params["error"])
        """,
    )
    runner = await processes.started(package)
    pids = runner.pids
    for error, text in {
        "ValueError('no such species')": "ValueError: no such species",
        "SystemExit(3)": "SystemExit: 3",
        "KeyboardInterrupt()": "KeyboardInterrupt",
        "GeneratorExit()": "GeneratorExit",
        "BaseException('x' * 9000)": "BaseException: xxx",
        "FileNotFoundError(__file__)": "FileNotFoundError: (package)/code/own_loader.py",
        "unprintable": "Odd: an exception that cannot be shown",
        "treacherous": "SystemExit: 4",
    }.items():
        with pytest.raises(ModelError) as caught:
            await runner.predict(ONE, {"error": error})
        assert text in str(caught.value)
        assert len(str(caught.value)) < 5000
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ModelError) as caught:
        await runner.predict(ONE, {"error": "ValueError('x')"})
    assert "own_loader.py" in caught.value.trace
    with pytest.raises(ModelError) as caught:
        await runner.predict(ONE, {"error": "endless"})
    assert caught.value.shown == "the value is nested too deeply, or holds itself"
    unsendable = await runner.predict(ONE, {"error": "unsendable"})
    assert isinstance(unsendable, Value)
    assert isinstance(unsendable.value["a"], Opaque)
    assert unsendable.value["a"].kind == "object"
    await runner.predict(ONE, {})
    assert runner.pids == pids
    assert processes.observed == []


@pytest.mark.anyio
async def test_an_input_that_cannot_be_sent_is_an_error_of_the_call(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(tmp_path / "p")
    runner = await processes.started(package)
    with pytest.raises(ModelError, match="cannot be sent") as caught:
        await runner.predict(Value(object()), {})
    assert caught.value.unsuitable  # the caller's fault, not the model's
    await runner.predict(ONE, {})


@pytest.mark.anyio
async def test_a_process_that_answers_without_a_call_is_ended(tmp_path: Path, processes: Processes) -> None:
    package = write_package(
        tmp_path / "p",
        at_predict="""
            import stat
            for fd in range(3, 50):
                try:
                    if stat.S_ISSOCK(os.fstat(fd).st_mode):
                        os.write(fd, b"GET / HTTP/1.1\\r\\n\\r\\n" * 10)
                except OSError:
                    pass
        """,
    )
    runner = await processes.started(package)
    with pytest.raises(RunnerCrashed, match="broke the protocol"):
        await runner.predict(ONE, {})


SENDS = """
    import stat
    for fd in range(3, 50):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.write(fd, {frame})
        except OSError:
            pass
    os._exit(0)
"""


@pytest.mark.anyio
async def test_an_answer_that_cannot_be_read_fails_its_call(tmp_path: Path, processes: Processes) -> None:
    frame = b"mgw1" + (16).to_bytes(4, "little") + bytes(8) + b"{" * 16
    runner = await processes.started(write_package(tmp_path / "p", at_predict=SENDS.format(frame=frame)))
    with pytest.raises(RunnerCrashed, match="broke the protocol"):
        await asyncio.wait_for(runner.predict(ONE, {}), 60)


@pytest.mark.anyio
async def test_a_message_of_no_kind_fails_its_call(tmp_path: Path, processes: Processes) -> None:
    """One small array, as most answers have, without saying that it is an answer. The process lives on."""
    frame = b"".join(wire.encode({"x": 1, "batch": Tensors({"": np.zeros(1)}, 1)}))
    lives_on = SENDS.format(frame=frame).replace("os._exit(0)", "import time; time.sleep(3600)")
    runner = await processes.started(write_package(tmp_path / "p", at_predict=lives_on))
    with pytest.raises(RunnerCrashed, match="broke the protocol"):
        await asyncio.wait_for(runner.predict(ONE, {}), 60)


@pytest.mark.anyio
async def test_facts_of_a_load_in_another_form_are_a_crash(tmp_path: Path, processes: Processes) -> None:
    frame = b"mgw1" + (16).to_bytes(4, "little") + bytes(8) + b'{"op":"loaded"} '
    package = write_package(tmp_path / "p", at_load=SENDS.format(frame=frame))
    with pytest.raises(RunnerCrashed, match="broke the protocol"):
        await processes.started(package)


@pytest.mark.parametrize("size", [400_000, 100_000])
@pytest.mark.anyio
async def test_a_large_last_answer_is_not_read_by_the_event_loop(
    size: int, tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = []
    decode = Worker._decode

    def decoded(self: Worker, frame: Any, header: int) -> dict[str, Any]:
        readers.append(threading.current_thread().name)
        return decode(self, frame, header)

    answer = b'{"op":"answer","batch":{"~":["value",null,1]}}'
    frame = f"b'mgw1' + ({size}).to_bytes(4, 'little') + bytes(8) + {answer!r}.ljust({size})"
    runner = await processes.started(write_package(tmp_path / "p", at_predict=SENDS.format(frame=frame)))
    (worker,) = runner._workers
    assert worker._sock is not None
    asyncio.get_running_loop().remove_reader(worker._sock)  # the end of the process is seen first
    monkeypatch.setattr(Worker, "_decode", decoded)
    assert (await asyncio.wait_for(runner.predict(ONE, {}), 60)).value == 1  # type: ignore[union-attr]
    assert len(readers) == 1
    assert readers[0].startswith(f"{LARGE_THREAD}-answers")  # a stop does not wait for it


# ---- waiting and giving up


@pytest.mark.anyio
async def test_a_caller_who_leaves_does_not_break_the_connection(
    tmp_path: Path, processes: Processes
) -> None:
    package = write_package(
        tmp_path / "p",
        at_predict="""
            import time
            while params.get("wait") and not os.path.exists(params["wait"]):
                time.sleep(0.001)
            return [params.get("n")]
        """,
    )
    flag = tmp_path / "flag"
    runner = await processes.started(package, confinement=Confinement(filesystem=False, user="same"))
    leaver = asyncio.ensure_future(runner.predict(ONE, {"n": 0, "wait": str(flag)}))
    queued = asyncio.ensure_future(runner.predict(ONE, {"n": 1}))
    others = [asyncio.ensure_future(runner.predict(ONE, {"n": i})) for i in range(2, 5)]
    await asyncio.sleep(0)
    leaver.cancel()
    queued.cancel()
    flag.touch()
    assert [(await other).value for other in others] == [[2], [3], [4]]  # type: ignore[union-attr]
    for left in (leaver, queued):
        with pytest.raises(asyncio.CancelledError):
            await left
    # Cancelled in the very turn in which it was given the process that its predecessor left.
    followers: list[asyncio.Task[Batch]] = []

    async def leader() -> None:
        await runner.predict(ONE, {"n": 5})
        followers[0].cancel()

    leading = asyncio.ensure_future(leader())
    followers.append(asyncio.ensure_future(runner.predict(ONE, {"n": 6})))
    await leading
    await asyncio.wait(followers)
    assert followers[0].cancelled()
    assert (await runner.predict(ONE, {"n": 99})).value == [99]  # type: ignore[union-attr]


@pytest.mark.anyio
async def test_the_operators_timeout_stops_the_model_and_starts_it_again(
    tmp_path: Path, start: Literal["fork", "spawn"], processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_predict="while params.get('hang'): pass")
    runner = await processes.started(package, timeout=4)
    pids = runner.pids
    with pytest.raises(RunnerTimeout, match=r"within 4 s"):
        await runner.predict(ONE, {"hang": True})
    await runner.predict(ONE, {})
    assert runner.pids != pids
    assert [what for what, _ in processes.observed] == ["timeout", "restarted"]
    assert not any(alive(pid) for pid in pids)


@pytest.mark.anyio
async def test_a_cancelled_call_is_still_under_the_timeout(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_predict="while params.get('hang'): pass")
    runner = await processes.started(package, timeout=4)
    call = asyncio.ensure_future(runner.predict(ONE, {"hang": True}))
    await asyncio.sleep(0)
    call.cancel()
    await runner.predict(ONE, {})
    assert processes.observed[0][0] == "timeout"


@pytest.mark.anyio
async def test_loading_has_its_own_timeout(
    tmp_path: Path, start: Literal["fork", "spawn"], processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_load="while True: pass")
    with pytest.raises(RunnerTimeout):
        await processes.started(package, load_timeout=0.5)


@pytest.mark.anyio
async def test_a_cancelled_start_leaves_nothing(
    tmp_path: Path, start: Literal["fork", "spawn"], processes: Processes
) -> None:
    package = write_package(tmp_path / "p", at_load="print('loading'); \nwhile True: pass")
    for moment in ("at once", "while it loads"):
        starting = asyncio.ensure_future(processes.runner(package).start())
        if moment == "at once":
            await asyncio.sleep(0)
        else:
            await until(lambda: processes.lines)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting


# ---- output


@pytest.mark.anyio
async def test_what_the_model_prints_comes_out_under_its_name(
    tmp_path: Path, start: Literal["fork", "spawn"], processes: Processes
) -> None:
    package = write_package(
        tmp_path / "p",
        at_import="print('importing')",
        at_load="sys.stderr.write('loading\\n')",
        at_predict="print('predicting'); os.system('echo from a child'); print('the end', end='')",
    )
    runner = await processes.started(package)
    await runner.predict(ONE, {})
    await runner.close()
    processes.runners.clear()
    assert processes.lines == ["importing", "loading", "predicting", "from a child", "the end"]


@pytest.mark.anyio
async def test_a_megabyte_of_output_neither_blocks_nor_floods(tmp_path: Path, processes: Processes) -> None:
    package = write_package(
        tmp_path / "p",
        at_predict="""
            if params.get("at_once"):
                print("x" * (1 << 20))
            else:
                for i in range(200_000):
                    print("line", i)
        """,
    )
    runner = await processes.started(package)
    await asyncio.wait_for(runner.predict(ONE, {"at_once": True}), 30)
    await asyncio.wait_for(runner.predict(ONE, {}), 30)
    await runner.close()
    processes.runners.clear()
    assert sum(map(len, processes.lines)) < 200_000
    assert any("bytes of output were left out" in line for line in processes.lines)
    assert "line 0" in processes.lines


# ---- the end


@pytest.mark.anyio
async def test_stop_ends_all_processes_with_a_reason(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_predict="while params.get('hang'): pass")
    runner = await processes.started(package, processes=2)
    calls = [asyncio.ensure_future(runner.predict(ONE, {"hang": True})) for _ in range(2)]
    await asyncio.sleep(0)
    runner.stop("memory is short")
    for call in calls:
        with pytest.raises(RunnerCrashed, match="memory is short"):
            await call
    await runner.predict(ONE, {})


@pytest.mark.anyio
async def test_close_ends_a_hanging_process_within_its_bound(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_predict="import time; time.sleep(1000)")
    runners = [await processes.started(package) for _ in range(12)]
    calls = [asyncio.ensure_future(r.predict(ONE, {})) for r in runners]
    await asyncio.sleep(0)
    pids = [pid for r in runners for pid in r.pids]
    before = asyncio.get_running_loop().time()
    await asyncio.gather(*(r.close() for r in runners))
    processes.runners.clear()
    # All at once, after a grace of two seconds; one after the other would take 24.
    assert asyncio.get_running_loop().time() - before < 20
    assert not any(alive(pid) for pid in pids)
    for call in calls:
        with pytest.raises(RunnerCrashed, match="unloaded"):
            await call
    with pytest.raises(NoProcess, match="unloaded"):
        await runners[0].predict(ONE, {})


@pytest.mark.anyio
async def test_a_close_that_is_cancelled_leaves_no_process(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_predict="import time; time.sleep(1000)")
    runner = await processes.started(package)
    call = asyncio.ensure_future(runner.predict(ONE, {}))
    await asyncio.sleep(0)
    (pid,) = runner.pids
    closing = asyncio.ensure_future(runner.close())
    for _ in range(3):  # it waits for the process to end by itself
        await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    processes.runners.clear()
    await until(lambda: not alive(pid))
    with pytest.raises(RunnerCrashed, match="unloaded"):
        await call


@pytest.mark.anyio
async def test_close_lets_a_model_say_goodbye(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_import="import atexit; atexit.register(print, 'goodbye')")
    runner = await processes.started(package)
    await runner.close()
    processes.runners.clear()
    assert processes.lines == ["goodbye"]


@pytest.mark.anyio
async def test_close_while_a_restart_waits(tmp_path: Path, processes: Processes) -> None:
    package = write_package(tmp_path / "p", at_predict="os._exit(1)")
    runner = await processes.started(package, restarts=Policy(base=60, crashes=10))
    for _ in range(2):
        with pytest.raises(RunnerCrashed):
            await runner.predict(ONE, {})
    await runner.close()
    processes.runners.clear()


@pytest.mark.parametrize("printed", [b"y\n" * 32768, b"\n" * 65536, b"some words in a line\n" * 3000])
@pytest.mark.anyio
async def test_output_in_short_lines_is_bounded_by_lines_too(printed: bytes) -> None:
    """Each line becomes a record of the log: it costs more than its bytes."""
    lines: list[str] = []
    output = Output(lines.append)
    for _ in range(20):
        for at in range(0, len(printed), 4096):
            os.write(output.write_end, printed[at : at + 4096])
            await asyncio.sleep(0)
        assert len(output._line) <= 100
    output.close()
    assert len(lines) < 1_000
    assert lines == [""] * len(lines) or "bytes of output were left out" in lines[-1]
