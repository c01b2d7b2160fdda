"""Verified packages on the local disk: from a registered version to a package that may be loaded.

Fetches the files, verifies the digest, reads `MLmodel`, applies the operator's policy to the format, and
compares the environment. Must not execute, deserialise or load anything of a package.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from cachetools import LRUCache, TTLCache

from gateway.artifacts.base import ArtifactError, DigestMismatch, NotAllowed, Unreachable
from gateway.artifacts.cache import Artifacts, Local
from gateway.artifacts.formats import Unsafe, judged
from gateway.errors import Problem
from loaders import flavors, recorded, scan
from loaders.output import mismatches
from loaders.package import FILE, Package, PackageError, read

if TYPE_CHECKING:
    from gateway.environments.choose import Needs, Runtime
    from gateway.registries.base import Version
    from gateway.settings import Settings
    from loaders.batch import Batch
    from loaders.flavors.base import Flavor
    from loaders.signature import Signature

log = logging.getLogger("gateway.packages")

#: Seconds for which a store that did not answer is treated as unavailable, where that avoids a query.
AWAY = 30.0
#: The number of packages whose facts are kept, because an evicted model is loaded again.
_KEPT = 1000
#: The bytes of the descriptions that are kept, as files; in memory they take several times as much.
_KEPT_BYTES = 16 << 20
#: For this time, in seconds, the files of the last packages that were verified count as verified, and stay in
#: use: other gateways with the same cache cannot remove them then.
VERIFIED_SECONDS = 5.0
_RECENT = 200
#: Bytes that a loaded model takes in addition to its parameters: a thread, buffers, Python objects.
OVERHEAD = 1 << 20


@dataclass(frozen=True, slots=True)
class FormatPolicy:
    """The operator's policy for formats. `unsafe`: whether formats whose loading executes code (`trust =
    "code"`) are allowed; `accepted`: exceptions that are allowed anyway (`formats`)."""

    unsafe: Literal["allow", "refuse"] = "allow"
    require_signature: bool = False
    require_digest: bool = False
    accepted: tuple[str, ...] = ()


NOT_SCANNED = scan.Verdict(False, "its files were not scanned")


@dataclass(frozen=True, slots=True)
class Prepared:
    """An accepted package. `size`: the bytes of its files. `estimate`: the memory that it will take, from the
    last measurement of this digest, else size × the flavor's factor. `warnings`: texts. `needs`: the facts
    of its environment. `runtime`: where it runs, once chosen. `forced`: the operator accepts that its own
    environment is not available. `verdict`: whether its files execute only framework classes. `accepted`:
    the signature of what the model accepts, where a load showed another than its package's."""

    version: Version
    package: Package
    local: Local
    flavor: str
    digest: str
    size: int
    estimate: int
    load_seconds: float | None
    warnings: tuple[str, ...] = ()
    needs: Needs | None = None
    runtime: Runtime | None = None
    forced: bool = False
    verdict: scan.Verdict = NOT_SCANNED
    accepted: Signature | None = None

    @property
    def signature(self) -> Signature | None:
        """What requests must fit: of a model that was loaded, what it accepts; else its package's."""
        return self.package.signature if self.accepted is None else self.accepted

    @property
    def stated(self) -> Signature | None:
        """What callers may rely on: the package's signature. A bare model file states it once loaded."""
        return self.accepted if self.package.bare else self.package.signature

    def environment(self) -> dict[str, Any]:
        """What the package was made with, how this interpreter differs, and where it runs once that was
        found, JSON-ready."""
        view: dict[str, Any] = {"python_version": self.package.python_function.get("python_version")}
        if self.needs is not None:
            view["python_version"] = self.needs.facts.python or None
            view |= self.needs.check.to_json()
        if self.runtime is not None:
            view |= self.runtime.to_json()
        return view

    def check_output(self, answer: Batch) -> list[str]:
        """How an answer differs from the output schema; a warning, never a refusal."""
        signature = self.package.signature
        return [] if signature is None else mismatches(signature, answer)

    def check_answer(self, answer: Batch) -> list[str]:
        """How the answer to the package's own example differs from the recorded one, naming fields and
        showing no data; a warning, never a refusal."""
        try:
            known = recorded.read(self.package)
        except recorded.Unreadable as error:
            return [str(error)]
        differing = [] if known is None else recorded.differences(known, answer)
        return [recorded.told(differing)] if differing else []


@dataclass(frozen=True, slots=True)
class Fetched:
    """Progress of a download, in bytes; `total` is None when the source does not report it."""

    bytes: int
    total: int | None


class Packages:
    """`fetches` runs downloads, `disk` reads files that are already here, so that a download that hangs
    delays no other package. `policy` gives a version's policy (by name and digest); `measured`
    (bytes, load seconds) by digest; `accepted` the signature that a load showed; `scanned` what the files of
    a digest execute (True: recorded). `measured` and `accepted` do not wait for what they were asked before.

    `remembered` and `remember` read and write the digest of an earlier fetch, for a version without one in
    the registry. If versions never change (`lasting`), it is the digest of the first fetch, and every later
    fetch must match it. Otherwise it is the digest of the last fetch, which serves when the source does not
    answer. Both are called in these executors."""

    def __init__(
        self,
        artifacts: Artifacts,
        fetches: Executor,
        disk: Executor,
        *,
        policy: Callable[[str, str], FormatPolicy] = lambda name, digest: FormatPolicy(),
        measured: Callable[[str], tuple[int | None, float] | None] = lambda digest: None,
        accepted: Callable[[str], Signature | None] = lambda digest: None,
        scanned: Callable[[str, Package, bool], scan.Verdict] = lambda digest, package, remember: NOT_SCANNED,
        remembered: Callable[[Version], str | None] = lambda version: None,
        remember: Callable[[Version, str], None] = lambda version, digest: None,
        lasting: bool = False,
        examine: Callable[[Package], Needs] | None = None,
    ) -> None:
        self._artifacts = artifacts
        self._fetches = fetches
        self._disk = disk
        self._policy = policy
        self._measured = measured
        self._accepted = accepted
        self._scanned = scanned
        self._remembered = remembered
        self._remember = remember
        self._lasting = lasting
        self._examine = examine
        #: By digest.
        self._read: LRUCache[str, tuple[Package, Flavor]] = LRUCache(_KEPT_BYTES, _weight)
        self._examined: LRUCache[str, Needs] = LRUCache(_KEPT)
        self._lock = threading.Lock()
        #: By version, those whose files were verified a moment ago: what is evicted often is loaded often.
        self._recent: TTLCache[Version, Prepared] = TTLCache(_RECENT, VERIFIED_SECONDS)
        #: The time (monotonic seconds) until which a store counts as unavailable.
        self._away: dict[str, float] = {}
        #: The fetches in progress: the fetching threads write it, any thread may read it.
        self.fetching: dict[Version, Fetched] = {}

    async def get(self, version: Version, *, remember: bool = True) -> Prepared:
        """`remember`: whether what the files are is recorded. Raises Problem MODEL_UNAVAILABLE with the
        reason."""
        if remember and (recent := self._verified(version)) is not None:
            return self._as_measured(recent)
        # Run in the caller's context, so that downloads carry the trace of its request.
        run = copy_context().run
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._disk, run, self._prepared, version, self._find, remember)
        if prepared is not None and remember and (self._lasting or version.digest is not None):
            self._recent[version] = prepared
            # Until then its files are in use, and cannot be removed from the disk.
            # A timer of the loop may be some milliseconds early.
            loop.call_later(VERIFIED_SECONDS + 0.1, self._recent.expire)
        if prepared is None:
            self._recent.clear()  # a fetch may need the space of what is not loaded any more
            fetch = partial(self._fetch, remember=remember)
            prepared = await loop.run_in_executor(
                self._fetches, run, self._prepared, version, fetch, remember
            )
        assert prepared is not None
        return prepared

    async def cached(self, version: Version) -> bool:
        """Whether `get` takes the files from the cache, and does not read their source."""

        def found() -> bool:
            with suppress(ArtifactError):
                return self._find(version) is not None
            return False

        return await asyncio.get_running_loop().run_in_executor(self._disk, found)

    def _verified(self, version: Version) -> Prepared | None:
        """The version's package if its files were verified a moment ago and are there: an operator may remove
        the cache to free the disk."""
        recent = self._recent.get(version)
        return recent if recent is not None and os.path.isdir(recent.local.path) else None

    def _prepared(
        self, version: Version, here: Callable[[Version], Local | None], remember: bool
    ) -> Prepared | None:
        try:
            self._check_digest(version)
            local = here(version)
            if local is None:
                return None
            package, flavor = self._content(local)
        except ArtifactError as error:
            hopeless = isinstance(error, NotAllowed | DigestMismatch)
            raise _unavailable(version, error.public, retryable=False if hopeless else None) from error
        except PackageError as error:
            raise _unavailable(version, str(error), retryable=False) from error
        as_read, package = package, self._admitted(version, package, flavor, local.digest)
        estimate = OVERHEAD + int(local.bytes * flavor.memory_factor)
        try:
            verdict = self._scanned(local.digest, as_read, remember)
        except OSError as error:
            raise _unavailable(version, f"cannot read its files: {error.strerror}") from error
        prepared = Prepared(
            version,
            package,
            local,
            flavor.name,
            local.digest,
            local.bytes,
            estimate,
            None,
            needs=self._needs(version, package, local.digest),
            verdict=verdict,
        )
        return self._as_measured(prepared)

    def _as_measured(self, prepared: Prepared) -> Prepared:
        """The package with what its last load showed."""
        measured, seconds = self._measured(prepared.digest) or (None, prepared.load_seconds)
        estimate = prepared.estimate if measured is None else measured
        accepted = self._accepted(prepared.digest)
        return replace(prepared, estimate=estimate, load_seconds=seconds, accepted=accepted)

    def _content(self, local: Local) -> tuple[Package, Flavor]:
        """The description of the files with this digest, and their flavor. Each digest is read once: the
        cache makes sure that the files are the same. Raises PackageError."""
        with self._lock:
            known = self._read.get(local.digest)
        if known is None:
            package = read(local.path)
            known = package, flavors.find(package)
            with self._lock, suppress(ValueError):  # it is larger than all that are kept
                self._read[local.digest] = known
        return known

    def _needs(self, version: Version, package: Package, digest: str) -> Needs | None:
        """The facts of the files with this digest; each digest is read once."""
        if self._examine is None:
            return None
        with self._lock:
            known = self._examined.get(digest)
        if known is None:
            try:
                known = self._examine(package)
            except PackageError as error:
                raise _unavailable(version, str(error)) from error
            except OSError as error:
                raise _unavailable(version, f"cannot read its files: {error.strerror}") from error
            with self._lock:
                self._examined[digest] = known
        return known

    def _check_digest(self, version: Version) -> None:
        """Refuses a version without a digest before anything is fetched: a remembered first fetch would
        otherwise count as its own proof. A digest remembered before `require_digest` was set is accepted."""
        if self._policy(version.name, "").require_digest and self._held_to(version).digest is None:
            raise _unavailable(
                version,
                "the registry has no digest for it, and require_digest is set; add it to the version, in a"
                " registry file as digest, in MLflow as the tag gateway.digest (gateway push writes it)",
                retryable=False,
            )

    def _held_to(self, version: Version) -> Version:
        """The version with the digest that its files must have, if one is known."""
        if version.digest is None and self._lasting:
            return replace(version, digest=self._remembered(version))
        return version

    def _find(self, version: Version) -> Local | None:
        wanted = self._held_to(version)
        away = time.monotonic() < self._away.get(_store(wanted), 0.0)
        if away and (last := self._last(wanted)) is not None:
            return last
        return self._artifacts.find(wanted)

    def _fetch(self, version: Version, *, remember: bool) -> Local:
        wanted = self._held_to(version)

        def progress(so_far: int, total: int | None) -> None:
            self.fetching[version] = Fetched(so_far, total)

        try:
            local = self._artifacts.fetch(wanted, progress)
        except DigestMismatch as error:
            if version.digest is not None:
                raise
            problem = (
                f"the files of {version} changed since they were first loaded: {wanted.digest} became"
                f" {error.found}; a version must never change: push the new files as a new version"
            )
            raise DigestMismatch(problem, error.found) from error
        except Unreachable as error:
            self._away[_store(version)] = time.monotonic() + AWAY
            last = self._last(wanted)
            if last is None:
                raise
            log.warning("using the files of the last fetch of %s: %s", version, error)
            return last
        finally:
            self.fetching.pop(version, None)
        if wanted.digest is None and remember:
            self._remember(version, local.digest)
        return local

    def _last(self, version: Version) -> Local | None:
        """The last fetched files of a version without a digest, if the cache still holds them."""
        last = self._remembered(version) if version.digest is None else None
        return None if last is None else self._artifacts.find(replace(version, digest=last))

    def _admitted(self, version: Version, package: Package, flavor: Flavor, digest: str) -> Package:
        policy = self._policy(version.name, digest)
        if policy.require_signature and package.signature is None:
            raise _unavailable(version, "it has no signature, and require_signature is set", retryable=False)
        if policy.unsafe == "allow":
            return package
        try:
            return judged(package, flavor, policy.accepted)
        except Unsafe as error:
            raise _unavailable(version, str(error), retryable=False) from None
        except PackageError as error:
            raise _unavailable(version, str(error), retryable=False) from error


def formats(settings: Settings) -> Callable[[str, str], FormatPolicy]:
    """The policy of the settings, as a function of a version's name and digest."""

    def policy(name: str, digest: str) -> FormatPolicy:
        listed = any(fnmatchcase(name, entry) or entry == digest for entry in settings.unsafe_allowlist)
        allowed = settings.unsafe_formats == "allow" or (settings.unsafe_formats == "allowlist" and listed)
        return FormatPolicy(
            "allow" if allowed else "refuse",
            settings.require_signature,
            settings.require_digest,
            tuple(settings.accepted_formats),
        )

    return policy


def _weight(known: tuple[Package, Flavor]) -> int:
    """The bytes of a description's file; at least those that any takes."""
    package, _ = known
    file = package.path / FILE
    return max(file.stat().st_size if file.is_file() else 0, 1 << 10)


def _store(version: Version) -> str:
    """The store that is unavailable if this source is: its host or bucket. A local path is its own store."""
    scheme, _, rest = version.source.partition("://")
    host = rest.partition("/")[0]
    return f"{scheme}://{host}" if host else version.source


def _unavailable(version: Version, reason: str, *, retryable: bool | None = None) -> Problem:
    hint = None
    if retryable is False:
        check = f"gateway check models:/{version.name}/{version.version}"
        hint = f"it needs a change by the operator or by the owner of the model; `{check}` gives every reason"
    message = f"{version} cannot be loaded: {reason}"
    return Problem("MODEL_UNAVAILABLE", message, hint=hint, retryable=retryable)
