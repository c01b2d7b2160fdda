"""Environments on disk, made by the real uv from small wheels: once, whole or not at all, shared."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.artifacts.base import ArtifactError
from gateway.artifacts.cache import Artifacts
from gateway.environments.build import Built, Store, _occupied
from gateway.environments.interpreters import Interpreters
from gateway.environments.lock import LockError, Wanted, parsed
from gateway.environments.resolve import Resolver
from gateway.environments.uv import Uv, UvError
from gateway.registries.base import Version
from tests.support import wheels
from tests.support.hostile import write_package

ACME = Wanted(("acme==1.0",))


def store(root: Path, environ: Mapping[str, str]) -> Store:
    uv = Uv(root / "uv", root / "scratch", environ)
    interpreters = Interpreters({}, environ)
    return Store(root, uv, Resolver(uv, interpreters, gpu=False), interpreters)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[wheels.Index]:
    with wheels.index(tmp_path / "index") as served:
        served.wheel("acme", "1.0")
        served.wheel("acme", "2.0")
        served.wheel("tools", "1.0", requires="acme==1.0")
        yield served


def imported(built: Built, module: str = "acme") -> str:
    code = f"import {module}; print({module}.VERSION)"
    done = subprocess.run([built.python, "-I", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_environment_holds_what_its_lock_says(tmp_path: Path, index: wheels.Index) -> None:
    steps: list[str] = []
    here = store(tmp_path / "e", index.environ)
    lock = here.resolve(ACME, steps.append)
    built = here.build(lock, steps.append)
    assert imported(built) == "1.0"
    assert dict(lock.packages) == {"acme": "1.0"}
    assert [step.partition(" ")[0] for step in steps] == ["resolving", "creating", "installing", "compiling"]
    assert list(built.path.rglob("acme/__pycache__/*.pyc")), "byte code is compiled ahead"


def test_a_lock_is_built_once_and_found_by_all(tmp_path: Path, index: wheels.Index) -> None:
    first, second = store(tmp_path / "e", index.environ), store(tmp_path / "e", index.environ)
    lock = first.resolve(ACME)
    built = first.build(lock)
    steps: list[str] = []
    assert second.resolve(ACME, steps.append).key == lock.key
    assert second.build(lock, steps.append).path == built.path
    assert steps == []


def test_a_lock_that_another_satisfies_needs_no_build(tmp_path: Path, index: wheels.Index) -> None:
    here = store(tmp_path / "e", index.environ)
    both = here.build(here.resolve(Wanted(("tools==1.0",))))
    alone = here.find(here.resolve(ACME))
    assert alone is not None
    assert alone.key == both.key


def test_of_several_that_fit_the_one_that_most_can_share_is_taken(
    tmp_path: Path, index: wheels.Index
) -> None:
    here = store(tmp_path / "e", index.environ)
    lock = here.resolve(ACME)
    alone = here.build(lock)
    both = here.build(here.resolve(Wanted(("tools==1.0",))))
    found = here.find(lock)
    assert found is not None
    assert (alone.key, found.key) == (lock.key, both.key)


def test_two_that_build_the_same_lock_at_once_build_it_once(tmp_path: Path, index: wheels.Index) -> None:
    lock = store(tmp_path / "e", index.environ).resolve(ACME)
    steps: list[list[str]] = [[], []]
    built: list[str] = []

    def build(which: int) -> None:
        # Each with its own store: what keeps them apart is the file system's lock, as between processes.
        built.append(store(tmp_path / "e", index.environ).build(lock, steps[which].append).key)

    threads = [threading.Thread(target=build, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert built == [lock.key, lock.key]
    assert sum(step.startswith("installing") for each in steps for step in each) == 1


def test_two_processes_that_build_the_same_lock_build_it_once(tmp_path: Path, index: wheels.Index) -> None:
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from tests.gateway.environments.test_build import ACME, store\n"
        "here = store(Path(sys.argv[1]), json.loads(sys.argv[2]))\n"
        "sys.stdin.readline()\n"
        "steps = []\n"
        "built = here.build(here.resolve(ACME, steps.append), steps.append)\n"
        "print(json.dumps([built.key, steps]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "e"), json.dumps(index.environ)]
    both = [
        subprocess.Popen(
            command, cwd=Path(__file__).parents[3], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    (key, steps), (same, others) = (json.loads(one.communicate(timeout=120)[0]) for one in both)
    assert key == same
    assert sum(step.startswith("resolving") for step in steps + others) == 1
    assert sum(step.startswith("installing") for step in steps + others) == 1


def test_an_environment_is_rebuilt_without_the_index(tmp_path: Path, index: wheels.Index) -> None:
    here = store(tmp_path / "e", index.environ)
    lock = here.resolve(ACME)
    key = here.build(lock).key
    assert here.remove(key)
    index.stop()
    assert imported(store(tmp_path / "e", index.environ).build(lock)) == "1.0"


def test_an_environment_in_use_is_not_removed(tmp_path: Path, index: wheels.Index) -> None:
    here = store(tmp_path / "e", index.environ)
    held = here.build(here.resolve(ACME))
    assert not store(tmp_path / "e", index.environ).remove(held.key)
    key = held.key
    del held
    assert store(tmp_path / "e", index.environ).remove(key)
    assert here.keys() == []


def test_what_changes_while_the_disk_is_measured_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = store(tmp_path, {})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_bytes(b"x" * 100_000)

    def occupied(root: Path) -> int:
        found = _occupied(root)
        here.remove("old")  # in another thread
        return found

    monkeypatch.setattr("gateway.environments.build._occupied", occupied)
    assert here.bytes() >= 100_000
    assert here.bytes() < 100_000


def test_packages_and_environments_share_one_limit_and_what_was_used_longest_ago_goes(
    tmp_path: Path, index: wheels.Index
) -> None:
    here = store(tmp_path / "c" / "environments", index.environ)
    old = here.build(here.resolve(ACME)).key
    new = here.build(here.resolve(Wanted(("acme==2.0",)))).key
    package = write_package(tmp_path / "p", extra={"ballast.bin": "x" * 200_000})
    version = Version("iris", "1", str(package.path))
    roomy = Artifacts(tmp_path / "c", 10**9, beside=here)
    local = roomy.fetch(version)
    digest, size = local.digest, local.bytes
    assert roomy.bytes() == size + here.bytes()
    del local
    os.utime(tmp_path / "c" / "environments" / f"{old}.lock", (1, 1))
    os.utime(next((tmp_path / "c").glob("sha256-*.lock")), (2, 2))

    tight = Artifacts(tmp_path / "c", roomy.bytes() - 1, beside=here)
    tight.trim()
    assert here.keys() == [new], "the environment was used longest ago"
    assert list((tmp_path / "c").glob(f"{digest.replace(':', '-')}/MLmodel"))

    Artifacts(tmp_path / "c", here.bytes() + size - 1, beside=here).trim()
    assert not list((tmp_path / "c").glob("sha256-*/MLmodel")), "then the package"
    assert here.keys() == [new]
    other = write_package(tmp_path / "q", extra={"ballast.bin": "y" * 100_000})
    small = Artifacts(tmp_path / "c", 150_000, beside=here)
    assert small.fetch(Version("iris", "2", str(other.path))).bytes > 100_000
    assert here.keys() == [], "a package that comes makes room among environments"


def test_an_environment_in_use_outlasts_the_limit(tmp_path: Path, index: wheels.Index) -> None:
    here = store(tmp_path / "c" / "environments", index.environ)
    held = here.build(here.resolve(ACME))
    artifacts = Artifacts(tmp_path / "c", 1, beside=here)
    artifacts.trim()
    assert imported(held) == "1.0"
    package = write_package(tmp_path / "p")
    with pytest.raises(ArtifactError, match="no space"):
        Artifacts(tmp_path / "c", 2000, beside=here).fetch(Version("iris", "1", str(package.path)))


def test_what_a_killed_builder_left_is_invisible_and_swept_away(tmp_path: Path, index: wheels.Index) -> None:
    here = store(tmp_path / "e", index.environ)
    lock = here.resolve(ACME)
    code = (
        "import json, os, sys, signal\n"
        "from pathlib import Path\n"
        "from tests.gateway.environments.test_build import ACME, store\n"
        "here = store(Path(sys.argv[1]), json.loads(sys.argv[2]))\n"
        "def say(step):\n"
        "    if step.startswith('compiling'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "here.build(here.resolve(ACME), say)\n"
    )
    root = Path(__file__).parents[3]
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "e"), json.dumps(index.environ)], cwd=root, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert here.find(lock) is None
    assert list((tmp_path / "e").glob(".making-*")), "the test needs something left behind"
    assert imported(here.build(lock)) == "1.0"
    assert not list((tmp_path / "e").glob(".making-*"))


@pytest.mark.parametrize("by", ["another build", "tidy"])
def test_what_killed_builders_of_other_locks_left_is_swept_away(
    by: str, tmp_path: Path, index: wheels.Index
) -> None:
    here = store(tmp_path / "e", index.environ)
    (tmp_path / "e").mkdir()
    dead, alive = (tmp_path / "e" / f".making-{key * 32}-1-1" for key in "ab")
    for making in (dead, alive):
        making.mkdir()
        (making / "large").write_bytes(b"x" * 100_000)
    with here._alone("b" * 32, lambda step: None):
        if by == "tidy":
            here.tidy()
        else:
            here.build(here.resolve(ACME))
        assert not dead.exists()
        assert alive.exists()
    here.tidy()
    assert not alive.exists()


def test_a_wheel_that_is_none_is_said(tmp_path: Path, index: wheels.Index) -> None:
    here = store(tmp_path / "e", index.environ)
    lock = here.resolve(ACME)
    shutil.rmtree(tmp_path / "e" / "uv")
    (index.directory / "acme-1.0-py3-none-any.whl").write_bytes(b"no zip at all")
    with pytest.raises(UvError) as failed:
        store(tmp_path / "e", index.environ).build(lock)
    assert failed.value.kind in ("broken wheel", "wrong hash")
    assert store(tmp_path / "e", index.environ).find(lock) is None


def test_a_file_with_another_hash_is_said(tmp_path: Path, index: wheels.Index) -> None:
    here = store(tmp_path / "e", index.environ)
    lock = here.resolve(ACME)
    shutil.rmtree(tmp_path / "e" / "uv")
    digest = next(iter(lock.hashes["acme"]))
    other = parsed(lock.text.replace(digest, "0" * 64), lock.python, lock.platform, dated=True)
    with pytest.raises(UvError, match="does not have the hash") as failed:
        store(tmp_path / "e", index.environ).build(other)
    assert failed.value.kind == "wrong hash"


def test_only_files_that_the_shipped_lock_allows_are_installed(tmp_path: Path, index: wheels.Index) -> None:
    file = index.directory / "acme-1.0-py3-none-any.whl"
    known = frozenset({hashlib.sha256(file.read_bytes()).hexdigest()})
    # An installer prefers the higher build number.
    other = wheels.wheel(tmp_path / "other", "acme", "1.0", body="VERSION = 'another'\n")
    shutil.copy(other, index.directory / "acme-1.0-2-py3-none-any.whl")
    here = store(tmp_path / "e", index.environ)
    assert imported(here.build(here.resolve(ACME))) == "another"
    lock = here.resolve(Wanted(ACME.requirements, hashes={"acme==1.0": known}))
    assert lock.hashes["acme"] == known
    assert imported(here.build(lock)) == "1.0"
    with pytest.raises(LockError, match="the files of the index differ"):
        here.resolve(Wanted(ACME.requirements, hashes={"acme==1.0": frozenset({"0" * 64})}))


def test_requirements_that_cannot_be_met_are_said(tmp_path: Path, index: wheels.Index) -> None:
    with pytest.raises(LockError, match="acme"):
        store(tmp_path / "e", index.environ).resolve(Wanted(("acme==3.0",)))


def test_a_missing_interpreter_names_what_installs_it(tmp_path: Path, index: wheels.Index) -> None:
    with pytest.raises(LockError, match=r"uv python install 3\.7"):
        store(tmp_path / "e", index.environ).resolve(Wanted(("acme",), python=(3, 7), exact=True))


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, index: wheels.Index) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system can be mounted by root alone")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", small], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        index.wheel("large", "1.0", body="X = '" + "x" * 2_000_000 + "'\n")
        lock = store(tmp_path / "e", index.environ).resolve(Wanted(("large==1.0",)))
        with pytest.raises(UvError, match="the disk is full"):
            store(small, index.environ).build(lock)
        assert store(small, index.environ).keys() == []
    finally:
        subprocess.run(["umount", small], check=False)


@contextmanager
def server(delay: float) -> Iterator[str]:
    """An index that does not answer for `delay` seconds."""
    stopped = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stopped.wait(delay)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        try:
            yield f"http://joe:hunter2@127.0.0.1:{httpd.server_port}/simple"
        finally:
            stopped.set()
            httpd.shutdown()


def test_an_interpreter_that_gave_no_answer_is_asked_again(tmp_path: Path) -> None:
    python = tmp_path / "python3.9"
    answer = [[3, 9, 18], "cpython", "linux-x86_64", str(python)]
    python.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\ncat {tmp_path}/answer\n")
    python.chmod(0o755)
    now = [0.0]
    interpreters = Interpreters({"3.9": python}, {}, lambda: now[0])
    assert interpreters.find((3, 9)) is None
    assert interpreters.find((3, 9)) is None
    (tmp_path / "answer").write_text(json.dumps(answer))
    now[0] = 61.0
    for _ in range(2):
        found = interpreters.find((3, 9))
        assert found is not None
        assert found.version == "3.9.18"
    assert (tmp_path / "asked").read_text().splitlines() == ["asked"] * 2


def test_an_index_that_is_away_is_said_without_its_password(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://joe:hunter2@127.0.0.1:{taken.getsockname()[1]}/simple"
        uv = Uv(tmp_path / "uv", tmp_path / "s", {"UV_DEFAULT_INDEX": url, "UV_HTTP_RETRIES": "0"})
        interpreters = Interpreters({}, {})
        with pytest.raises((UvError, LockError), match="does not answer") as failed:
            Resolver(uv, interpreters).resolve(ACME)
        assert "hunter2" not in str(failed.value)


def test_a_test_that_forgets_its_index_asks_none(tmp_path: Path) -> None:
    with server(30) as url, pytest.raises(UvError) as failed:
        store(tmp_path / "e", {**os.environ, "UV_DEFAULT_INDEX": url}).resolve(ACME)
    assert failed.value.kind == "offline"


def test_a_slow_index_is_given_up(tmp_path: Path) -> None:
    with server(30) as url:
        environ = {"UV_DEFAULT_INDEX": url, "UV_HTTP_TIMEOUT": "1", "UV_HTTP_RETRIES": "0"}
        uv = Uv(tmp_path / "uv", tmp_path / "s", environ)
        began = time.monotonic()
        with pytest.raises(UvError, match="does not answer") as failed:
            Resolver(uv, Interpreters({}, {})).resolve(ACME)
        assert time.monotonic() - began < 25
        assert "hunter2" not in str(failed.value)
