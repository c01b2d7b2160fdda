"""The environments of the servers that the gateway is compared with: one each, with equal model libraries.

Knows what each needs and how uv makes it. Does not know how a server is started or asked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import platformdirs

REPOSITORY = Path(__file__).parents[3]
EQUAL = ("scikit-learn==1.7.2", "numpy==2.2.6", "scipy==1.15.3", "pandas==2.3.3", "onnxruntime==1.23.2")
"""The libraries that compute: the same in every environment, or it is not made."""

HTTP = ("starlette==1.10.0", "uvicorn==0.54.0", "httptools", "uvloop", "orjson")
REQUIREMENTS = {
    "plain": (*HTTP, "onnx==1.18.0"),
    "gateway": (*HTTP, "onnx==1.18.0", "-e", str(REPOSITORY)),
    "mlflow": ("mlflow==3.17.2", "onnx==1.18.0"),
    "mlserver": (
        "mlserver==1.7.1",
        "mlserver-sklearn==1.7.1",
        "mlserver-mlflow==1.7.1",
        "onnx==1.18.0",
        "uvloop==0.21.0",
    ),
    "bentoml": ("bentoml==1.4.40",),
    "litserve": ("litserve==0.2.19",),
    "ray": ("ray[serve]==2.60.0",),
}


@dataclass(frozen=True)
class Environment:
    name: str
    directory: Path
    failure: str = ""
    """Why it could not be made; empty if it is there."""

    @property
    def python(self) -> str:
        return self.program("python")

    def program(self, name: str) -> str:
        return str(self.directory / "bin" / name)

    def versions(self) -> dict[str, str]:
        listed = json.loads(uv("pip", "list", "--python", self.python, "--format", "json").stdout)
        return {package["name"]: package["version"] for package in listed}


def default_root() -> Path:
    return Path(platformdirs.user_cache_dir("model-gateway")) / "peers"


def uv(*arguments: str) -> subprocess.CompletedProcess[str]:
    from uv import find_uv_bin

    without = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    return subprocess.run([find_uv_bin(), *arguments], text=True, capture_output=True, env=without)


def made(name: str, root: Path, python: str = sys.executable) -> Environment:
    """The environment, made or made again if its requirements changed. A failure is told, not raised."""
    wanted = "\n".join([python, *EQUAL, *REQUIREMENTS[name]])
    found = Environment(name, root / name)
    stamp = found.directory / "requirements"
    if stamp.is_file() and stamp.read_text() == wanted:
        return found
    shutil.rmtree(found.directory, ignore_errors=True)
    # Only wheels: what would have to be compiled here is told as not installable.
    wheels = ["--compile-bytecode"] if name == "gateway" else ["--only-binary", ":all:", "--compile-bytecode"]
    for step in (
        ["venv", "--quiet", "--python", python, str(found.directory)],
        ["pip", "install", "--quiet", "--python", found.python, *wheels, *EQUAL, *REQUIREMENTS[name]],
    ):
        result = uv(*step)
        if result.returncode != 0:
            return Environment(name, found.directory, result.stderr.strip() or "uv failed without a message")
    stamp.write_text(wanted)
    return found
