"""Threads: large bodies and answers have one of their own, and nothing else waits for it."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from gateway import pools
from gateway.app import Gateway
from gateway.http import answers
from gateway.registries import open_registry
from loaders.batch import Batch, Tensors
from tests.support.served import settings

LARGE = Tensors({"": np.zeros(100_000)}, None)


async def made(directory: Path) -> Gateway:
    (directory / "registry.yaml").write_text("version: 1\nmodels: {}\n")
    gateway = Gateway(settings(directory), open_registry(str(directory / "registry.yaml")))
    await gateway.start()
    return gateway


async def begun(monkeypatch: pytest.MonkeyPatch, end: threading.Event) -> asyncio.Task[list[bytes]]:
    """The encoding of a large answer, which has begun and lasts until `end`."""
    loop, began = asyncio.get_running_loop(), asyncio.Event()

    def encode(batch: Batch, limit: int) -> list[bytes]:
        loop.call_soon_threadsafe(began.set)
        end.wait()
        return [b"[]"]

    monkeypatch.setattr(answers, "encode_large", encode)
    task = asyncio.create_task(answers.encode_apart(LARGE, 1 << 30))
    await began.wait()
    return task


@pytest.mark.anyio
async def test_other_work_does_not_wait_for_a_large_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, end = await made(tmp_path), threading.Event()
    try:
        encoding = await begun(monkeypatch, end)
        async with asyncio.timeout(60):
            await gateway.usage.look()  # reads the kernel's figures in a thread
        assert not encoding.done()
        end.set()
        assert await encoding == [b"[]"]
    finally:
        end.set()
        await gateway.stop()


@pytest.mark.anyio
async def test_a_gateway_that_ends_takes_no_thread_from_another_one_in_its_process() -> None:
    """They run on loops in threads of their own, which take turns often here."""
    ended = threading.Event()

    def ends() -> None:
        while not ended.is_set():
            pools._LARGE.close()

    other, before = threading.Thread(target=ends), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    other.start()
    try:
        for number in range(3000):
            assert await pools.in_large_thread(lambda number=number: number) == number
    finally:
        ended.set()
        other.join()
        sys.setswitchinterval(before)


def test_a_stop_does_not_wait_for_a_large_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    async def serve() -> None:
        gateway = await made(tmp_path)
        encoding = await begun(monkeypatch, end)
        await gateway.stop()
        encoding.cancel()

    served = threading.Thread(target=lambda: asyncio.run(serve()))
    served.start()
    try:
        served.join(60)
        assert not served.is_alive()
    finally:
        end.set()
        served.join()
