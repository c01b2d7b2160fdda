"""A state directory: gateways of one machine share it, those of another are told who holds it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.state import Served, State
from gateway.statelock import FILE, StateLock, machine


def test_gateways_of_one_machine_share_it(tmp_path: Path) -> None:
    first, second = StateLock(tmp_path), StateLock(tmp_path)
    assert (first.holder, second.holder) == (None, None)
    about = json.loads((tmp_path / FILE).read_text())
    assert (about["machine"], about["host"], about["pid"]) == (machine(), socket.gethostname(), os.getpid())
    first.close()
    third = StateLock(tmp_path)
    assert third.holder is None
    second.close()
    third.close()


def test_a_gateway_of_another_machine_is_told_who_holds_it(tmp_path: Path) -> None:
    here = StateLock(tmp_path)
    there = StateLock(tmp_path, here="another machine")
    assert there.holder == f"the gateway on host {socket.gethostname()} (process {os.getpid()})"
    here.close()
    again = StateLock(tmp_path, here="another machine")
    assert again.holder is None, "it is free once its holder has ended"
    assert StateLock(tmp_path).holder is not None
    again.close()


def test_a_holder_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from gateway.statelock import StateLock\n"
        "lock = StateLock(Path(sys.argv[1]), here='another machine')\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        held = StateLock(tmp_path).holder
        assert held is not None
        assert str(holder.pid) in held
        holder.kill()
        holder.wait()
        assert StateLock(tmp_path).holder is None


def test_content_that_names_no_holder(tmp_path: Path) -> None:
    holder = StateLock(tmp_path)
    (tmp_path / FILE).write_text("{}")
    assert StateLock(tmp_path).holder == "a gateway that does not name itself"
    holder.close()
    assert StateLock(tmp_path).holder is None


def test_the_state_of_another_machine_is_read_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = State(tmp_path)
    first.save_last_good("r", "iris", "champion", "1")
    monkeypatch.setattr("gateway.statelock.machine", lambda: "another machine")
    other = State(tmp_path)
    assert "is in use by the gateway on host" in caplog.text
    assert other.last_good("r") == {("iris", "champion"): "1"}
    other.save_last_good("r", "iris", "champion", "2")
    other.begin_serving("r", "iris", "champion", Served("2", 0.0, "promote"))
    assert first.last_good("r") == {("iris", "champion"): "1"}
    other.close()
    first.close()


def test_several_processes_of_one_machine_write_one_state(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from gateway.state import State\n"
        "state = State(Path(sys.argv[1]))\n"
        "for n in range(50): state.save_last_good('r', f'm{sys.argv[2]}-{n}', 'champion', '1')\n"
        "state.close()"
    )
    commands = [[sys.executable, "-c", script, str(tmp_path), str(number)] for number in range(3)]
    running = [subprocess.Popen(command) for command in commands]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    state = State(tmp_path)
    assert len(state.last_good("r")) == 150
    state.close()
