"""The priority of processes for whose answers no caller waits, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.runners.priority import Background

WORKER = """
import subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
child.stdout.readline()
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(child.pid, flush=True)
input()
child.communicate(b"x")
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="needs the policies of Linux")


@pytest.fixture
def tree() -> Iterator[tuple[int, int]]:
    """A process with two threads, and its child."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.communicate("x")


def policies(*pids: int) -> set[int]:
    tasks = [int(task) for pid in pids for task in os.listdir(Path("/proc") / str(pid) / "task")]
    assert len(tasks) == 3
    return {os.sched_getscheduler(task) for task in tasks}


def test_threads_and_children_are_lowered_and_restored(tree: tuple[int, int]) -> None:
    background = Background()
    assert policies(*tree) == {os.SCHED_OTHER}
    background.lower(tree[:1])
    assert policies(*tree) == {os.SCHED_BATCH}
    background.lower([])
    assert policies(*tree) == {os.SCHED_OTHER}
    background.lower(tree[:1])
    background.restore()
    background.restore()
    assert policies(*tree) == {os.SCHED_OTHER}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
