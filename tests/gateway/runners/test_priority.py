"""The priority of processes that nobody waits for, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.runners import priority
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

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs the policies of Linux")


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


@pytest.mark.parametrize("policy", ["SCHED_IDLE", "SCHED_BATCH"])
def test_threads_and_children_are_lowered_and_restored(
    tree: tuple[int, int], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = getattr(os, policy)
    if policy == "SCHED_IDLE" and priority.lowest() != chosen:
        pytest.skip("a task may not leave SCHED_IDLE here")
    monkeypatch.setattr(priority, "lowest", lambda: chosen)
    background = Background()
    assert policies(*tree) == {os.SCHED_OTHER}
    background.lower(tree[:1])
    assert policies(*tree) == {chosen}
    background.lower([])
    assert policies(*tree) == {os.SCHED_OTHER}
    background.lower(tree[:1])
    background.restore()
    background.restore()
    assert policies(*tree) == {os.SCHED_OTHER}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize(("may_leave", "policy"), [(True, "SCHED_IDLE"), (False, "SCHED_BATCH")])
def test_the_policy_is_one_that_can_be_left_again(
    may_leave: bool, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def set_to(task: int, chosen: int, parameters: os.sched_param) -> None:
        asked.append(chosen)
        if chosen == os.SCHED_OTHER and not may_leave:
            raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", set_to)
    assert priority.lowest.__wrapped__() == getattr(os, policy)
    assert asked == [os.SCHED_IDLE, os.SCHED_OTHER]


def test_a_process_that_has_ended_is_no_error() -> None:
    background = Background()
    background.lower([2**22 + 1])
    background.restore()
