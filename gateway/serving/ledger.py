"""The bytes: who holds them, who waits for them, who must give them back. Pure and synchronous.

Theory of operation. Every servable has one account. It *asks* for bytes, is *granted* them (reserved),
becomes *resident* when it has loaded, may ask for more when a measurement says so, and is *closing*
until the memory is really free. Bytes count from the grant to the end of closing, because memory that
is being freed is not free yet. So `accounted` = reserved + resident + closing, and it never passes the
limit.

`plan` decides and does nothing: it says which waiting accounts may be granted, which idle ones must go,
and which requests cannot be met. The caller carries it out and asks again after every change. Waiting is
first come, first served; nobody overtakes, so a large model is not starved by small ones.

Some bytes belong to no model (what the zygotes hold). They are counted as resident, up to half of the
limit, as far as there is room; where there is not, idle accounts must go for them.

This module knows no models, no clocks and no event loop; `now` is an argument, in seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from gateway.serving.eviction import Policy, least_recently_used

K = TypeVar("K", bound=Hashable)


class State(enum.Enum):
    """Where an account stands. RESERVED covers waiting (nothing granted yet) and loading."""

    RESERVED = "reserved"
    RESIDENT = "resident"
    CLOSING = "closing"


@dataclass(slots=True, eq=False)
class Account(Generic[K]):
    """One servable's bytes. `wanted` above `bytes` means it waits for the difference. `leases` are
    requests that use it, `pins` keep it resident without one (a swap, an operator)."""

    key: K
    wanted: int
    since: float
    last_used: float
    bytes: int = 0
    state: State = State.RESERVED
    leases: int = 0
    pins: int = 0
    lingering: bool = False


class Plan(NamedTuple, Generic[K]):
    """What to do next. `retry_at`: when waiting alone may make room (a model too young to go)."""

    grant: tuple[K, ...] = ()
    evict: tuple[K, ...] = ()
    refuse: tuple[K, ...] = ()
    retry_at: float | None = None


class Ledger(Generic[K]):
    """Accounts under one limit, in bytes. Wrong use raises `ValueError`: it is the caller's bug."""

    def __init__(
        self, limit: int, *, policy: Policy = least_recently_used, min_residency: float = 0.0
    ) -> None:
        if limit <= 0:
            raise ValueError("the limit must be positive")
        self.limit = limit
        self.min_residency = min_residency
        self._policy = policy
        self._accounts: dict[K, Account[K]] = {}
        self._waiting: dict[K, None] = {}
        self._bytes = dict.fromkeys(State, 0)
        self._shared = 0
        self._shared_wanted = 0

    def __repr__(self) -> str:
        count = dict.fromkeys(State, 0)
        for account in self._accounts.values():
            count[account.state] += 1
        resident, loading, closing = (count[s] for s in (State.RESIDENT, State.RESERVED, State.CLOSING))
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
        """Whether there is something to plan for."""
        return bool(self._waiting) or self._shared < self._shared_wanted

    @property
    def shared(self) -> int:
        """The bytes counted that belong to no account."""
        return self._shared

    def bytes_in(self, state: State) -> int:
        return self._bytes[state] + (self._shared if state is State.RESIDENT else 0)

    def share(self, size: int) -> None:
        """So many bytes belong to no account now."""
        self._shared_wanted = min(size, self.limit // 2)
        self._count_shared()

    # The life of an account, in order.

    def open(self, key: K, now: float) -> Account[K]:
        """A new account that asks for nothing yet (its size is not known before its files are)."""
        if key in self._accounts:
            raise ValueError(f"{key!r} has an account")
        account = self._accounts[key] = Account(key, 0, since=now, last_used=now)
        return account

    def ask(self, key: K, wanted: int) -> bool:
        """Asks for `wanted` bytes in all. True if it has them already; else it waits for a grant."""
        account = self._accounts[key]
        if account.state is State.CLOSING:
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
        """Gives a waiting account what it asks for. Only after a plan that says so."""
        account = self._accounts[key]
        need = account.wanted - account.bytes
        if key not in self._waiting or self.accounted + need > self.limit:
            raise ValueError(f"{key!r} cannot be granted {need} bytes")
        del self._waiting[key]
        self._move(account, account.state, account.wanted)

    def withdraw(self, key: K) -> None:
        """Stops waiting; what was granted before stays."""
        self._waiting.pop(key, None)
        account = self._accounts[key]
        account.wanted = account.bytes

    def settle(self, key: K, now: float, measured: int | None = None) -> None:
        """It has loaded. A measurement below the reservation gives the rest back."""
        account = self._accounts[key]
        if account.state is not State.RESERVED or key in self._waiting:
            raise ValueError(f"{key!r} is not loading")
        if measured is not None and measured > account.bytes:
            raise ValueError(f"{key!r} measures more than it was granted: ask first")
        account.since = account.last_used = now
        self._move(account, State.RESIDENT, account.bytes if measured is None else measured)
        account.wanted = account.bytes

    def shrink(self, key: K, measured: int) -> None:
        """A resident one measures less than before."""
        account = self._accounts[key]
        if account.state is State.RESIDENT and measured < account.bytes:
            self._move(account, State.RESIDENT, measured)
            if key not in self._waiting:
                account.wanted = measured

    def begin_close(self, key: K) -> None:
        """It no longer serves; its bytes count until `closed`. A leased one is never closed."""
        account = self._accounts[key]
        if account.leases:
            raise ValueError(f"{key!r} is leased")
        if account.state is State.CLOSING:
            raise ValueError(f"{key!r} is closing already")
        self.withdraw(key)
        self._move(account, State.CLOSING, account.bytes)

    def closed(self, key: K) -> None:
        """Its memory is free."""
        account = self._accounts[key]
        if account.state is not State.CLOSING:
            raise ValueError(f"{key!r} is not closing")
        self._move(account, State.CLOSING, 0)
        del self._accounts[key]

    def drop(self, key: K) -> None:
        """It failed to load and holds nothing any more: its account ends, and the leases on it with it."""
        account = self._accounts[key]
        if account.state is not State.RESERVED:
            raise ValueError(f"{key!r} has loaded")
        self.withdraw(key)
        self._move(account, State.RESERVED, 0)
        del self._accounts[key]

    # Use.

    def lease(self, key: K) -> None:
        account = self._accounts[key]
        if account.state is State.CLOSING:
            raise ValueError(f"{key!r} is closing")
        account.leases += 1

    def release(self, key: K, now: float) -> None:
        account = self._accounts[key]
        if account.leases <= 0:
            raise ValueError(f"{key!r} has no lease")
        account.leases -= 1
        account.last_used = now

    def pin(self, key: K) -> None:
        self._accounts[key].pins += 1

    def unpin(self, key: K) -> None:
        account = self._accounts[key]
        if account.pins <= 0:
            raise ValueError(f"{key!r} has no pin")
        account.pins -= 1

    # The decision.

    def plan(self, now: float) -> Plan[K]:
        """Which waiting accounts to grant, whom to evict for the first that must wait, whom to refuse."""
        free = self.limit - self.accounted
        freeing = self._bytes[State.CLOSING]
        if self._shared < self._shared_wanted:
            evict, retry_at = self._make_room(self._shared_wanted - self._shared - freeing, None, now)
            return Plan((), evict, (), retry_at)
        grant: list[K] = []
        refuse: list[K] = []
        for key in self._waiting:
            account = self._accounts[key]
            need = account.wanted - account.bytes
            if account.wanted > self.limit:
                refuse.append(key)
            elif need <= free:
                grant.append(key)
                free -= need
            else:
                evict, retry_at = self._make_room(need - free - freeing, key, now)
                return Plan(tuple(grant), evict, tuple(refuse), retry_at)
        return Plan(tuple(grant), (), tuple(refuse))

    def _make_room(self, short: int, asking: K | None, now: float) -> tuple[tuple[K, ...], float | None]:
        if short <= 0:
            return (), None
        idle = [
            a for a in self._accounts.values() if a.state is State.RESIDENT and not a.leases and not a.pins
        ]
        idle = [a for a in idle if a.key != asking and a.bytes]
        old_enough = [a for a in idle if a.lingering or now - a.since >= self.min_residency]
        victims: list[K] = []
        for account in sorted(old_enough, key=self._policy):
            victims.append(account.key)
            short -= account.bytes
            if short <= 0:
                return tuple(victims), None
        # Evicting some would not be enough: leave them, they may be asked for before there is room.
        young = [a.since + self.min_residency for a in idle if a not in old_enough]
        return (), min(young, default=None)

    def _move(self, account: Account[K], state: State, size: int) -> None:
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
        for state in State:
            held = sum(a.bytes for a in self._accounts.values() if a.state is state)
            assert held == self._bytes[state], (state, held, self._bytes[state])
        assert 0 <= self.accounted <= self.limit, repr(self)
        assert 0 <= self._shared <= self._shared_wanted
        for account in self._accounts.values():
            assert account.leases >= 0
            assert account.pins >= 0
            assert account.wanted >= account.bytes or account.state is State.CLOSING, account
            assert (account.wanted > account.bytes) == (account.key in self._waiting), account
            assert not (account.state is State.CLOSING and account.leases), account
        assert self._waiting.keys() <= self._accounts.keys()


def _mega(size: int) -> int:
    return round(size / 1e6)
