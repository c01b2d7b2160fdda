"""Whether a process works: the decision as a table of what was seen, and what the kernel really says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gateway.runners.pulse import SILENT, STOPPED, Pulse, Sign, of_group, read

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")

Seen = tuple[float, str, int, int | None]


@pytest.mark.parametrize(
    ("seen", "stuck", "end"),
    [
        pytest.param([(0, "S", 1, None), (1000, "S", 1, None)], None, False, id="idle for long"),
        pytest.param([(0, "S", 1, 7), (29, "S", 1, 7)], None, False, id="silent, not for long"),
        pytest.param([(0, "S", 1, 7), (31, "S", 1, 7)], "without CPU time", False, id="silent"),
        pytest.param([(0, "S", 1, 7), (31, "S", 2, 7)], None, False, id="it computes"),
        pytest.param([(0, "S", 1, 7), (31, "S", 1, 8)], None, False, id="another call"),
        pytest.param([(0, "T", 1, None), (5, "T", 1, None)], "state T", False, id="stopped"),
        pytest.param([(0, "T", 1, None), (STOPPED, "T", 1, None)], "state T", True, id="stopped for good"),
        pytest.param([(0, "T", 1, None), (9, "S", 1, None), (11, "T", 1, None)], "state T", False, id="anew"),
        pytest.param([(0, "T", 1, None), (9, "R", 1, None)], None, False, id="it was continued"),
        pytest.param([(0, "S", 1, 7), (9999, "S", 1, 7)], "without CPU time", False, id="never ended for it"),
    ],
)
def test_the_rule(seen: list[Seen], stuck: str | None, end: bool) -> None:
    pulse = Pulse()
    ends = [pulse.look(now, Sign(state, ticks), call, lambda: 5) for now, state, ticks, call in seen]
    assert (stuck in pulse.stuck) if stuck and pulse.stuck else (pulse.stuck == stuck)
    assert ends[-1] is end


def test_a_model_that_waits_for_its_own_processes_works() -> None:
    pulse, ticks = Pulse(), iter(range(1000))
    for second in range(0, 200, 2):
        pulse.look(float(second), Sign("S", 1), 7, lambda: next(ticks))
        assert pulse.stuck is None
    for second in range(200, 200 + int(SILENT) + 20, 2):
        pulse.look(float(second), Sign("S", 1), 7, lambda: 1000)
    assert pulse.stuck is not None


def test_what_the_kernel_says() -> None:
    own = read(os.getpid())
    assert own is not None
    assert own.state in "RS"
    with subprocess.Popen([sys.executable, "-c", "input(sum(range(3_000_000)))"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, start_new_session=True) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.read(1)
        assert of_group(child.pid) >= 0
        seen = read(child.pid)
        assert seen is not None
        assert of_group(child.pid) >= seen.ticks
        child.kill()
    assert read(child.pid) is None
