"""Chooses where a package runs: this interpreter, its own environment, or one that the operator named.

Applies the policy `auto | same | own | NAME`, and decides what happens when the right environment is not
available. Reads facts and the check once per package. Separate threads build, so that no model waits for the
environment of another. Must not know registries, aliases or runners.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from packaging.utils import canonicalize_name

from gateway.environments import check as checks
from gateway.environments import facts as facts_
from gateway.environments.build import Built, Store, described
from gateway.environments.check import Check, Installed
from gateway.environments.facts import Facts
from gateway.environments.interpreters import named, supported
from gateway.environments.lock import Lock, LockError, Wanted
from gateway.environments.uv import UvError

if TYPE_CHECKING:
    from gateway.settings import Environments, Settings
    from loaders.package import Package

_LIST: Final = (
    "import json, platform; from importlib import metadata; "
    "print(json.dumps([platform.python_version(), "
    "[[d.metadata['Name'], d.version] for d in metadata.distributions()]]))"
)


class NoEnvironment(Exception):
    """A package cannot run here under the policy. `hint` names the commands that help."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Needs:
    """The needs of a package, and its check against this interpreter."""

    facts: Facts
    check: Check


@dataclass(frozen=True, slots=True)
class Runtime:
    """The place where a package runs. `kind`: same, own or named. `python`: the interpreter, None for this
    one. `check`: the check against it. `mismatch`: how it differs from the package's own environment, None if
    it is equivalent. `help`: the commands that help then. `distributions`: what is installed there. `lock`:
    its key. `dated`: whether its versions are as of the package's day. `unchecked`: the packages in it for
    which the model package's own lock has no hash. `built`: keeps the environment from being removed."""

    kind: str
    python: str | None
    check: Check
    mismatch: str | None = None
    help: str | None = None
    distributions: frozenset[str] = frozenset()
    lock: str | None = None
    dated: bool = True
    unchecked: tuple[str, ...] = ()
    built: Built | None = None

    @property
    def warning(self) -> str | None:
        """What each answer says of a model that is not in its own environment."""
        if self.mismatch is None:
            return None
        return f"the model runs in another environment than its own: {self.mismatch}"

    @property
    def place(self) -> str:
        """Returns where it runs, as text for users."""
        if self.built is not None:
            return f"its own environment ({described(self.built.lock)})"
        return "this interpreter" if self.kind == "same" else "the named environment"

    def to_json(self) -> dict[str, object]:
        view: dict[str, object] = {"runs_in": self.kind, "place": self.place, "mismatch": self.mismatch}
        if self.help is not None:
            view["help"] = self.help
        if self.lock is not None:
            view |= {"lock": self.lock, "as_of_creation": self.dated}
        if self.unchecked:
            view["without_hash"] = list(self.unchecked)
        return view


