"""Talks with the peers: finds their addresses, tells each what this gateway knows, and hears its answer.

Each address has a task of its own, so a peer that hangs holds up no other. A question and its answer say the
same kind of thing, so one gateway that reaches the other is enough. What is new is said at once; otherwise
every second, and less often with many peers. This gateway's own address is recognised by its answer.

Bounds: `MOST_PEERS` addresses, `MOST_KNOWN` gateways, `messages.LARGEST` bytes per message, `TIMEOUT` per
question. Runs on the event loop; names are resolved and the key is read by `io`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from gateway import backoff
from gateway.events import Event, RolloutChanged, SwapRefused
from gateway.logs import Bursts
from gateway.peers import messages
from gateway.peers.keys import InvalidKeys, KeyFile
from gateway.peers.messages import HEADER, QUESTION, Head
from gateway.peers.refusals import MEANINGS, Refused
from gateway.settings import SettingsError

if TYPE_CHECKING:
    from gateway.peers.refusals import RefusalKind
    from gateway.rollouts.verdicts import Standing
    from gateway.settings import Settings

log = logging.getLogger("gateway.peers")

#: Sends questions to at most this many addresses. Further gateways exchange their news through these.
MOST_PEERS: Final = 64
#: Remembers at most this many gateways, with those that ended a moment ago.
MOST_KNOWN: Final = 4 * MOST_PEERS
#: Seconds between two questions to one peer. At most `PER_SECOND` questions are sent in a second.
EVERY: Final = 1.0
PER_SECOND: Final = 10.0
#: A question takes at most this long, in seconds.
TIMEOUT: Final = 2.0
#: A gateway that starts waits at most this long for its peers, in seconds.
MEETING: Final = 1.0
#: The longest pause after a peer did not answer, in seconds.
LONGEST_PAUSE: Final = 10.0
#: The name is resolved this often, in seconds.
RESOLVE_EVERY: Final = 5.0
#: What a peer said counts for this time, in seconds.
FRESH: Final = 15.0
#: A message whose time differs more than this from the clock here is refused, in seconds.
WINDOW: Final = 30.0
#: The shortest pause between two questions to one peer when there is news, in seconds.
AT_MOST_EVERY: Final = 0.1
#: What this gateway says is put together this often, in seconds, unless there is a new verdict.
SAID_FOR: Final = 1.0
#: What a peer repeats is read again this often, in seconds.
READ_AGAIN: Final = 10.0


@dataclass(slots=True)
class Address:
    """An address behind the name. `reached`: when a peer answered last, on the clock. `gateway`: its name,
    and `host` that of its machine. `problem`: why it did not answer last. `own`: it is this gateway."""

    address: str
    url: str
    reached: float | None = None
    gateway: str | None = None
    host: str | None = None
    problem: str | None = None
    own: bool = False
    failures: int = 0


@dataclass(slots=True)
class Known:
    """What another gateway said last. `asked`: the time of its last question, in nanoseconds. `serving`: the
    version by alias. `body`: a digest of what was `read` last, and when."""

    asked: int
    heard: float
    serving: Mapping[tuple[str, str], str]
    host: str = ""
    body: bytes = b""
    read: float = 0.0


class Peers:
    """`say` gives what this gateway says; `hear` gets what a peer says. `resolve` gives the addresses behind
    a name. Raises SettingsError for a key file that cannot be used."""

    def __init__(
        self,
        settings: Settings,
        io: Executor,
        *,
        say: Callable[[], Sequence[Standing]],
        hear: Callable[[Iterable[Standing]], None],
        resolve: Callable[[str], list[str]] | None = None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert settings.peers is not None
        assert settings.peers_key_file is not None
        self._host, self._port = settings.peers_place
        self._keys = opened(settings.peers_key_file)
        self._io = io
        self._say = say
        self._hear = hear
        self._resolve = resolve or addresses
        self._wall = wall
        self._clock = clock
        #: The name of this gateway, until it ends.
        self.me = secrets.token_hex(16)
        self.addresses: dict[str, Address] = {}
        self.counts = dict.fromkeys(("accepted", "refused", "failed"), 0)
        self._known: dict[str, Known] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._tried: set[str] = set()
        self._met = asyncio.Event()
        self._last_sent = 0
        self._said: tuple[float, bytes] | None = None
        self._bursts = Bursts(clock)
        self._chance = random.Random()

    @classmethod
    def of(
        cls,
        settings: Settings,
        io: Executor,
        *,
        say: Callable[[], Sequence[Standing]],
        hear: Callable[[Iterable[Standing]], None],
    ) -> Peers | None:
        """The peers that the settings name, if they do. Raises SettingsError."""
        return None if settings.peers is None else cls(settings, io, say=say, hear=hear)

    # The present state.

    def reached(self) -> list[Address]:
        """The addresses of other gateways that answered lately."""
        return [
            one
            for one in self._others()
            if one.reached is not None and self._clock() - one.reached <= self._patience
        ]

    def lost(self) -> list[Address]:
        """The addresses behind the name that did not answer lately."""
        reached = {one.address for one in self.reached()}
        return [one for one in self._others() if one.address not in reached]

    def last_contact(self) -> float | None:
        """The seconds since the last message of any peer. None: there was no message."""
        heard = [known.heard for known in self._known.values()]
        return None if not heard else max(0.0, self._clock() - max(heard))

    def versions(self) -> dict[tuple[str, str], dict[str, int]]:
        """For each alias that peers serve: how many of them serve each version."""
        found: dict[tuple[str, str], dict[str, int]] = {}
        for known in self._fresh():
            for key, version in known.serving.items():
                counts = found.setdefault(key, {})
                counts[version] = counts.get(version, 0) + 1
        return found

    def versions_of(self, name: str, alias: str) -> dict[str, int]:
        """How many peers serve each version of an alias."""
        counts: dict[str, int] = {}
        for known in self._fresh():
            version = known.serving.get((name, alias))
            if version is not None:
                counts[version] = counts.get(version, 0) + 1
        return counts

    def to_json(self, *, addresses: bool = False) -> dict[str, Any]:
        """How many peers there are. `addresses`: with each of them."""
        reached, lost, age = self.reached(), self.lost(), self.last_contact()
        shown: dict[str, Any] = {
            "name": self._host,
            "known": len(reached) + len(lost),
            "reached": len(reached),
            "last_contact_seconds": None if age is None else round(age, 1),
        }
        if addresses:
            shown["addresses"] = [self._shown(one, one in reached) for one in (*reached, *lost)]
        return shown

    def _shown(self, one: Address, reached: bool) -> dict[str, Any]:
        ago = None if one.reached is None else round(self._clock() - one.reached, 1)
        return {
            "address": one.address,
            "host": one.host,
            "reached": reached,
            "seconds_ago": ago,
            "problem": one.problem,
        }

    def _others(self) -> list[Address]:
        return [one for one in self.addresses.values() if not one.own]

    def _fresh(self) -> list[Known]:
        now = self._clock()
        return [known for known in self._known.values() if now - known.heard <= self._patience]

    @property
    def _every(self) -> float:
        return max(EVERY, len(self.addresses) / PER_SECOND)

    @property
    def _patience(self) -> float:
        """The seconds for which a message of a peer counts. With many peers the questions are rarer."""
        return max(FRESH, 3 * self._every)

    # Background.

    def notice(self, event: Event) -> None:
        """Tells the peers about a verdict at once."""
        if isinstance(event, SwapRefused) or (
            isinstance(event, RolloutChanged) and event.phase in ("refused", "rolled_back", "aborted")
        ):
            self._said = None
            for news in self._news.values():
                news.set()

    async def meet(self) -> None:
        """Returns once every address was tried, or after `MEETING` seconds: a gateway that begins then knows
        what its peers have found."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MEETING):
                await self._met.wait()

    async def run(self) -> None:
        """Talks with the peers until it is cancelled."""
        limits = httpx.Limits(max_connections=MOST_PEERS + 1, max_keepalive_connections=MOST_PEERS)
        # A proxy is for other places than the pods of this installation.
        async with httpx.AsyncClient(
            timeout=TIMEOUT, limits=limits, follow_redirects=False, trust_env=False
        ) as client:
            try:
                while True:
                    await self._look(client)
                    pause = RESOLVE_EVERY if len(self.addresses) > 1 else EVERY
                    await asyncio.sleep(pause * self._chance.uniform(0.8, 1.0))
            finally:
                tasks = list(self._tasks.values())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                # A run that fails is begun again, with tasks of its own.
                for kept in (self._tasks, self._news, self.addresses):
                    kept.clear()

    async def _look(self, client: httpx.AsyncClient) -> None:
        """Reads the key if it has changed, and follows the addresses behind the name. Names that cannot be
        resolved now change nothing."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._io, self._keys.look)
        try:
            found = await loop.run_in_executor(self._io, self._resolve, self._host)
        except (OSError, UnicodeError) as error:
            if (more := self._bursts.ending("resolve")) is not None:
                reason = getattr(error, "strerror", None) or error
                log.warning("cannot resolve the name of the peers %s: %s%s", self._host, reason, more)
            self._met.set()
            return
        if len(found) > MOST_PEERS and (more := self._bursts.ending("most")) is not None:
            log.warning("%s has %d addresses; questions go to %d%s", self._host, len(found), MOST_PEERS, more)
        found = found[:MOST_PEERS]
        for gone in self.addresses.keys() - found:
            del self.addresses[gone], self._news[gone]
            self._tasks.pop(gone).cancel()
        for address in found:
            if address not in self.addresses:
                shown = f"[{address}]" if ":" in address else address
                self.addresses[address] = Address(address, f"http://{shown}:{self._port}/peers")
                self._news[address] = asyncio.Event()
                self._tasks[address] = loop.create_task(self._follow(client, self.addresses[address]))
        self._is_met()

    def _is_met(self) -> None:
        if self._tried >= self.addresses.keys():
            self._met.set()

    async def _follow(self, client: httpx.AsyncClient, one: Address) -> None:
        """Asks one address again and again."""
        news = self._news[one.address]
        while True:
            news.clear()
            try:
                problem = await self._ask(client, one)
            except Exception:
                log.exception("cannot talk with the peer %s", one.address)
                problem = "the gateway failed"
            if not self._met.is_set():
                self._tried.add(one.address)
                self._is_met()
            self._note(one, problem)
            pause = self._every * self._chance.uniform(0.8, 1.0)
            if one.failures:
                pause = max(pause, backoff.pause(one.failures, longest=LONGEST_PAUSE, chance=self._chance))
            if one.own:  # nothing is new there; another gateway may get the address
                await asyncio.sleep(LONGEST_PAUSE)
                continue
            await asyncio.sleep(AT_MOST_EVERY)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await news.wait()

    def _note(self, one: Address, problem: str | None) -> None:
        if problem is None:
            if one.problem is not None and one.failures > 1:
                log.info("the peer %s answers again", one.address)
            one.problem, one.failures = None, 0
            return
        self.counts["failed"] += 1
        one.failures += 1
        # The first failure is often that of a gateway that begins or ends.
        if one.failures > 1 and (more := self._bursts.ending("failed")) is not None:
            log.warning("the peer %s does not answer: %s%s", one.address, problem, more)
        one.problem = problem

    async def _ask(self, client: httpx.AsyncClient, one: Address) -> str | None:
        """Asks an address once. Returns why that failed, or None."""
        body = self._statement()
        head = self._signed(QUESTION, body)
        if head is None:
            return "there is no valid peers_key_file here"
        headers = {HEADER: str(head), "content-type": "application/json", "accept-encoding": "identity"}
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                client.stream("POST", one.url, content=body, headers=headers) as response,
            ):
                if response.status_code != 200:
                    why = MEANINGS.get(response.status_code)
                    return f"it answered {response.status_code}" + (f": {why}" if why else "")
                given = Head.parse(response.headers.get(HEADER, ""))
                if given is None:
                    return "it is not a gateway with this key"
                answer = bytearray()
                async for part in response.aiter_raw():  # as it came: unpacked it could be of any size
                    answer += part
                    if len(answer) > messages.LARGEST:
                        return "its answer is too large"
        except TimeoutError:
            return f"no answer within {TIMEOUT:g} s"
        except httpx.ConnectError:
            return "no connection: nothing listens there, or a NetworkPolicy is in the way"
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return f"its answer is not HTTP, or was cut ({type(error).__name__})"
        content = messages.signed_content(head.signature.encode(), given.gateway, given.sent, bytes(answer))
        if not self._keys.verify(content, given.signature):
            return "its answer is not signed with the key of the peers"
        one.own = given.gateway == self.me
        if not one.own:
            try:
                one.host = self._take(given, bytes(answer)).host
            except Refused as error:
                return f"its answer was refused: {error}"
        one.reached, one.gateway = self._clock(), given.gateway
        return None

    # Messages.

    def lists(self, sender: str) -> bool:
        """Returns True if the name of the peers leads to this address."""
        try:
            address = ipaddress.ip_address(sender)
        except ValueError:
            return False
        # A socket for both families shows an IPv4 address as one of IPv6.
        return str(getattr(address, "ipv4_mapped", None) or address) in self.addresses

    def checked(self, header: str, sender: str) -> Head:
        """The header of a question, before its body is read. `sender`: an address, for the log. Raises
        Refused."""
        if not header:
            raise self._refused("signature", f"the header {HEADER} is missing", sender)
        head = Head.parse(header)
        if head is None:
            raise self._refused("header", f"the header {HEADER} is not GATEWAY;TIME;SIGNATURE", sender)
        if abs(head.sent / 1e9 - self._wall()) > WINDOW:
            why = f"its time differs by more than {WINDOW:g} s from the clock here"
            raise self._refused("stale", why, sender)
        return head

    def answer(self, head: Head, body: bytes, sender: str) -> tuple[str, bytes]:
        """Hears a question, and returns the header and the body of the answer. Raises Refused."""
        content = messages.signed_content(QUESTION, head.gateway, head.sent, body)
        if not self._keys.verify(content, head.signature):
            raise self._refused("signature", "it is not signed with the key of the peers", sender)
        if head.gateway != self.me:
            known = self._known.get(head.gateway)
            if known is not None and head.sent <= known.asked:
                # A gateway asks in the order of its times.
                why = "it was sent before the last question of the same gateway"
                raise self._refused("replayed", why, sender)
            try:
                self._take(head, body)
            except Refused as error:
                raise self._refused(error.kind, str(error), sender) from None
            self._known[head.gateway].asked = head.sent
        said = self._statement()
        signed = self._signed(head.signature.encode(), said)
        assert signed is not None  # a key has verified the question
        return str(signed), said

    def _refused(self, kind: RefusalKind, why: str, sender: str) -> Refused:
        self.counts["refused"] += 1
        if (more := self._bursts.ending(kind)) is not None:
            log.warning("refused a message to /peers from %s: %s%s", sender, why, more)
        return Refused(kind, why)

    def _take(self, head: Head, body: bytes) -> Known:
        """Hears a message whose signature fits. Raises Refused for a body that is not a message, and for one
        gateway too many."""
        known, now = self._known.get(head.gateway), self._clock()
        digest = hashlib.sha256(body).digest()
        if known is not None and known.body == digest and now - known.read < READ_AGAIN:
            known.heard = now  # mostly, nothing is new
            self.counts["accepted"] += 1
            return known
        try:
            message = messages.decode(body)
        except ValueError as error:
            why = f"it is signed, but it is not a message of a peer: {str(error)[:100]}"
            raise Refused("malformed", why) from None
        if known is None:
            self._make_room()
            known = self._known[head.gateway] = Known(0, now, {})
        known.heard = known.read = now
        known.body, known.host = digest, message.host
        known.serving = {
            (one.name, one.alias): one.serving for one in message.standings if one.serving is not None
        }
        self.counts["accepted"] += 1
        try:
            self._hear(message.standings)
        except Exception:
            log.exception("cannot take what a peer says")
        return known

    def _make_room(self) -> None:
        """Forgets what gateways said that are gone. Raises Refused if too many are known."""
        now = self._clock()
        for gateway, known in list(self._known.items()):
            if now - known.heard > 2 * WINDOW:  # each question of it is stale by now
                del self._known[gateway]
            elif now - known.heard > self._patience:
                known.serving, known.body = {}, b""
        if len(self._known) >= MOST_KNOWN:
            raise Refused("crowd", f"{MOST_KNOWN} other gateways are known")

    def _statement(self) -> bytes:
        """This gateway's current message to its peers."""
        now = self._clock()
        if self._said is None or now - self._said[0] > SAID_FOR:
            self._said = now, messages.encode(socket.gethostname(), self._say())
        return self._said[1]

    def _signed(self, kind: bytes, body: bytes) -> Head | None:
        self._last_sent = sent = max(self._last_sent + 1, int(self._wall() * 1e9))
        signature = self._keys.sign(messages.signed_content(kind, self.me, sent, body))
        return None if signature is None else Head(self.me, sent, signature)


def addresses(host: str) -> list[str]:
    """The addresses behind a name, in order. Blocks. Raises OSError."""
    found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return sorted(found, key=_order)


def _order(address: str) -> tuple[int, int]:
    plain = ipaddress.ip_address(address.partition("%")[0])
    return plain.version, int(plain)


def opened(file: Path) -> KeyFile:
    """The key file. Raises SettingsError if it cannot be used."""
    try:
        return KeyFile(file)
    except (OSError, InvalidKeys) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise SettingsError([("peers_key_file", f"{file}: {reason}")]) from None
