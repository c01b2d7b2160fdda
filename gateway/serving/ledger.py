"""The ledger of memory: which servables hold bytes, wait for bytes, or must give them back. Pure and
synchronous.

Theory of operation. Every servable has one account. It *asks* for bytes, is *granted* them (reserved),
becomes *resident* when it has loaded, may ask for more after a measurement, and is *closing* until the memory
is really free. Bytes count from the grant to the end of closing, because memory that is being freed is not
free yet. So `accounted` = reserved + resident + closing, and it never exceeds the limit.

`plan` only decides: which waiting accounts may be granted, which idle ones are evicted, which busy ones
drain, and which requests cannot be met. The caller carries the plan out, and asks again after every change.
Waiting is first come, first served without overtaking, so small models cannot starve a large one.

An account may be evicted if it is not leased, not pinned and not young (`Ledger.young_until`). A version
that an alias serves is never evicted for a load that neither a request nor an alias needs: such a load gets
free memory, or it ends, and those behind it do not wait for it. Busy models take turns: when everything is
leased, one that has had its turn (`Ledger.turn`) drains for a load that requests wait for.

Some bytes belong to no model (those of the zygotes, and of packs in addition to their models). They count as
resident as soon as memory is free; until then idle accounts are evicted for them, and nothing is granted. A
load that does not fit next to them is refused: no eviction would make room for it. `KEPT` bytes of the limit
stay for models in any case, so that a limit below the size of one zygote does not stop all loads. What is not
counted is told as `uncounted`.

This module must not know models, clocks or the event loop; `now` is an argument, in seconds. The same calls
lead to the same plans.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from gateway.serving.eviction import HALF_LIFE, Policy, decayed, gdsf, reason

K = TypeVar("K", bound=Hashable)


class AccountState(enum.Enum):
    """The state of an account. RESERVED includes waiting (nothing granted yet) and loading."""

    RESERVED = "reserved"
    RESIDENT = "resident"
    CLOSING = "closing"


@dataclass(slots=True, eq=False)
class Account(Generic[K]):
    """One servable's bytes. If `wanted` is above `bytes`, it waits for the difference. `leases`: the requests
    that use it. `pins`: keep it resident without a lease (a swap, an operator). `serving`: an alias serves
    it. `draining`: it closes when its leases end. `uses`: its requests with a half-life, as of `last_used`.
    `load_seconds`: the measured time of its load. `name`: what its requests are remembered by after it."""

    key: K
    wanted: int
    since: float
    last_used: float
    bytes: int = 0
    state: AccountState = AccountState.RESERVED
    leases: int = 0
    pins: int = 0
    lingering: bool = False
    serving: bool = False
    draining: bool = False
    uses: float = 0.0
    load_seconds: float = 0.0
    name: Hashable = None


class Plan(NamedTuple, Generic[K]):
    """What to do next. `evict`: idle accounts to close now. `drain`: leased accounts that take no new
    requests and close when they are idle. `asking`: the account that needs the memory, None for the shared
    processes. `why`: for each evicted account, why it was chosen. `retry_at`: when to plan again, because a
    model is still too young to evict. `end`: loads that nothing needs now and that no memory is left for."""

    grant: tuple[K, ...] = ()
    evict: tuple[K, ...] = ()
    refuse: tuple[K, ...] = ()
    retry_at: float | None = None
    drain: tuple[K, ...] = ()
    asking: K | None = None
    why: tuple[str, ...] = ()
    end: tuple[K, ...] = ()


class _Room(NamedTuple, Generic[K]):
    """The accounts to evict or drain for a need that free memory does not meet."""

    evict: tuple[K, ...] = ()
    drain: tuple[K, ...] = ()
    why: tuple[str, ...] = ()
    retry_at: float | None = None


#: So many bytes of the limit are for models, and at least half of a smaller limit.
KEPT = 16 << 20
#: Of more models than this, the policy chooses among so many that are picked at random.
LOOKED_AT = 200
#: How many evicted or unloaded models are remembered with their requests.
REMEMBERED = 10_000
#: A busy model keeps its memory for this multiple of its load time, and at least for this many seconds.
TURN_LOADS = 5.0
SHORTEST_TURN = 2.0


class Ledger(Generic[K]):
    """Accounts under one limit, in bytes. Wrong use raises `ValueError`: it is a bug of the caller."""

    def __init__(
        self,
        limit: int,
        *,
        policy: Policy = gdsf,
        min_residency: float = 0.0,
        shortest_turn: float = SHORTEST_TURN,
    ) -> None:
        if limit <= 0:
            raise ValueError("the limit must be positive")
        self.limit = limit
        self.min_residency = min_residency
        self.shortest_turn = shortest_turn
        self._policy = policy
        self._accounts: dict[K, Account[K]] = {}
        self._waiting: dict[K, None] = {}
        self._bytes = dict.fromkeys(AccountState, 0)
        self._past: dict[Hashable, tuple[float, float]] = {}
        self._chance = random.Random(0)
        self._shared = 0
        self._shared_wanted = 0
        self._shared_measured = 0

    def __repr__(self) -> str:
        count = dict.fromkeys(AccountState, 0)
        for account in self._accounts.values():
            count[account.state] += 1
        resident, loading, closing = (
            count[state] for state in (AccountState.RESIDENT, AccountState.RESERVED, AccountState.CLOSING)
        )
        size = f"{_mega(self.accounted)}/{_mega(self.limit)} MB"
        return f"<Ledger {resident} resident, {loading} loading, {closing} closing | {size}>"

    def __iter__(self) -> Iterator[Account[K]]:
        return iter(self._accounts.values())

    def __contains__(self, key: object) -> bool:
        return key in self._accounts

    def __getitem__(self, key: K) -> Account[K]:
        return self._accounts[key]

    def find(self, key: K) -> Account[K] | None:
        return self._accounts.get(key)

    @property
    def accounted(self) -> int:
        return sum(self._bytes.values()) + self._shared

    @property
    def waiting(self) -> bool:
        """Returns True if there is something to plan for."""
        return bool(self._waiting) or self._shared < self._shared_wanted

    @property
    def shared(self) -> int:
        """The counted bytes that belong to no account."""
        return self._shared

    @property
    def uncounted(self) -> int:
        """The bytes that belong to no account and are resident in addition to `accounted`: the limit has no
        room for them, at least until models are evicted."""
        return self._shared_measured - self._shared

    @property
    def excess(self) -> int:
        """The part of `uncounted` for which no eviction makes room: the limit is too low."""
        return self._shared_measured - self._shared_wanted

    @property
    def room(self) -> int:
        """The bytes that all accounts together may have, next to those that belong to no account."""
        return self.limit - self._shared_wanted

    def bytes_in(self, state: AccountState) -> int:
        return self._bytes[state] + (self._shared if state is AccountState.RESIDENT else 0)

    def share(self, size: int) -> None:
        """Sets the bytes that belong to no account."""
        self._shared_measured = size
        self._shared_wanted = min(size, self.limit - min(KEPT, self.limit // 2))
        self._count_shared()

    # The life of an account, in order.

    def open(self, key: K, now: float, name: Hashable = None) -> Account[K]:
        """Opens a new account that asks for nothing yet (its size is unknown until its files are fetched).
        `name`: an earlier account with this name passes its requests on; `key` if None."""
        if key in self._accounts:
            raise ValueError(f"{key!r} has an account")
        name = key if name is None else name
        uses, last_used = self._past.pop(name, (0.0, now))
        account = self._accounts[key] = Account(
            key, 0, since=now, last_used=now, uses=decayed(uses, now - last_used), name=name
        )
        return account

    def ask(self, key: K, wanted: int) -> bool:
        """Asks for `wanted` bytes in total. Returns True if it has them already; else it waits for a
        grant."""
        account = self._accounts[key]
        if account.state is AccountState.CLOSING:
            raise ValueError(f"{key!r} is closing")
        account.wanted = max(wanted, account.bytes)
        if account.wanted > account.bytes:
            self._waiting[key] = None
            return False
        self._waiting.pop(key, None)
        return True

    def waits(self, key: K) -> bool:
        return key in self._waiting

    def grant(self, key: K) -> None:
        """Grants a waiting account its bytes. Call it only after a plan that allows it."""
        account = self._accounts[key]
        need = account.wanted - account.bytes
        if key not in self._waiting or self.accounted + need > self.limit:
            raise ValueError(f"{key!r} cannot be granted {need} bytes")
        del self._waiting[key]
        self._move(account, account.state, account.wanted)

    def withdraw(self, key: K) -> None:
        """Stops waiting; earlier grants stay."""
        self._waiting.pop(key, None)
        account = self._accounts[key]
        account.wanted = account.bytes

    def loaded(
        self, key: K, now: float, measured: int | None = None, load_seconds: float | None = None
    ) -> None:
        """Marks it as loaded. A measurement below the reservation returns the rest. `load_seconds`: the time
        of its load."""
        account = self._accounts[key]
        if account.state is not AccountState.RESERVED or key in self._waiting:
            raise ValueError(f"{key!r} is not loading")
        if measured is not None and measured > account.bytes:
            raise ValueError(f"{key!r} measures more than it was granted: ask first")
        account.uses = decayed(account.uses, now - account.last_used)
        account.since = account.last_used = now
        if load_seconds is not None:
            account.load_seconds = load_seconds
        self._move(account, AccountState.RESIDENT, account.bytes if measured is None else measured)
        account.wanted = account.bytes

    def shrink(self, key: K, measured: int) -> None:
        """Lowers the bytes of a resident account after a measurement."""
        account = self._accounts[key]
        if account.state is AccountState.RESIDENT and measured < account.bytes:
            self._move(account, AccountState.RESIDENT, measured)
            if key not in self._waiting:
                account.wanted = measured

    def begin_close(self, key: K) -> None:
        """Begins to close it; its bytes count until `closed`. A leased account is never closed."""
        account = self._accounts[key]
        if account.leases:
            raise ValueError(f"{key!r} is leased")
        if account.state is AccountState.CLOSING:
            raise ValueError(f"{key!r} is closing already")
        self.withdraw(key)
        self._move(account, AccountState.CLOSING, account.bytes)
        self._remember(account)  # it may be loaded again before its memory is free

    def closed(self, key: K) -> None:
        """Its memory is free."""
        account = self._accounts[key]
        if account.state is not AccountState.CLOSING:
            raise ValueError(f"{key!r} is not closing")
        self._move(account, AccountState.CLOSING, 0)
        del self._accounts[key]

    def drop(self, key: K) -> None:
        """Ends the account of a servable that failed to load and holds no memory, with all its leases."""
        account = self._accounts[key]
        if account.state is not AccountState.RESERVED:
            raise ValueError(f"{key!r} has loaded")
        self.withdraw(key)
        self._move(account, AccountState.RESERVED, 0)
        del self._accounts[key]
        self._remember(account)

    def _remember(self, account: Account[K]) -> None:
        self._past[account.name] = (account.uses, account.last_used)
        if len(self._past) > REMEMBERED:
            del self._past[next(iter(self._past))]

    # Use.

    def lease(self, key: K) -> None:
        account = self._accounts[key]
        if account.state is AccountState.CLOSING:
            raise ValueError(f"{key!r} is closing")
        account.leases += 1

    def release(self, key: K, now: float) -> bool:
        """Ends a lease. Returns `waiting`. Raises KeyError without an account."""
        account = self._accounts[key]
        if account.leases <= 0:
            raise ValueError(f"{key!r} has no lease")
        account.leases -= 1
        account.uses = 1.0 + account.uses * 0.5 ** ((now - account.last_used) / HALF_LIFE)
        account.last_used = now
        return bool(self._waiting) or self._shared < self._shared_wanted

    def pin(self, key: K) -> None:
        self._accounts[key].pins += 1

    def unpin(self, key: K) -> None:
        account = self._accounts[key]
        if account.pins <= 0:
            raise ValueError(f"{key!r} has no pin")
        account.pins -= 1

    # The decision.

    def young_until(self, account: Account[K]) -> float:
        """The time until which an idle account stays: an immediate reload would only cost time. A model that
        loads in milliseconds may go earlier."""
        seconds = account.load_seconds
        return account.since + (min(self.min_residency, seconds) if seconds else self.min_residency)

    def turn(self, account: Account[K]) -> float:
        """The time at which a busy account has had its turn and may drain for a load that requests wait
        for."""
        return account.since + max(self.shortest_turn, TURN_LOADS * account.load_seconds)

    def plan(self, now: float) -> Plan[K]:
        """Decides which waiting accounts to grant, which to evict for the first one that must wait, and which
        to refuse."""
        free = self.limit - self.accounted
        freeing = self._bytes[AccountState.CLOSING]
        short = self._shared_wanted - self._shared
        shared: _Room[K] = _Room()
        if short:  # nothing is free then
            shared = self._make_room(short - freeing, None, now)
            if shared.evict:
                return Plan((), shared.evict, (), shared.retry_at, shared.drain, None, shared.why)
        grant: list[K] = []
        refuse: list[K] = []
        end: list[K] = []
        later: list[float] = [] if shared.retry_at is None else [shared.retry_at]
        for key in self._waiting:
            account = self._accounts[key]
            need = account.wanted - account.bytes
            if account.wanted > self.room:
                refuse.append(key)
            elif need <= free:
                grant.append(key)
                free -= need
            else:
                missing = need + short - free - freeing
                room = self._make_room(missing, account, now)
                if room.retry_at is not None:
                    later.append(room.retry_at)
                if missing > 0 and not room.evict and _unneeded(account):
                    # Those behind it do not wait for it. One that drains ends already.
                    if room.retry_at is None and not account.draining:
                        end.append(key)
                    continue
                asking = key if room.evict or room.drain else None
                return Plan(
                    tuple(grant),
                    room.evict,
                    tuple(refuse),
                    min(later, default=None),
                    room.drain,
                    asking,
                    room.why,
                    tuple(end),
                )
        return Plan(tuple(grant), (), tuple(refuse), min(later, default=None), end=tuple(end))

    def _make_room(self, short: int, asking: Account[K] | None, now: float) -> _Room[K]:
        if short <= 0:
            return _Room()
        accounts = list(self._accounts.values())
        if len(accounts) > LOOKED_AT:
            # To compare thousands would take milliseconds for each load.
            some = {a.key: a for a in self._chance.sample(accounts, LOOKED_AT)}
            some.update({a.key: a for a in accounts if a.lingering})
            room = self._room_among(list(some.values()), short, asking, now)
            if room.evict and not room.drain:
                return room
        return self._room_among(accounts, short, asking, now)

    def _room_among(
        self, accounts: list[Account[K]], short: int, asking: Account[K] | None, now: float
    ) -> _Room[K]:
        others = [a for a in accounts if a is not asking and a.bytes and not a.pins]
        candidates = [a for a in others if a.state is AccountState.RESIDENT and not a.draining]
        unneeded = asking is not None and _unneeded(asking)
        if unneeded:  # it takes nothing from what an alias serves
            candidates = [a for a in candidates if not a.serving]
        old_enough: list[Account[K]] = []
        later: list[float] = []
        for idle in (a for a in candidates if not a.leases):
            young_until = self.young_until(idle)
            if idle.lingering or now >= young_until:
                old_enough.append(idle)
            else:
                later.append(young_until)
        chosen, missing = self._cheapest(old_enough, short, now)
        among = f"{len(old_enough)} idle" + (
            " that were compared" if len(accounts) < len(self._accounts) else ""
        )
        if missing <= 0:
            why = tuple(reason(a, now, among) for a in chosen)
            return _Room(tuple(a.key for a in chosen), (), why)
        # Evicting some would not free enough: keep them, because requests may come before there is memory.
        missing -= sum(a.bytes for a in others if a.draining and a.state is AccountState.RESIDENT)
        loading = asking is not None and asking.state is AccountState.RESERVED and not unneeded
        if not loading or missing <= 0:
            return _Room(retry_at=min(later, default=None))
        # Everything is in use: a model that has had its turn drains, so that no model waits for ever.
        busy = [a for a in candidates if a.leases]
        done = [a for a in busy if now >= self.turn(a)]
        drained, missing = self._cheapest(done, missing, now)
        if missing <= 0:
            had = tuple(f"it was busy for {now - a.since:.1f} s, and others wait for room" for a in drained)
            why = tuple(reason(a, now, among) for a in old_enough) + had
            return _Room(tuple(a.key for a in old_enough), tuple(a.key for a in drained), why)
        later += [self.turn(a) for a in busy if a not in done]
        return _Room(retry_at=min(later, default=None))

    def _cheapest(self, accounts: list[Account[K]], short: int, now: float) -> tuple[list[Account[K]], int]:
        """The first accounts by the policy that free `short` bytes, and how many bytes are still missing."""
        chosen: list[Account[K]] = []
        for account in sorted(accounts, key=lambda a: self._policy(a, now)):
            if short <= 0:
                break
            chosen.append(account)
            short -= account.bytes
        return chosen, short

    def _move(self, account: Account[K], state: AccountState, size: int) -> None:
        self._bytes[account.state] -= account.bytes
        account.state, account.bytes = state, size
        self._bytes[state] += size
        if self._shared < self._shared_wanted:
            self._count_shared()

    def _count_shared(self) -> None:
        room = self.limit - sum(self._bytes.values())
        self._shared = max(0, min(self._shared_wanted, room))

    def check(self) -> None:
        """Raises AssertionError if the books do not balance. For tests and simulations."""
        for state in AccountState:
            held = sum(a.bytes for a in self._accounts.values() if a.state is state)
            assert held == self._bytes[state], (state, held, self._bytes[state])
        assert 0 <= self.accounted <= self.limit, repr(self)
        assert 0 <= self._shared <= self._shared_wanted <= self._shared_measured
        for account in self._accounts.values():
            assert account.leases >= 0
            assert account.pins >= 0
            assert account.wanted >= account.bytes or account.state is AccountState.CLOSING, account
            assert (account.wanted > account.bytes) == (account.key in self._waiting), account
            assert not (account.state is AccountState.CLOSING and account.leases), account
        assert self._waiting.keys() <= self._accounts.keys()


def _unneeded(account: Account[K]) -> bool:
    """Returns True for a load for which neither a request nor an alias waits."""
    return account.state is AccountState.RESERVED and not account.leases


def _mega(size: int) -> int:
    return round(size / 1e6)
