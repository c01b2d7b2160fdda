"""The files of packages that one process of a pack may read: links in a directory of its own.

A package's links outlive its model for a while: what is evicted often is loaded often, and each new link
changes the file's times, so that its content would have to be verified again. Must not know models.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from loaders.worker.wire import Segment

#: So many packages without a model keep their links.
KEPT: Final = 256
#: Links are removed for so many packages at a time, because a thread costs more than the links.
_AT_ONCE: Final = 32


class Links:
    """The links to one package, in `directory`. `users`: its models that are loaded or being loaded. `load`:
    the configuration of its last load, and the message for it."""

    __slots__ = ("directory", "key", "load", "making", "users")

    def __init__(self, key: tuple[str, int], directory: str) -> None:
        self.key = key
        self.directory = directory
        self.users = 0
        self.load: tuple[Mapping[str, Any], tuple[Segment, ...]] | None = None
        self.making = asyncio.ensure_future(asyncio.to_thread(link, key[0], directory))
        self.making.add_done_callback(_retrieved)

    @property
    def failed(self) -> bool:
        making = self.making
        return making.done() and (making.cancelled() or making.exception() is not None)


class Linked:
    """The links in `directory`, which exists. `close` removes it."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._numbers = itertools.count(1)
        self._links: dict[tuple[str, int], Links] = {}
        #: Those without a model, the longest unused first.
        self._unused: dict[tuple[str, int], Links] = {}
        self._removing: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Linked {len(self._links)} packages, {len(self._unused)} unused>"

    async def take(self, package: str) -> Links:
        """The links to the package's files; makes them in a thread if there are none. Raises OSError."""
        # A damaged package that was fetched again is another directory of the same name.
        key = package, os.stat(package).st_ino
        links = self._links.get(key)
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
        if links.failed:
            del self._links[links.key]
            self._remove([links])
            return
        self._unused[links.key] = links
        if len(self._unused) >= KEPT + _AT_ONCE:
            oldest = [*itertools.islice(self._unused.values(), _AT_ONCE)]
            for one in oldest:
                del self._unused[one.key], self._links[one.key]
            self._remove(oldest)

    def _remove(self, links: list[Links]) -> None:
        removing = asyncio.ensure_future(_removed(links))
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


def _retrieved(making: asyncio.Future[None]) -> None:
    if not making.cancelled():
        making.exception()


def _remove_all(directories: list[str]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def link(package: str, directory: str) -> None:
    """Links the package's files into a directory that a pack may read; copies them if links are not possible,
    for example to another disk. Blocks. Raises OSError."""
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
