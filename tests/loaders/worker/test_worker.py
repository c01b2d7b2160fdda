"""The worker and the zygote by themselves, without the gateway: private names, what they import, one
connection over a socket, and their end."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.batch import Tensors
from loaders.package import Package
from loaders.worker import bootstrap, wire
from tests.support.hostile import alive, eventually, write_package

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model processes need Linux")

ONE = Tensors({"": np.array([1.5])}, 1)


class Spoken:
    """One worker process, started by hand, and the gateway's side of its conversation."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes], output: int) -> None:
        self.sock = sock
        self.process = process
        self.output = output
        self._reader = wire.Reader()

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        wire.transmit(self.sock, wire.encode(message))
        answer = wire.receive(self.sock, self._reader)
        assert answer is not None
        return answer

    def load(self, shown: Package, **changes: Any) -> dict[str, Any]:
        message = {
            "op": "load", "package": shown.to_json(), "path": str(shown.path), "config": {}, "threads": 1,
            "environment": {}, "confinement": {}, **changes,
        }  # fmt: skip
        wire.transmit(self.sock, wire.encode(message))
        data, descriptors, _, _ = socket.recv_fds(self.sock, 1, 2)
        assert data == b"m"
        assert b"Private_Dirty" in os.pread(descriptors[0], 4096, 0)
        for descriptor in descriptors:
            os.close(descriptor)
        answer = wire.receive(self.sock, self._reader)
        assert answer is not None
        return answer


@contextmanager
def worker(tmp_path: Path) -> Iterator[Spoken]:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    output, log = os.pipe2(os.O_CLOEXEC)
    options = {"connection": theirs.fileno(), "log": log, "temporary": str(temporary)}
    process = subprocess.Popen(
        [sys.executable, bootstrap.__file__, "process", json.dumps(options)],
        pass_fds=(theirs.fileno(), log),
        cwd=tmp_path,
    )
    os.close(log)
    theirs.close()
    spoken = Spoken(ours, process, output)
    try:
        yield spoken
    finally:
        ours.close()
        process.wait(10)
        os.close(output)


