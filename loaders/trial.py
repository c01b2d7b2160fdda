"""Tries out a saved package as another user would: loads it in a new process and predicts its input example.

Knows the process and its answers; the caller compares them. The environment is this one, without the
directories that only the author has on `sys.path`. Must not know recorded answers.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loaders.worker import bootstrap, wire

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package


class TrialFailed(ValueError):
    """The package does not load, or does not answer its example, in a new process. `kind`: the class of the
    exception there. `trace`: its traceback."""

    def __init__(self, message: str, kind: str = "", trace: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.trace = trace


def answers(package: Package, times: int = 1, enforcement: str = "strict") -> list[Batch]:
    """Loads the package in a new process, which executes its code, and predicts its example `times` times.
    Empty if it has no example. Raises TrialFailed."""
    with tempfile.TemporaryDirectory(prefix="trial-") as directory:
        request, reply = Path(directory, "request.json"), Path(directory, "reply")
        request.write_text(json.dumps(package.to_json()), encoding="utf-8")
        options = {
            "request": str(request),
            "reply": str(reply),
            "path": str(package.path),
            "times": times,
            "enforcement": enforcement,
        }
        command = [sys.executable, bootstrap.__file__, "trial", json.dumps(options)]
        # Discard the model's output: it is not needed, and may hold data of the example.
        done = subprocess.run(
            command,
            cwd=directory,
            env=_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if not reply.exists():
            ending = f"was ended by signal {-done.returncode}" if done.returncode < 0 else "ended"
            raise TrialFailed(f"the process that loaded it {ending} without an answer")
        with reply.open("rb") as file:
            message = wire.receive(_Stream(file), wire.Reader())  # type: ignore[arg-type]
    if message is None:
        raise TrialFailed("the process that loaded it ended without an answer")
    if message["op"] == "error":
        raise TrialFailed(_explained(message), message["type"], message["trace"])
    found: list[Batch] = message["answers"]
    return found


class _Stream:
    """A file with the interface of a socket."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def recv_into(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined, no-any-return]


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables for the new process: of this process's import path it gets only directories
    with installed distributions. Other modules are the author's, and the serving machines lack them."""
    kept = {**environ}
    kept.pop("PYTHONPATH", None)
    own = {"", *site.getsitepackages(), site.getusersitepackages()}  # the new process finds these by itself
    more = [place for place in sys.path if place not in own and any(Path(place).glob("*.dist-info"))]
    if more:
        kept["PYTHONPATH"] = os.pathsep.join(more)
    return kept


def _explained(message: Mapping[str, Any]) -> str:
    text = f"{message['type']}: {message['message']}" if message["message"] else message["type"]
    if message["type"] == "ModuleNotFoundError":
        text += " (ship your own modules with code_paths; list libraries in requirements)"
    return text
