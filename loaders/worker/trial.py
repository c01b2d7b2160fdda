"""A new process that loads one package, answers its input example, and ends.

`loaders.trial` starts it after saving a package. Code that works only in its author's process fails here, for
example a module next to the script, a class in a notebook, or an object kept in memory. The example is
handled like a request: read from JSON and enforced. Imports only numpy and the standard library.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loaders.worker import wire


def main(options: Mapping[str, Any]) -> None:
    """Runs the trial and ends the process. `request`: a file with the package as JSON. `path`: its directory.
    `reply`: the file for the answer, a frame of `wire`. `times`: the number of predictions of the example.
    `enforcement`: the mode."""
    try:
        reply = _tried(options)
    except BaseException as error:  # noqa: BLE001  (every exception of the model is an answer)
        reply = _failed(error)
    try:
        frame = b"".join(wire.encode(reply, lenient=True))
    except BaseException as error:  # noqa: BLE001  (writing an answer asks the model's own objects)
        frame = b"".join(wire.encode(_failed(error)))
    Path(options["reply"]).write_bytes(frame)
    # Skip the interpreter's shutdown, which would wait for threads that the model left.
    os._exit(0)


def _tried(options: Mapping[str, Any]) -> dict[str, Any]:
    from loaders.enforcement import enforce
    from loaders.model import open_model
    from loaders.package import Package

    raw = json.loads(Path(options["request"]).read_bytes())
    package = Package.from_json(raw, options["path"])
    model = open_model(package, {}, private=True)
    example, params = package.example_input()
    answers = []
    if example is not None and options["times"]:
        enforced = enforce(
            package.signature, example, params, options["enforcement"], type_hints=package.type_hints
        )
        for _ in range(options["times"]):
            answers.append(model.run(enforced.batch, enforced.params))
    return {"op": "answer", "answers": answers}


def _failed(error: BaseException) -> dict[str, Any]:
    try:
        text = str(error)[:4000]
    except BaseException:  # noqa: BLE001  (its __str__ is the model's code as well)
        text = "an exception that cannot be shown"
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))[-16000:]
    return {"op": "error", "type": type(error).__name__, "message": text, "trace": trace}
