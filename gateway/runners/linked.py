"""The files of packages that one process of a pack may read: links in a directory of its own.

The links to a package stay for a minute after its model has left. What is evicted often is loaded often, and
each new link changes the file's times, so that its content would be verified again. Must not know models.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from loaders.worker.wire import Segment

#: The most packages without a model whose links are kept, for how many seconds, and the most bytes of their
#: files together: the disk cannot free what has links.
KEPT: Final = 256
KEPT_SECONDS: Final = 60.0
KEPT_BYTES: Final = 64 << 20
#: The number of packages whose links are removed at a time, because a thread costs more than the links.
_AT_ONCE: Final = 32

Key: TypeAlias = "tuple[str, int, int]"


class Made(NamedTuple):
    """The files that a package got. `copied`: at least one is a copy."""

    bytes: int
    copied: bool


class Links:
    """The links to one package, in `directory`. `users`: its models that are loaded or being loaded. `since`:
    when the last one left. `load`: what its last load was made from, and the message for it."""

    __slots__ = ("directory", "key", "load", "making", "since", "users")

    def __init__(self, key: Key, directory: str) -> None:
        self.key = key
        self.directory = directory
        self.users = 0
        self.since = 0.0
        self.load: tuple[Mapping[str, Any], Mapping[str, Any], tuple[Segment, ...]] | None = None
        self.making = asyncio.ensure_future(asyncio.to_thread(link, key[0], directory))
        self.making.add_done_callback(_retrieved)

    @property
    def failed(self) -> bool:
        making = self.making
        return making.done() and (making.cancelled() or making.exception() is not None)

    @property
    def bytes(self) -> int:
        return self.making.result().bytes if self.making.done() and not self.failed else 0

    @property
    def worth_keeping(self) -> bool:
        return not self.failed and not (self.making.done() and self.making.result().copied)


class Linked:
    """The links in `directory`, which exists. `close` removes it."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._numbers = itertools.count(1)
        self._links: dict[Key, Links] = {}
        #: Those without a model, the longest unused first.
        self._unused: dict[Key, Links] = {}
        self._removing: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Linked {len(self._links)} packages, {len(self._unused)} unused>"

    async def take(self, package: str) -> Links:
        """The links to the package's files; makes them in a thread if there are none. Raises OSError."""
        # A damaged package that was fetched again is another directory of the same name. It may get the
        # number of the old one, but not its time.
        status = os.stat(package)
        key = package, status.st_ino, status.st_ctime_ns
        links = self._links.get(key)
        if links is not None and links.failed and not links.users:
            self._remove([links])
            links = None
        if links is None:
            directory = os.path.join(self.directory, str(next(self._numbers)))
            links = self._links[key] = Links(key, directory)
        links.users += 1
        self._unused.pop(key, None)
        if not links.making.done() or links.failed:
            try:
                await asyncio.shield(links.making)
            except BaseException:
                self.give(links)
                raise
        return links

    def give(self, links: Links) -> None:
        """A model no longer uses the links. Call it once for each `take`."""
        links.users -= 1
        if links.users:
            return
        if not links.worth_keeping:
            self._remove([links])
            return
        links.since = asyncio.get_running_loop().time()
        self._unused[links.key] = links
        if len(self._unused) >= KEPT + _AT_ONCE:
            self._remove([*itertools.islice(self._unused.values(), _AT_ONCE)])

    def tend(self) -> None:
        """Removes the links that were unused for too long, or that hold too much. Call it about once a
        second."""
        old = asyncio.get_running_loop().time() - KEPT_SECONDS
        held = sum(links.bytes for links in self._unused.values())
        going = []
        for links in self._unused.values():
            if links.since > old and held <= KEPT_BYTES and links.worth_keeping:
                break
            held -= links.bytes
            going.append(links)
        if going:
            self._remove(going)

    def _remove(self, links: Iterable[Links]) -> None:
        going = list(links)
        for one in going:
            self._unused.pop(one.key, None)
            del self._links[one.key]
        removing = asyncio.ensure_future(_removed(going))
        self._removing.add(removing)
        removing.add_done_callback(self._removing.discard)

    async def close(self) -> None:
        """Removes everything, also what threads still make. No `take` may follow."""
        pending = {one.making for one in self._links.values()} | self._removing
        if pending:
            await asyncio.wait(pending)
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)


async def _removed(links: list[Links]) -> None:
    # A thread cannot be stopped: what it makes is removed when it has ended.
    await asyncio.wait({one.making for one in links})
    await asyncio.to_thread(_remove_all, [one.directory for one in links])


def _retrieved(making: asyncio.Future[Made]) -> None:
    if not making.cancelled():
        making.exception()


def _remove_all(directories: list[str]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def link(package: str, directory: str) -> Made:
    """Links the package's files into a directory that a pack may read; copies them if links are not possible,
    for example to another disk. Blocks. Raises OSError."""
    size, copied = 0, False
    for folder, _, files in os.walk(package):
        made = os.path.normpath(os.path.join(directory, os.path.relpath(folder, package)))
        os.mkdir(made)
        os.chmod(made, 0o755)  # whatever the umask: a pack may run as another user
        for name in files:
            source, target = os.path.join(folder, name), os.path.join(made, name)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
                os.chmod(target, 0o644)
                copied = True
            size += os.stat(target).st_size
    return Made(size, copied)
