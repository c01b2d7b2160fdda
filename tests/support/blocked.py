"""Run as a script: asks packages in an interpreter where some modules cannot be imported.

Its only argument is a JSON object: `block`, the top-level modules; `jobs`, a list of {package, requests},
a request being {form, data, params}. Prints a JSON list with, for each package, its answers, or the error
that loading raised as {"error": type, "message": text}.
"""

from __future__ import annotations

import base64
import json
import sys
import warnings
from typing import Any


class Without:
    """A finder that does not find some top-level modules: what it is like where they are not installed."""

    def __init__(self, finder: Any, names: list[str]) -> None:
        self.finder = finder
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        return (
            None
            if fullname.partition(".")[0] in self.names
            else self.finder.find_spec(fullname, path, target)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def plain(value: Any) -> Any:
    """A batch or a part of one as JSON has it (MLflow's: frames as records, arrays as nested lists)."""
    from loaders.batch import Columns, Tensors, Value

    if isinstance(value, Columns):
        columns = {str(name): plain(array) for name, array in value.arrays.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(value, Tensors):
        arrays = {name: plain(array) for name, array in value.arrays.items()}
        return arrays[""] if set(arrays) == {""} else arrays
    if isinstance(value, Value):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value.isoformat() if hasattr(value, "isoformat") else value


def asked(job: dict[str, Any]) -> Any:
    from loaders import enforcement, model, package

    try:
        found = package.read(job["package"])
        loaded = model.open_model(found, {})
    except Exception as error:  # noqa: BLE001  whatever loading raises is the answer
        return {"error": type(error).__name__, "message": str(error)}
    answers = []
    for request in job["requests"]:
        data = request["data"]
        if request["form"] == "csv":
            data = enforcement.CsvTable(**data)
        raw = enforcement.RawInput(request["form"], data)
        try:
            given = enforcement.enforce(
                found.signature, raw, request.get("params"), "strict", type_hints=found.type_hints
            )
            answers.append(plain(loaded.run(given.batch, given.params)))
        except Exception as error:  # noqa: BLE001  whatever the model raises is the answer
            answers.append({"error": type(error).__name__, "message": str(error)})
    return answers


def main() -> None:
    task = json.loads(sys.argv[1])
    sys.meta_path[:] = [Without(finder, task["block"]) for finder in sys.meta_path]
    warnings.simplefilter("ignore")
    results = [asked(job) for job in task["jobs"]]
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert not loaded & set(task["block"]), "a blocked module, or a stand-in for it, was left behind"
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
