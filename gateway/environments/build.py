"""Environments on disk: each is resolved once, built once, shared by all, and removed when space is needed.

Layout of the directory, which several gateways may share:
    uv/                 uv's cache: unpacked downloads; environments are hard links into it
    bytecode/           compiled modules by source file, hard-linked too
    locks/KEY.json      the lock that the requirements of a package were resolved to
    KEY/                an environment, complete as soon as it is visible (made aside, then renamed)
    KEY.lock            held shared while a gateway uses the environment, exclusively to remove it; its
                        modification time is the last use
    .KEY.build          held while a process resolves or builds, so that the others find it done
    .making-KEY-…       an environment that is being built; the next builder, of any environment,
                        removes what killed ones left

A process that is killed at any point leaves no environment that looks complete, because locks are the
kernel's. Everything here blocks. Must not know a policy or a model.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from gateway import namedlock
from gateway.environments.interpreters import Interpreter, Interpreters, Minor, missing, named
from gateway.environments.lock import Lock, LockError, Wanted, parsed
from gateway.environments.resolve import Progress, Resolver
from gateway.environments.uv import Uv, UvError
from loaders.spelling import counted

_KEY: Final = re.compile(r"[0-9a-f]{32}\Z")
_FACTS: Final = "gateway.json"
_PYLOCK: Final = "pylock.toml"
_SKIPPED: Final = r"[/\\]tests[/\\]"
_COMPILE_TIMEOUT: Final = 900.0
_MEASURE_AGAIN: Final = 60.0


@dataclass(frozen=True, eq=False)
class Built:
    """An environment on disk. While this object exists, the environment is in use and cannot be removed.
    `python`: its executable. `bytes`: its size without the files that it shares with the cache; `apparent`:
    its size with them."""

    key: str
    path: Path
    lock: Lock
    bytes: int
    apparent: int
    used: float

    @property
    def python(self) -> str:
        return str(self.path / "bin" / "python")


class Store:
    """The environments under `root`. `resolver` makes the locks that do not exist here."""

    def __init__(self, root: Path, uv: Uv, resolver: Resolver, interpreters: Interpreters) -> None:
        self._root = root
        self._uv = uv
        self._resolver = resolver
        self._interpreters = interpreters
        self._known: dict[str, tuple[Lock, int, int]] = {}
        self._mutex = threading.Lock()
        self._measured = (-math.inf, 0)

    def __repr__(self) -> str:
        return f"<Store {len(self.keys())} environments in {self._root}>"

    def has_python(self, minor: Minor) -> bool:
        """Whether an interpreter of that version is on this machine. Blocks for the first look."""
        return self._interpreters.find(minor) is not None

    # Locks.

    def resolved(self, wanted: Wanted) -> Lock | None:
        """The lock that these requirements were resolved to before; None if they were not."""
        try:
            content = json.loads((self._root / "locks" / f"{wanted.key}.json").read_text("utf-8"))
            major, minor = content["python"]
            return parsed(content["text"], (major, minor), content["platform"], dated=content["dated"])
        except (OSError, ValueError, KeyError, TypeError, LockError):
            return None

    def resolve(self, wanted: Wanted, progress: Progress = lambda step: None) -> Lock:
        """The lock of these requirements. Once made, it never changes. Raises LockError and UvError."""
        if (known := self.resolved(wanted)) is not None:
            return known
        with self._alone(wanted.key[:32], progress):
            if (known := self.resolved(wanted)) is not None:
                return known
            lock = self._resolver.resolve(wanted, progress)
            self.keep(wanted, lock)
            return lock

    def keep(self, wanted: Wanted, lock: Lock) -> None:
        """Records that a lock meets these requirements."""
        content = {
            "python": list(lock.python), "platform": lock.platform, "dated": lock.dated, "text": lock.text,
        }  # fmt: skip
        place = self._root / "locks"
        place.mkdir(parents=True, exist_ok=True)
        draft = place / f".{wanted.key}-{os.getpid()}-{threading.get_ident()}"
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.replace(place / f"{wanted.key}.json")

    # Environments.

    def keys(self) -> list[str]:
        """The keys of the complete environments."""
        try:
            return sorted(entry.name for entry in self._root.iterdir() if _KEY.match(entry.name))
        except OSError:
            return []

    def find(self, lock: Lock) -> Built | None:
        """An environment that equals a lock or satisfies it, or None. It is in use from now on. Of several,
        the one with most packages: then most models share one environment and one zygote."""
        fitting = []
        for key in self.keys():
            facts = self._facts(key)
            if facts is not None and (key == lock.key or facts[0].satisfies(lock)):
                fitting.append((-len(facts[0].packages), key))
        for _, key in sorted(fitting):
            built = self._use(key)
            if built is not None:
                return built
        return None

    def build(self, lock: Lock, progress: Progress = lambda step: None) -> Built:
        """Finds or builds the environment; simultaneous callers share one build. Raises LockError and
        UvError."""
        if (built := self.find(lock)) is not None:
            return built
        with self._alone(lock.key, progress):
            if (built := self.find(lock)) is not None:
                return built
            interpreter = self._interpreters.find(lock.python)
            if interpreter is None:
                raise LockError(missing(lock.python))
            try:
                self._make(lock, interpreter, progress)
            except OSError as error:
                what = "the disk is full" if error.errno == 28 else (error.strerror or str(error))
                raise UvError("disk full" if error.errno == 28 else "failed", what) from None
            found = self._use(lock.key)
        if found is None:
            raise UvError("failed", "another process removed the environment right after it was built")
        return found

    def all(self) -> list[Built]:
        """Every environment, the last used one first. They are not marked as in use."""
        found = []
        for key in self.keys():
            facts = self._facts(key)
            if facts is not None:
                found.append(Built(key, self._root / key, facts[0], facts[1], facts[2], self._last_use(key)))
        return sorted(found, key=lambda built: -built.used)

    def bytes(self) -> int:
        """The bytes of everything on the disk; each file counts once. Measured after each change made here,
        and once a minute for the changes of other processes."""
        with self._mutex:
            before = self._measured
        at, measured = before
        if time.monotonic() - at > _MEASURE_AGAIN:
            measured = _occupied(self._root)
            with self._mutex:
                if self._measured is before:  # nothing changed meanwhile
                    self._measured = (time.monotonic(), measured)
        return measured

    def idle(self) -> list[tuple[float, str]]:
        """(last use, key) of every environment; `free` does not remove those in use."""
        return [(self._last_use(key), key) for key in self.keys()]

    def free(self, key: str) -> bool:
        """Removes an unused environment, and its packages from the cache that no other environment has.
        Building it again then needs the index. Returns False if it is in use."""
        facts = self._facts(key)
        if not self.remove(key):
            return False
        self._clean(set() if facts is None else set(facts[0].packages))
        return True

    def tidy(self) -> None:
        """Removes packages from the cache that no environment has, and what killed builders left."""
        self._sweep()
        self._clean({entry.name for entry in self._cached()})

    def remove(self, key: str) -> bool:
        """Removes an environment. Returns False if it is in use."""
        try:
            with namedlock.at_once(self._root / f"{key}.lock"):
                doomed = self._root / f".making-{key}-{os.getpid()}-{time.monotonic_ns()}"
                (self._root / key).rename(doomed)
                self._known.pop(key, None)
                shutil.rmtree(doomed, ignore_errors=True)
                self._changed()
                return True
        except OSError:
            return False

    # The steps of a build.

    def _make(self, lock: Lock, interpreter: Interpreter, progress: Progress) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        self._root.chmod(0o755)  # model processes of other users read the environments below
        self._sweep(own=lock.key)
        making = self._root / f".making-{lock.key}-{os.getpid()}-{time.monotonic_ns()}"
        try:
            progress(f"creating an environment for Python {interpreter.version}")
            self._uv.run(
                "venv", "--quiet", "--relocatable", "--no-project", "--python", interpreter.path, str(making)
            )
            pylock = making / _PYLOCK
            pylock.write_text(lock.text, encoding="utf-8")
            progress(f"installing {counted(len(lock.packages), 'package')}")
            self._install(making, pylock)
            pylock.chmod(0o600)  # its URLs may hold the operator's credentials
            progress("compiling byte code")
            self._compile(making, interpreter)
            own, apparent = _sizes(making)
            facts = {
                "python": list(lock.python), "platform": lock.platform, "dated": lock.dated,
                "bytes": own, "apparent": apparent, "interpreter": interpreter.path,
            }  # fmt: skip
            (making / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
            making.chmod(0o755)
            making.rename(self._root / lock.key)
            self._changed()
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise

    def _install(self, making: Path, pylock: Path) -> None:
        """Installs from the cache alone if that has all files, so that a slow or absent index has no
        effect."""
        python = str(making / "bin" / "python")
        command = ["pip", "sync", "--quiet", "--python", python, "--link-mode", "hardlink", "--no-build"]
        try:
            self._uv.run(*command, "--offline", str(pylock), indexed=False)
        except UvError as error:
            if error.kind in ("disk full", "wrong hash"):
                raise
            self._uv.run(*command, str(pylock))

    def _compile(self, making: Path, interpreter: Interpreter) -> None:
        """Compiles with the interpreter alone, so that no installed code runs. Links modules that were
        compiled for another environment."""
        site = next(making.glob("lib/python*/site-packages"))
        tag = f"cpython-{interpreter.minor[0]}{interpreter.minor[1]}"
        pool = self._root / "bytecode" / tag
        pool.mkdir(parents=True, exist_ok=True)
        sources = [file for file in site.rglob("*.py") if "tests" not in file.relative_to(site).parts]
        for file in sources:
            target = file.parent / "__pycache__" / f"{file.stem}.{tag}.pyc"
            with contextlib.suppress(OSError):
                known = pool / _identity(file)
                if known.exists():
                    target.parent.mkdir(exist_ok=True)
                    os.link(known, target)
        command = [
            interpreter.path,
            "-I",
            "-S",
            "-m",
            "compileall",
            "-q",
            "-j",
            "2",
            "-x",
            _SKIPPED,
            str(site),
        ]
        with contextlib.suppress(subprocess.SubprocessError):
            # Files for other Python versions do not compile; they are not imported either.
            subprocess.run(
                command,
                capture_output=True,
                timeout=_COMPILE_TIMEOUT,
                check=False,
                env={"PATH": "/usr/bin:/bin"},
            )
        for file in sources:
            compiled = file.parent / "__pycache__" / f"{file.stem}.{tag}.pyc"
            with contextlib.suppress(OSError):
                if file.stat().st_nlink > 1 and compiled.stat().st_nlink == 1:
                    os.link(compiled, pool / _identity(file))

    def _sweep(self, own: str = "") -> None:
        """Removes what killed builders left. `own`: the key whose build lock the caller holds."""
        for left in self._root.glob(".making-*"):
            key = left.name.split("-")[1]
            with contextlib.suppress(OSError):
                if key == own:
                    shutil.rmtree(left, ignore_errors=True)
                    continue
                with namedlock.at_once(self._building(key)):  # fails if its builder lives
                    shutil.rmtree(left, ignore_errors=True)

    def _clean(self, names: set[str]) -> None:
        """Removes packages from the cache that no environment has, and compiled modules that none shares."""
        kept = {name for built in self.all() for name in built.lock.packages}
        doomed = sorted(names - kept)
        if doomed:
            with contextlib.suppress(UvError):
                self._uv.run("cache", "clean", "--quiet", "--force", *doomed, indexed=False)
        for file in (self._root / "bytecode").rglob("*"):
            with contextlib.suppress(OSError):
                if file.is_file() and file.stat().st_nlink == 1:
                    file.unlink()
        self._changed()

    def _changed(self) -> None:
        with self._mutex:
            self._measured = (-math.inf, 0)

    def _cached(self) -> list[Path]:
        """The directories of uv's cache that are named after packages."""
        return [entry for entry in (self._root / "uv").glob("wheels-v*/*/*") if entry.is_dir()]

    # Existing environments.

    def _use(self, key: str) -> Built | None:
        with contextlib.ExitStack() as use:
            try:
                held = namedlock.shared(self._root / f"{key}.lock")
            except OSError:
                return self._unheld(key)
            use.callback(os.close, held)
            facts = self._facts(key)
            if facts is None:
                return None
            with contextlib.suppress(OSError):
                os.utime(held)
            built = Built(key, self._root / key, facts[0], facts[1], facts[2], time.time())
            weakref.finalize(built, use.pop_all().close)
            return built

    def _unheld(self, key: str) -> Built | None:
        """For a read-only disk, as in an image with environments built ahead: nothing can be removed
        there."""
        facts = self._facts(key)
        return None if facts is None else Built(key, self._root / key, facts[0], facts[1], facts[2], 0.0)

    def _facts(self, key: str) -> tuple[Lock, int, int] | None:
        path = self._root / key
        if not path.is_dir():
            self._known.pop(key, None)
            return None
        with self._mutex:
            known = self._known.get(key)
        if known is None:
            try:
                facts = json.loads((path / _FACTS).read_text("utf-8"))
                major, minor = facts["python"]
                text = (path / _PYLOCK).read_text("utf-8")
                lock = parsed(text, (major, minor), facts["platform"], dated=facts["dated"])
                known = (lock, int(facts["bytes"]), int(facts["apparent"]))
            except (OSError, ValueError, KeyError, TypeError, LockError):
                return None
            with self._mutex:
                self._known[key] = known
        return known

    def _last_use(self, key: str) -> float:
        try:
            return (self._root / f"{key}.lock").stat().st_mtime
        except OSError:
            return 0.0

    @contextlib.contextmanager
    def _alone(self, key: str, progress: Progress) -> Iterator[None]:
        """Within it no other thread or process resolves or builds this. The lock ends with its holder."""
        self._root.mkdir(parents=True, exist_ok=True)
        waiting = partial(progress, "waiting for another process that already builds it")
        with namedlock.alone(self._building(key), waiting):
            yield

    def _building(self, key: str) -> Path:
        return self._root / f".{key}.build"


def described(lock: Lock) -> str:
    """`Python 3.9, 14 packages`."""
    return f"Python {named(lock.python)}, {counted(len(lock.packages), 'package')}"


def _identity(source: Path) -> str:
    status = source.stat()
    return f"{status.st_dev:x}-{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def _sizes(root: Path) -> tuple[int, int]:
    """(bytes that only this directory uses, bytes that it would use without hard links)."""
    own = apparent = 0
    for status in _stats(root):
        apparent += status.st_blocks * 512
        own += status.st_blocks * 512 if status.st_nlink == 1 else 0
    return own, apparent


def _occupied(root: Path) -> int:
    seen: set[tuple[int, int]] = set()
    total = 0
    for status in _stats(root):
        inode = (status.st_dev, status.st_ino)
        if inode not in seen:
            seen.add(inode)
            total += status.st_blocks * 512
    return total


def _stats(root: Path) -> Iterator[os.stat_result]:
    for directory, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                yield os.lstat(os.path.join(directory, name))
