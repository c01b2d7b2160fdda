"""Temporary files of model processes: measured on the disk, and limited."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

import gateway
from gateway.runners.base import RunnerCrashed
from gateway.runners.child import Child
from gateway.runners.confinement import Confinement
from gateway.runners.files import used
from loaders.worker import temporary
from tests.support.hostile import eventually, write_package
from tests.support.processes import ONE, Processes, run
from tests.support.served import Served, settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")

MB = 1 << 20
LIMIT = 20 * MB
ONE_FILE = "open('big', 'wb').write(bytes(30 << 20))"
MANY = "for n in range(30): open(f'part-{n}', 'wb').write(bytes(1 << 20))"
EMPTY = "for n in range(6000): open(f'empty-{n}', 'wb').close()"
NESTED = """
for n in range(1500):
    os.mkdir('d'); os.chdir('d')
open('big', 'wb').write(bytes(30 << 20))
"""
CLOSED = """
os.mkdir('closed'); open('closed/big', 'wb').write(bytes(30 << 20)); os.chmod('closed', 0)
"""
DELETED = """
global KEPT
KEPT = open('gone', 'wb')
os.unlink('gone')
KEPT.write(bytes(30 << 20)); KEPT.flush()
"""
OF_A_CHILD = """
import subprocess
code = '\\n'.join([
    "import os, time", "kept = open('gone', 'wb')", "os.unlink('gone')", "kept.write(bytes(30 << 20))",
    "kept.flush()", "print(1, flush=True)", "time.sleep(1000)",
])
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
"""


def test_a_directory_is_measured_however_deep_and_closed(tmp_path: Path) -> None:
    assert temporary.used(str(tmp_path / "none"), MB) == 0
    (tmp_path / "file").write_bytes(bytes(10 * 4096))
    os.link(tmp_path / "file", tmp_path / "again")
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 40)
    (tmp_path / "link").symlink_to("/usr")
    for name in ("one", "two"):
        place = tmp_path / name
        place.mkdir()
        (place / "file").write_bytes(bytes(4096))
    measured = temporary.used(str(tmp_path), MB)
    # The file once, and a block for each of: the sparse file, the link, two directories, two files.
    assert 16 * 4096 <= measured <= 18 * 4096
    assert temporary.used(str(tmp_path), 4096) < measured, "it need not count to the end"


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(ONE_FILE, id="one file"),
        pytest.param(MANY, id="many files"),
        pytest.param(EMPTY, id="empty files"),
        pytest.param(NESTED, id="nested"),
        pytest.param(CLOSED, id="closed"),
        pytest.param(DELETED, id="deleted"),
        pytest.param(OF_A_CHILD, id="deleted by a child"),
    ],
)
def test_a_model_that_fills_the_disk_is_ended_alone(tmp_path: Path, lines: str) -> None:
    if "unlink" in lines and os.geteuid() != 0:
        pytest.skip("only root sees what another process holds open")
    package = write_package(tmp_path / "p", at_predict=f"{lines}\nimport time; time.sleep(1000)")

    async def work(h: Processes) -> None:
        runner = await h.started(package, confinement=Confinement(disk=LIMIT))
        other = await h.started(write_package(tmp_path / "q"), confinement=Confinement(disk=LIMIT))
        call = asyncio.ensure_future(runner.predict(ONE, {}))
        while not call.done():
            runner.tend()
            other.tend()
            await other.predict(ONE, {})
            await asyncio.sleep(0.01)
        with pytest.raises(
            RunnerCrashed, match=r"temporary files take more than 20971520 bytes, its limit \(disk\)"
        ):
            await call
        assert other.status()["processes"][0]["temporary_bytes"] < MB

    run(tmp_path / "tmp", work)


def test_a_model_below_its_limit_goes_on(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p", at_predict="open('some', 'wb').write(bytes(10 << 20))")

    async def work(h: Processes) -> None:
        runner = await h.started(package, confinement=Confinement(disk=LIMIT))
        seen: Callable[[], int] = lambda: runner.status()["processes"][0]["temporary_bytes"]  # noqa: E731
        for _ in range(3):
            await runner.predict(ONE, {})
        while seen() < 10 * MB:
            runner.tend()
            await asyncio.sleep(0.01)
        await runner.predict(ONE, {})
        assert not h.observed

    run(tmp_path / "tmp", work)


def test_files_of_a_process_without_calls_are_measured_more_rarely(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p")

    async def work(h: Processes) -> None:
        measured: list[Future[int]] = []
        measure = h.zygotes.measure

        def counted(child: Child, enough: int) -> Future[int]:
            measured.append(measure(child, enough))
            return measured[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(h.zygotes, "measure", counted)
            runner = await h.started(package, confinement=Confinement(disk=LIMIT))

            async def looks(calls: int) -> int:
                measured.clear()
                for _ in range(20):
                    for _ in range(calls):
                        await runner.predict(ONE, {})
                    runner.tend()
                    await asyncio.gather(*map(asyncio.wrap_future, measured))
                return len(measured)

            assert await looks(1) == 20
            assert await looks(0) == 5

    run(tmp_path / "tmp", work)


def test_the_operator_sees_why_it_was_ended(tmp_path: Path) -> None:
    write_package(tmp_path / "fills", at_load="pass", at_predict=f"{ONE_FILE}")
    registry = str(tmp_path / "registry.yaml")
    gateway.push(tmp_path / "fills", name="fills", alias="champion", registry=registry)
    chosen = settings(tmp_path, isolation="process", models={"fills": {"disk": "20MiB", "warm_up": False}})
    with Served(chosen, registry) as server:
        assert server.post("/predict/fills", {"inputs": [1.0]}).status == 200

        def said() -> str:
            return str((server.get("/models/fills/versions/1").json["last_error"] or {}).get("kind"))

        assert eventually(lambda: "temporary files take more than 20971520 bytes" in said())
        assert 'gateway_crashes_total{model="fills"} 1.0' in server.get("/metrics").body.decode()


def test_what_is_measured_of_a_process_that_is_gone(tmp_path: Path) -> None:
    assert used(2**22 + 1, str(tmp_path / "gone"), MB) == 0
