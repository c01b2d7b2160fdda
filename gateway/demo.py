"""The demo: a directory with a registry of three real models, and the commands to try.

Knows what the demo shows. Training runs in a separate process (`loaders.samples`), so that the gateway that
serves afterwards does not import the frameworks. Must not know how the server works.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gateway import api
from gateway.commands.terminal import Failure
from gateway.registries import open_registry
from loaders.samples import NAMES, VERSIONS

ALIASES = {"1": "champion", "2": "challenger"}

FLOWER = {"sepal_length": 5.9, "sepal_width": 3.2, "petal_length": 4.8, "petal_width": 1.8}
PATIENT = [59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.86, 87]
TICKET = "My parcel has not arrived and my card was charged"
"""Inputs for which the two versions of each model give different answers, so that a promotion is visible."""


def prepare(directory: Path) -> Path:
    """Adds what is missing to the demo's registry, and returns its file. Existing versions stay unchanged.

    Raises Failure if a framework for training is not installed or training failed.
    """
    registry = directory / "registry.yaml"
    missing = _missing(registry)
    if not missing:
        return registry
    lacking = [name for name in ("sklearn", "onnx") if importlib.util.find_spec(name) is None]
    if lacking:
        raise Failure(
            f"the demo trains its models and needs {' and '.join(lacking)}", "run pip install '.[demo]'"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".training-") as scratch:
        train = [sys.executable, "-m", "loaders.samples", scratch]
        trained = subprocess.run(train, capture_output=True, text=True, check=False)
        if trained.returncode:
            last = trained.stderr.strip().splitlines()[-1:] or [f"exit {trained.returncode}"]
            raise Failure(f"training the demo's models failed: {last[0]}")
        for name, version in missing:
            api.push(Path(scratch, name, version), name, alias=ALIASES[version], registry=str(registry))
    return registry


def champion(registry: Path, name: str) -> str:
    """The version that `champion` of a demo model points to."""
    opened = open_registry(str(registry))
    try:
        return opened.read().models[name].aliases["champion"].version
    finally:
        opened.close()


def lines_to_try(url: str, standing: str, key: Path) -> str:
    """The text that the demo prints. `standing` is the version that iris@champion points to, `key` the file
    with the key for control calls."""
    control = f"--url {url} --admin-key-file {shlex.quote(str(key))}"
    target = "2" if standing == "1" else "1"
    iris = _predict(url, "iris", {"dataframe_records": [FLOWER]})
    diabetes = _predict(url, "diabetes", {"inputs": [PATIENT]})
    tickets = _predict(
        url, "tickets", {"dataframe_records": [{"text": TICKET}], "params": {"threshold": 0.4}}
    )
    return f"""\
Predict; the first request loads the model:

{iris}

Promote in another terminal (same environment). Then predict again: version {target} answers.

  gateway promote iris@champion {target} {control}

Show what the gateway holds, and move the alias back:

  gateway status --url {url}
  gateway rollback iris@champion {control}

Predict with the other two models (an ONNX graph, a Python class with a param), and with another alias:

{diabetes}
{tickets}
{iris.replace("/predict/iris", "/predict/iris@challenger")}
"""


def _predict(url: str, name: str, body: dict[str, Any]) -> str:
    data = shlex.quote(json.dumps(body))
    return f"  curl -sS {url}/predict/{name} -H 'Content-Type: application/json' -d {data}"


def _missing(registry: Path) -> list[tuple[str, str]]:
    wanted = [(name, version) for name in NAMES for version in VERSIONS]
    if not registry.exists():
        return wanted
    opened = open_registry(str(registry))
    try:
        models = opened.read().models
    finally:
        opened.close()
    return [(n, v) for n, v in wanted if n not in models or v not in models[n].versions]
