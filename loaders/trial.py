"""Tries a saved package out as a stranger would: loaded in a fresh process, asked its own input example.

Knows the process and its answers; what they are compared with is the caller's affair. The environment is
this one, without the places that only the author has on `sys.path`.
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
    """The package does not load, or does not answer its example, in a fresh process. `kind`: the class of
    the exception there; `trace`: its traceback."""

    def __init__(self, message: str, kind: str = "", trace: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.trace = trace


def answers(package: Package, times: int = 1, enforcement: str = "strict") -> list[Batch]:
    """Loads the package in a fresh process, which executes what it holds, and asks its example `times` over.
    Empty: it has no example. Raises TrialFailed."""
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
        # What the model prints is of no interest here, and an example is data.
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
    """A file where a socket is expected."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def recv_into(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined, no-any-return]


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Of the places that this process imports from, those that hold installed distributions: modules that
    lie elsewhere are the author's, and the machines that serve the model do not have them."""
    kept = {**environ}
    kept.pop("PYTHONPATH", None)
    own = {"", *site.getsitepackages(), site.getusersitepackages()}  # which the new process finds by itself
    more = [place for place in sys.path if place not in own and any(Path(place).glob("*.dist-info"))]
    if more:
        kept["PYTHONPATH"] = os.pathsep.join(more)
    return kept


def _explained(message: Mapping[str, Any]) -> str:
    text = f"{message['type']}: {message['message']}" if message["message"] else message["type"]
    if message["type"] == "ModuleNotFoundError":
        text += " (ship modules of your own with code_paths, name libraries in requirements)"
    return text
