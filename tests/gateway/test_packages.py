"""What is seen of a version while its files are fetched."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.gateway.http.served import Served, settings

FILES = {"m/MLmodel": b"flavors: {python_function: {loader_module: mine}}", "m/weights": b"x" * 1000}


class Halting(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store that gives one file and half of another, and the rest when it is told."""

    protocol = "halting"
    cachable = False
    halted = threading.Event()
    go_on = threading.Event()

    def find(self, path: str, **_: Any) -> dict[str, Any]:
        return {name: {"type": "file", "size": len(content)} for name, content in FILES.items()}

    def get_file(self, rpath: str, lpath: str, callback: Any = None, **_: Any) -> None:
        content = FILES[rpath]
        with open(lpath, "wb") as file:
            for part in (content[:500], content[500:]):
                if rpath == "m/weights" and file.tell():
                    self.halted.set()
                    assert self.go_on.wait(30)
                file.write(part)
                callback.relative_update(len(part))


@pytest.mark.parametrize("reference", ["slow/versions/1", "slow@champion"])
def test_how_far_a_fetch_is_can_be_seen(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.sources._TOLD_EACH", 0.0)
    Halting.halted.clear()
    Halting.go_on.clear()
    fsspec.register_implementation("halting", Halting, clobber=True)
    registry = tmp_path / "registry.yaml"
    registry.write_text("models: {slow: {versions: {1: {source: 'halting://m'}}, aliases: {champion: 1}}}\n")
    with Served(settings(tmp_path), str(registry)) as server:
        shown = server.get("/models/slow/versions/1").json
        assert (shown["state"], "fetch" in shown) == ("UNLOADED", False)
        assert server.post(f"/models/{reference}/load?wait=false").status == 202
        assert Halting.halted.wait(30)
        total = sum(map(len, FILES.values()))
        for path in ("/models/slow/versions/1", "/models", "/models/slow"):
            shown = server.get(path).json
            shown = shown["models"][0] if "models" in shown else shown
            shown = shown["versions"][0] if "versions" in shown else shown
            assert (shown["state"], shown["reason"]) == ("LOADING", "fetching 0.0/0.0 MB")
            assert shown["fetch"] == {"bytes": total - 500, "total": total}
        Halting.go_on.set()
        server.post(f"/models/{reference}/load")
        shown = server.get("/models/slow/versions/1").json
        assert (shown["state"], "fetch" in shown) == ("FAILED", False)  # its flavor is nobody's