def test_it_loads_and_answers_and_ends_with_the_stream(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p", at_predict="print('hello')")
    with worker(tmp_path) as w:
        loaded = w.load(package)
        assert loaded["op"] == "loaded"
        assert loaded["merges"] is False
        assert loaded["seconds"] > 0
        assert loaded["confinement"]["new_privileges"] == "refused"
        answer = w.ask({"op": "predict", "batch": ONE, "params": {}})
        assert answer["op"] == "answer"
        assert answer["batch"].arrays[""].tolist() == [1.5]
        w.sock.shutdown(socket.SHUT_RDWR)
        assert w.process.wait(10) == 0
        assert os.read(w.output, 100) == b"hello\n"


def test_a_failed_load_is_an_answer(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p", at_load="raise ValueError('not today')")
    with worker(tmp_path) as w:
        answer = w.load(package)
        assert (answer["op"], answer["type"], answer["message"]) == ("error", "ValueError", "not today")
        assert "own_loader.py" in answer["trace"]
        answer = w.ask({"op": "predict", "batch": ONE, "params": {}})
        assert (answer["op"], answer["type"]) == ("error", "RuntimeError")


def test_a_package_that_names_an_unknown_loader_is_an_answer(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p")
    raw = {"flavors": {"python_function": {"loader_module": "unheard_of"}}}
    with worker(tmp_path) as w:
        answer = w.load(package, package=raw)
        assert answer["type"] == "UnknownFlavor"
        assert str(tmp_path) not in answer["message"]


def test_noise_ends_it_with_a_word(tmp_path: Path) -> None:
    with worker(tmp_path) as w:
        w.sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert w.process.wait(10) == 1
        assert b"WireError" in os.read(w.output, 10_000)


def test_it_does_not_start_without_a_gateway(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    output, log = os.pipe()
    ours.close()
    with theirs:
        options = {"connection": theirs.fileno(), "log": log, "temporary": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, bootstrap.__file__, "process", json.dumps(options)],
            pass_fds=(theirs.fileno(), log), timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    for descriptor in (output, log):
        os.close(descriptor)


def test_what_it_starts_does_not_inherit_the_connection(tmp_path: Path) -> None:
    package = write_package(
        tmp_path / "p",
        at_predict="""
            import subprocess
            done = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, close_fds=False)
            return [done.stdout.decode().splitlines()]
        """,
    )
    with worker(tmp_path) as w:
        w.load(package)
        (seen,) = w.ask({"op": "predict", "batch": ONE, "params": {}})["batch"].value
        numbers = {line.split(" -> ")[0].split()[-1] for line in seen if " -> " in line}
        assert numbers == {"0", "1", "2", "3"}, seen  # the last is the listing itself


# ---- names and imports


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ONLY_NUMPY = """
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in sys.stdlib_module_names | {"numpy", "_gateway_loaders"} and not root.startswith("_"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Only())
"""


def test_worker_and_zygote_need_nothing_but_numpy() -> None:
    """With everything imported that a zygote imports of this package, and a package read and signed."""
    out = run_python(
        ONLY_NUMPY
        + f"""
import importlib.util
spec = importlib.util.spec_from_file_location("private_names", {bootstrap.__file__!r})
private = importlib.util.module_from_spec(spec)
spec.loader.exec_module(private)
sys.meta_path.insert(0, private._Finder())
import _gateway_loaders.worker.zygote as zygote
zygote._preload_own()
roots = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(roots & {{"loaders", "gateway", "pandas", "yaml"}}))
"""
    )
    assert out == "[]\n"


def test_lazy_imports_lead_to_the_private_package_and_other_imports_do_not() -> None:
    out = run_python(
        f"""
        import importlib.util, sys, types
        spec = importlib.util.spec_from_file_location("private_names", {bootstrap.__file__!r})
        private = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(private)
        sys.meta_path.insert(0, private._Finder())
        sys.modules["loaders"] = other = types.ModuleType("loaders")
        import _gateway_loaders
        from _gateway_loaders.package import Package
        # Reading one imports the signature, in a function.
        package = Package.from_json({{"flavors": {{"python_function": {{"loader_module": "x"}}}}}}, "/")
        print(Package.__module__, "_gateway_loaders.signature" in sys.modules)
        print(_gateway_loaders.Signature.__module__)
        import loaders
        print(loaders is other, [n for n in sys.modules if n.startswith("loaders")])
        """
    )
    assert out.splitlines() == [
        "_gateway_loaders.package True",
        "_gateway_loaders.signature",
        "True ['loaders']",
    ]


def test_no_module_of_this_package_is_named_by_its_public_name_as_text() -> None:
    """`importlib.import_module("loaders.x")` would find the model's package. Import statements are safe."""
    root = Path(bootstrap.__file__).parents[1]
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
                first = node.args[0]
                text = first.value if isinstance(first, ast.Constant) else ""
                assert not str(text).startswith("loaders"), f"{file.name}:{node.lineno}"


def test_a_zygote_does_not_outlive_its_parent_while_it_imports(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)\n"
    )
    code = f"""
        import json, os, socket, subprocess, sys, time
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        options = {{"control": theirs.fileno(), "parent": os.getpid(),
                    "preload": ["endless"], "start": "fork", "scratch": {str(tmp_path)!r}}}
        subprocess.Popen([sys.executable, {bootstrap.__file__!r}, "zygote", json.dumps(options)],
                         pass_fds=(theirs.fileno(),))
        time.sleep(1000)
    """
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environ) as parent:
        assert eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 20)
        pid = int((tmp_path / "pid").read_text())
        assert alive(pid)
        parent.kill()
        assert eventually(lambda: not alive(pid))