class Chooser:
    """`builds` is the executor that resolves and builds environments; `here` is this interpreter. `trim` is
    called after a build, to keep the disk limit."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        builds: Executor,
        here: Callable[[], Installed] = checks.here,
        trim: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._builds = builds
        self._here = here
        self._trim = trim
        self._named: dict[str, Installed] = {}
        self._mutex = threading.Lock()

    @property
    def _own(self) -> Environments:
        return self._settings.environments

    def examine(self, package: Package) -> Needs:
        """Reads a package's facts and compares them with this interpreter. Blocks. Raises PackageError."""
        facts = facts_.read(package)
        return Needs(facts, checks.check(facts, self._here()))

    def wanted(self, facts: Facts) -> Wanted:
        """Raises LockError."""
        return facts_.wanted(facts, as_of=facts.created if self._own.as_of == "created" else None)

    async def runtime(
        self,
        name: str,
        reference: str,
        needs: Needs,
        *,
        served: bool,
        forced: bool,
        say: Callable[[str], None],
    ) -> Runtime:
        """Returns where a version runs, and builds its environment if necessary. `reference`: its name in
        commands. `served`: it was served before. `forced`: the operator accepts a mismatch. `say` receives
        each step of a build, from the thread that builds. Raises NoEnvironment."""
        policy = self._settings.for_model(name).environment or "auto"
        # A bare file says nothing of its environment: there is none of its own to build.
        if needs.facts.bare and policy in ("auto", "own", "same"):
            return Runtime("same", None, needs.check)
        if needs.check.satisfied and policy in ("auto", "same"):
            return Runtime("same", None, needs.check)
        if policy == "same":
            return await self._run(self._same, needs, name, reference)
        if policy not in ("auto", "own"):
            return await self._run(self._at, policy, needs, name, reference)
        try:
            return await self._run(self._in_own, needs, say)
        except (LockError, UvError) as error:
            reason = str(error)
        return await self._run(self._instead, policy, needs, name, reference, reason, served, forced)

    # Each of the places.

    def _same(self, needs: Needs, name: str, reference: str) -> Runtime:
        if needs.check.byte_code:
            raise self._refused(needs, name, reference, "byte code of another Python is never executed")
        return self._here_all_the_same(needs, name, reference)

    def _at(self, policy: str, needs: Needs, name: str, reference: str) -> Runtime:
        entry = self._own.named[policy]
        python = str(entry.python)
        try:
            installed = self._installed(python)
        except (OSError, ValueError, subprocess.SubprocessError):
            message = f"the interpreter of the environment {policy} does not run"
            raise NoEnvironment(
                message, f"check environments.named.{policy}.python in the settings"
            ) from None
        check = checks.check(needs.facts, installed)
        if check.byte_code:
            raise self._refused(
                Needs(needs.facts, check), name, reference, "byte code of another Python is never executed"
            )
        helps = None
        if not check.satisfied:
            with self._mutex:
                self._named.pop(python, None)  # the operator may install what is missing: ask again
            helps = f"install what it needs there, or look at environments.named.{policy} in the settings"
        return Runtime("named", python, check, check.sentence, helps, frozenset(installed.versions))

    def _in_own(self, needs: Needs, say: Callable[[str], None]) -> Runtime:
        """Raises LockError and UvError."""
        wanted = self.wanted(needs.facts)
        lock = self._store.resolved(wanted)
        if lock is None:
            self._may_build(None)
            lock = self._store.resolve(wanted, say)
        found = self._store.find(lock)
        if found is None:
            self._may_build(lock)
            found = self._store.build(lock, say)
            self._trim()  # keeps what is in use, also this one
        return own(needs.facts, lock, found)

    def _may_build(self, lock: Lock | None) -> None:
        if self._own.build == "never":
            raise LockError("its own environment does not exist, and environments.build is never")
        if self._settings.unsafe_formats != "allow":
            if not self._own.allowed:
                raise LockError(
                    "unsafe_formats is restricted, and environments.allowed lists no lock to build"
                )
            if lock is not None and lock.key not in self._own.allowed:
                raise LockError(f"its lock {lock.key} is not listed in environments.allowed")

    def _instead(
        self,
        policy: str,
        needs: Needs,
        name: str,
        reference: str,
        reason: str,
        served: bool,
        forced: bool,
    ) -> Runtime:
        """Decides when the right environment is not available. Raises NoEnvironment."""
        fallback = self._own.fallback
        may = forced or (policy == "auto" and (fallback == "same" or (fallback == "served" and served)))
        if not may or needs.check.byte_code:
            raise self._refused(needs, name, reference, reason)
        return self._here_all_the_same(needs, name, reference)

    def _here_all_the_same(self, needs: Needs, name: str, reference: str) -> Runtime:
        helps = None if needs.check.satisfied else self._help(needs, name, reference, served=True)
        return Runtime("same", None, needs.check, needs.check.sentence, helps)

    def _refused(self, needs: Needs, name: str, reference: str, reason: str) -> NoEnvironment:
        wrong = needs.check.sentence or f"Python: the package was made with {needs.facts.python}"
        return NoEnvironment(f"{wrong}. {reason[:1].upper()}{reason[1:]}", self._help(needs, name, reference))

    def _help(self, needs: Needs, name: str, reference: str, *, served: bool = False) -> str:
        """The commands that help, the best first. `served`: it runs here meanwhile. Blocks."""
        helps = []
        minor = needs.facts.minor
        missing = minor is not None and supported(minor) and not self._store.has_python(minor)
        if missing and minor is not None:
            helps.append(f"uv python install {named(minor)} installs the Python that it was made with")
        if self._own.build == "never":
            helps.append(f"gateway env build {reference} builds its own environment ahead of time")
        else:
            helps.append(f"gateway env build {reference} tries to build it and shows each step")
        if not needs.check.byte_code:
            wrong = [
                f
                for f in needs.check.comparisons
                if f.verdict > checks.Verdict.COMPATIBLE and f.subject != "Python"
            ]
            pins = " ".join(
                f"'{f.subject}=={f.wanted}'" for f in wrong if f.wanted[:1].isdigit() and "x" not in f.wanted
            )
            if pins:
                helps.append(f"pip install {pins} changes this interpreter for all models")
        if not served and not needs.check.byte_code:
            helps.append(
                f"models: {{{name}: {{environment: same}}}} in the settings serves it"
                " in this interpreter, with a warning in each answer"
            )
        return "; ".join(helps)

    def _installed(self, python: str) -> Installed:
        with self._mutex:
            known = self._named.get(python)
        if known is None:
            done = subprocess.run(
                [python, "-I", "-c", _LIST],
                capture_output=True,
                timeout=60,
                check=True,
                env={"PATH": "/usr/bin:/bin"},
            )
            version, pairs = json.loads(done.stdout)
            known = Installed(version, {canonicalize_name(n): v for n, v in pairs if n})
            with self._mutex:
                self._named[python] = known
        return known

    async def _run(self, function: Callable[..., Runtime], *args: object) -> Runtime:
        return await asyncio.get_running_loop().run_in_executor(self._builds, function, *args)


def own(facts: Facts, lock: Lock, built: Built) -> Runtime:
    """The runtime of a package in an environment that was built for it."""
    packages = built.lock.packages
    installed = Installed(f"{named(built.lock.python)}.0", packages)
    hashes = {name: facts.hashes.get(f"{name}=={version}") for name, version in packages.items()}
    unchecked = [name for name, files in hashes.items() if files is not None and not files]
    return Runtime(
        "own",
        built.python,
        checks.check(facts, installed),
        distributions=frozenset(packages),
        lock=built.key,
        dated=lock.dated,
        unchecked=tuple(sorted(unchecked)),
        built=built,
    )
