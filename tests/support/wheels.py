"""A package index of small wheels, served over loopback, for the real uv."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def wheel(directory: Path, name: str, version: str, body: str = "", requires: str = "") -> Path:
    """A wheel with one module of that name."""
    directory.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    files = {
        f"{name}/__init__.py": body or f"VERSION = {version!r}\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    target = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return target


class Index:
    """A server of the wheels in a directory. `environ`: the variables of a machine with no other index."""

    def __init__(self, directory: Path, httpd: http.server.ThreadingHTTPServer) -> None:
        self.directory = directory
        self._httpd = httpd
        self.environ = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": f"http://joe:hunter2@127.0.0.1:{httpd.server_port}/",
            "PATH": "/usr/bin:/bin",
            "HOME": str(directory),
            "UV_HTTP_RETRIES": "0",
        }

    def wheel(self, name: str, version: str, **content: str) -> Path:
        return wheel(self.directory, name, version, **content)

    def stop(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@contextmanager
def index(directory: Path) -> Iterator[Index]:
    directory.mkdir(parents=True, exist_ok=True)
    handler = functools.partial(_Quiet, directory=str(directory))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    made = Index(directory, httpd)
    try:
        yield made
    finally:
        made.stop()
