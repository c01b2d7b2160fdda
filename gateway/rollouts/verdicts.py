"""The verdicts that the registry does not hold: those of this gateway, and those that its peers say.

A verdict is in the registry if that can be written (`Alias.verdict`), and then only the registry counts.
Otherwise the gateway that reached it remembers it (`Course`), and peers pass it on. A gateway that hears one
remembers it as its own, so it survives a restart, and the gateway that reached it may go.

A verdict is about one version of an alias, by number and digest. It ends when the alias points elsewhere.
Each gateway sees that at its own time, so a gateway that has seen it says until when verdicts are void.
Without that, a peer that reads the registry later would bring back a verdict that a person has ended.

Knows aliases of the registry and the memory; must not know how peers are reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from cachetools import LRUCache

from gateway.quantities import utc
from gateway.registries.base import Model, Observation, Snapshot, Verdict, Version
from gateway.rollouts.course import Course
from gateway.rollouts.phases import TAKEN_BACK, UNDER_WAY, Phase

if TYPE_CHECKING:
    from gateway.rollouts.memory import Courses, Memory

#: The most aliases of which something is remembered.
KEPT: Final = 10_000
#: What peers say counts for this time, in seconds: a peer says it again and again.
HEARD_SECONDS: Final = 30.0
#: A time that a peer names may be this much ahead of the clock here, in seconds.
CLOCKS_DIFFER: Final = 60.0
ELSEWHERE: Final = "another gateway: "
"""The prefix of the reason of a verdict that another gateway has reached."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a gateway says of one alias to its peers. `version`: the desired one, with its `digest` if that is
    known. `serving`: the version that answers; `last_good`: the last one that has answered. `verdict` is on
    `version`, and not in the registry; `at`: its unix time. `void_until`: verdicts on `version` until this
    unix time have ended."""

    name: str
    alias: str
    version: str
    digest: str | None = None
    serving: str | None = None
    last_good: str | None = None
    verdict: Verdict | None = None
    at: float = 0.0
    void_until: float | None = None


class Verdicts:
    """`courses` are the rollouts in `memory`. `digest` gives the digest of a version, None while it is
    unknown. Only the event loop calls the methods."""

    def __init__(
        self,
        memory: Memory,
        courses: Courses,
        *,
        digest: Callable[[Version], str | None] = lambda version: version.digest,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._courses = courses
        self._digest = digest
        self._wall = wall
        self._clock = clock
        #: By alias: refusals of this gateway, which tries a refused version again after a restart.
        self._refused: LRUCache[tuple[str, str], Standing] = LRUCache(KEPT)
        #: By alias: the last verdict that a peer said, and when it was heard.
        self._heard: LRUCache[tuple[str, str], tuple[Standing, float]] = LRUCache(KEPT)
        #: By alias: the last good version that a peer named.
        self._good: LRUCache[tuple[str, str], str] = LRUCache(KEPT)
        #: By model, alias and version: verdicts until this time have ended.
        self._void: LRUCache[tuple[str, str, str], float] = LRUCache(KEPT)
        self._digests: LRUCache[Version, str] = LRUCache(KEPT)
        self._left_behind = set(self.held())

    def of(self, model: Model, alias: str) -> Verdict | None:
        """The verdict of this gateway or a peer on the version that an alias points to, if the registry has
        none. Once the registry holds a verdict, only the registry counts: removing it there means another
        try."""
        name, entry = model.name, model.aliases[alias]
        course = self._courses.of(name, alias)
        if course is not None and course.version == entry.version and course.phase in TAKEN_BACK:
            if entry.standing is not None:
                if not course.recorded:
                    self._courses.save(name, alias, replace(course, recorded=True))
                return None
            if course.recorded:
                self._courses.save(name, alias, self._courses.new(name, alias, course.version))
                if self._void.get((name, alias, entry.version), 0.0) < course.since:
                    # It was taken out of the registry now; otherwise the alias was elsewhere meanwhile.
                    self._void[name, alias, entry.version] = self._wall()
        self._adopt(model, alias)
        course = self._courses.of(name, alias)
        return _verdict(course) if course is not None and _holds(course, entry.version) else None

    def good(self, name: str, alias: str) -> str | None:
        """The last good version that a peer named."""
        return self._good.get((name, alias))

    def found(self, observation: Observation) -> None:
        """This gateway refused a version at its gates."""
        if observation.verdict is not None:
            self._refused[observation.name, observation.alias] = Standing(
                observation.name,
                observation.alias,
                observation.version,
                last_good=observation.last_good,
                verdict=observation.verdict,
                at=self._wall(),
            )

    def standing(
        self, model: Model, alias: str, *, serving: str | None, last_good: str | None, verdicts: bool
    ) -> Standing:
        """What this gateway says of an alias. `verdicts`: with the verdict that the registry does not
        hold."""
        entry = model.aliases[alias]
        key = (model.name, alias)
        version = model.versions.get(entry.version)
        said = Standing(
            *key,
            entry.version,
            None if version is None else self._known_digest(version),
            serving,
            last_good,
            void_until=self._void.get((*key, entry.version)),
        )
        if not verdicts or entry.standing is not None:
            return said
        course, refused = self._courses.of(*key), self._refused.get(key)
        if _holds(course, entry.version):
            assert course is not None
            good = last_good or (None if serving == entry.version else serving)
            return replace(said, verdict=_verdict(course), at=course.since, last_good=good)
        if refused is not None and refused.version == entry.version:
            good = said.last_good or refused.last_good
            return replace(said, verdict=refused.verdict, at=refused.at, last_good=good)
        return said

    def held(self) -> Iterator[tuple[str, str]]:
        """The aliases with a verdict of this gateway, used since the start or not."""
        for key, saved in list(self._memory.rollouts().items()):
            if saved["phase"] in TAKEN_BACK and not saved.get("recorded"):
                yield key

    def unsaid(self, snapshot: Snapshot) -> Iterator[Observation]:
        """The verdicts that this gateway reached before it was stopped, and that the registry does not have:
        once each, when their alias is known."""
        for name, alias in list(self._left_behind):
            model = snapshot.models.get(name)
            entry = None if model is None else model.aliases.get(alias)
            if model is None or entry is None:
                continue
            self._left_behind.discard((name, alias))
            verdict, course = self.of(model, alias), self._courses.of(name, alias)
            if verdict is not None and course is not None and entry.standing is None:
                yield Observation(name, alias, verdict.version, course.service, verdict)

    # The end of a verdict.

    def look(self, snapshot: Snapshot) -> None:
        """Ends the verdicts on versions that their alias does not point to any more."""
        for key in {*self.held(), *self._refused}:
            model = snapshot.models.get(key[0])
            if model is None:
                continue  # of a large registry, only the models in use are known
            entry = model.aliases.get(key[1])
            course, refused = self._courses.of(*key), self._refused.get(key)
            for version in {one.version for one in (course, refused) if one is not None}:
                if entry is None or entry.version != version:
                    self.left(*key, version)

    def left(self, name: str, alias: str, version: str) -> None:
        """The alias pointed to `version` and does not any more: verdicts on it until now have ended."""
        self._end(name, alias, version, self._wall())

    def _end(self, name: str, alias: str, version: str, until: float) -> bool:
        """Ends the verdicts on a version until this time. Returns whether there was one."""
        self._void[name, alias, version] = until
        key, ended = (name, alias), False
        refused, heard, course = self._refused.get(key), self._heard.get(key), self._courses.of(name, alias)
        if refused is not None and refused.version == version and refused.at <= until:
            del self._refused[key]
            ended = True
        if heard is not None and heard[0].version == version and heard[0].at <= until:
            del self._heard[key]
        if _holds(course, version):
            assert course is not None
            if course.since <= until:
                # As if the registry had held it: pointing there again means another try.
                self._courses.save(name, alias, replace(course, recorded=True))
                ended = True
        return ended

    # Messages of peers.

    def hear(self, said: Iterable[Standing]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        """Takes what a peer says of aliases. Returns the aliases to look at again, and those of which a
        refusal at the gates has ended."""
        changed: set[tuple[str, str]] = set()
        again: set[tuple[str, str]] = set()
        now = self._clock()
        for one in said:
            key = (one.name, one.alias)
            if one.void_until is not None and one.void_until <= self._wall() + CLOCKS_DIFFER:
                known = self._void.get((*key, one.version))
                if known is None or known < one.void_until:
                    refused = key in self._refused
                    if self._end(*key, one.version, one.void_until):
                        changed.add(key)
                        if refused and key not in self._refused:
                            again.add(key)
            if one.last_good is not None and self._good.get(key) != one.last_good:
                self._good[key] = one.last_good
                changed.add(key)
            if one.verdict is not None and self._is_news(one, now):
                self._heard[key] = one, now
                changed.add(key)
        return changed, again

    def _is_news(self, said: Standing, now: float) -> bool:
        if said.at > self._wall() + CLOCKS_DIFFER:
            return False
        known, at = self._heard.get((said.name, said.alias), (None, 0.0))
        if known is None or known.version != said.version or now - at > HEARD_SECONDS / 2:
            return True
        assert known.verdict is not None
        assert said.verdict is not None
        return known.verdict.outcome == "refused" and said.verdict.outcome == "rolled_back"

    def _adopt(self, model: Model, alias: str) -> None:
        """Remembers the verdict of a peer as this gateway's own, if it is on the version that the alias
        points to and nothing here overrules it. A rollback overrules a refusal, and whatever this gateway
        found itself."""
        key, entry = (model.name, alias), model.aliases[alias]
        heard, at = self._heard.get(key, (None, 0.0))
        if heard is None or heard.verdict is None or self._clock() - at > HEARD_SECONDS:
            return
        verdict, version = heard.verdict, model.versions.get(entry.version)
        if heard.version != entry.version or entry.standing is not None or version is None:
            return
        if replace(entry, verdict=verdict).refused is None:
            return  # a person has overruled the gates
        if heard.at <= self._void.get((*key, entry.version), float("-inf")):
            return
        digest = self._known_digest(version)
        if digest is not None and heard.digest is not None and digest != heard.digest:
            return  # another package under the same number
        course, refused = self._courses.of(*key), self._refused.get(key)
        if _holds(course, entry.version):
            assert course is not None
            if course.phase is not Phase.REFUSED or verdict.outcome == "refused":
                return
        elif refused is not None and refused.version == entry.version and verdict.outcome == "refused":
            return
        if heard.digest is not None:
            self._digests[version] = heard.digest
        self._refused.pop(key, None)
        back = heard.last_good if heard.last_good in model.versions else None
        if back not in (None, entry.version) and self._memory.last_good(*key) in (None, entry.version):
            assert back is not None
            self._memory.save_last_good(*key, back)
        phase = Phase.REFUSED if verdict.outcome == "refused" else Phase.ROLLED_BACK
        reason = ELSEWHERE + verdict.reason.removeprefix(ELSEWHERE)
        change = {"at": utc(heard.at), "phase": phase.value, "reason": reason}
        steps = None if course is None or course.version != entry.version else course.steps
        if course is not None and course.phase in UNDER_WAY:
            earlier = course.earlier  # it ends with this verdict
        else:
            earlier = self._courses.new(*key, entry.version).earlier
        taken_back = Course(
            entry.version, back, phase, steps=steps, reason=reason, since=heard.at, changes=(change,),
            earlier=earlier,
        )  # fmt: skip
        self._courses.save(*key, taken_back)

    def _known_digest(self, version: Version) -> str | None:
        """The digest of a version, also after it was unloaded."""
        digest = self._digest(version)
        if digest is None:
            return self._digests.get(version)
        self._digests[version] = digest
        return digest


def _holds(course: Course | None, version: str) -> bool:
    """Whether a course is a verdict on this version that the registry does not hold."""
    if course is None or course.version != version:
        return False
    return course.phase in TAKEN_BACK and not course.recorded


def _verdict(course: Course) -> Verdict:
    outcome = "refused" if course.phase is Phase.REFUSED else "rolled_back"
    return Verdict(course.version, outcome, course.reason or "no reason is given", utc(course.since))
