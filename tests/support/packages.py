"""Model directories with whatever their environment files should say; nothing in them is ever loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loaders.package import Package, read


def described(
    directory: Path,
    *,
    requirements: str | None = "scikit-learn==1.0.2\ncloudpickle==2.2.0\n",
    python: str | None = "3.8.18",
    loader: str = "mlflow.sklearn",
    flavors: dict[str, Any] | None = None,
    function: dict[str, Any] | None = None,
    columns: str = "double",
    created: str = "2022-11-01 12:00:00.000000",
    files: dict[str, bytes | str] | None = None,
    **top: Any,
) -> Package:
    """A package whose `MLmodel` and files are these."""
    directory.mkdir(parents=True, exist_ok=True)
    entry: dict[str, Any] = {"loader_module": loader, **(function or {})}
    if python is not None:
        entry["python_version"] = python
    content = {
        "flavors": {"python_function": entry, **(flavors or {})},
        "signature": {"inputs": json.dumps([{"name": "a", "type": columns}])},
        "utc_time_created": created,
        **top,
    }
    (directory / "MLmodel").write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    if requirements is not None:
        (directory / "requirements.txt").write_text(requirements, encoding="utf-8")
    for name, data in (files or {}).items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read(directory)
