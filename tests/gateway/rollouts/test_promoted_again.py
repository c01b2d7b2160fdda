"""Promotions to the version that the alias points to already, as deployment tools repeat them: it is checked
unless it serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import Problem
from loaders.signature import ColSpec, Scalar, Signature
from tests.gateway.rollouts.test_promotions import promote, refusal
from tests.support.composed import Composed, composed
from tests.support.processes import until

pytestmark = pytest.mark.anyio

NARROW = Signature(inputs=(ColSpec(Scalar.long, "a"),))
WIDE = Signature(inputs=(ColSpec(Scalar.long, "a"), ColSpec(Scalar.long, "b")))


async def unload(parts: Composed, number: int) -> None:
    parts.bench.manager.retire(parts.version(number), "idle")
    await until(lambda: parts.bench.manager.find(parts.version(number)) is None)


async def move(parts: Composed, entry: str) -> None:
    """Writes the alias into the registry file, as a person does."""
    parts.file.write_text(parts.file.read_text().replace("champion: 1", f"champion: {entry}"))
    await parts.watch.look()


async def test_a_version_that_was_forced_needs_no_force_again(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        parts.of(1).signature, parts.of(2).signature = NARROW, WIDE
        await move(parts, "{version: 2, previous: 1, last_good: 1, forced: true}")
        text = parts.file.read_text()
        assert (await promote(parts.promotions, "2", dry_run=True)).unchanged
        assert (await promote(parts.promotions, "2")).unchanged
        found = parts.aliases.find("iris", "champion")
        assert found is not None
        assert (parts.file.read_text(), found.serving) == (text, parts.version(2))


@pytest.mark.parametrize("used", [False, True])
async def test_each_repetition_for_a_broken_version_is_refused(tmp_path: Path, used: bool) -> None:
    async with composed(tmp_path) as parts:
        if used:
            await parts.answers()
            await unload(parts, 1)
        parts.of(2).fails = "ValueError: bad weights"
        await move(parts, "2")
        for _ in range(4):
            with pytest.raises(Problem, match="bad weights"):
                async with parts.promotions.promote("iris", "champion", "2"):
                    pass  # it must not wait for its effect to be refused


async def test_a_version_in_service_that_cannot_be_loaded_again_is_refused(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        await parts.answers()
        await unload(parts, 1)
        parts.of(1).fails = "ValueError: gone"
        with pytest.raises(Problem, match="gone"):
            await parts.answers()
        assert "gone" in (await refusal(parts, "1")).message


async def test_a_dry_run_does_not_unload_what_serves_meanwhile(tmp_path: Path) -> None:
    async with composed(tmp_path) as parts:
        async with parts.promotions.promote("iris", "champion", "1", dry_run=True):
            assert await parts.answers() == "1"
        assert parts.bench.manager.is_ready(parts.version(1))
        async with parts.promotions.promote("iris", "champion", "2", dry_run=True):
            assert parts.bench.manager.is_ready(parts.version(2))
        assert parts.bench.manager.find(parts.version(2)) is None
