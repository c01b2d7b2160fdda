"""The composition root: it builds the parts, starts and stops them in order, and stays small."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from gateway import app
from gateway.errors import Problem
from gateway.names import Reference
from gateway.pools import IO_THREAD
from gateway.record import RequestRecord
from gateway.registries import open_registry
from gateway.service import Inference
from loaders.enforcement import RawInput
from tests.support.hostile import eventually, write_package
from tests.support.processes import until
from tests.support.served import settings

pytestmark = pytest.mark.anyio


def threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith((IO_THREAD, "state"))}


async def test_a_gateway_starts_answers_and_leaves_nothing(tmp_path: Path) -> None:
    import gateway

    write_package(tmp_path / "one")
    target = str(tmp_path / "registry.yaml")
    gateway.push(tmp_path / "one", name="one", registry=target, alias="champion")
    before, tasks = threads(), asyncio.all_tasks()
    made = app.Gateway(settings(tmp_path), open_registry(target))
    await made.start()
    try:
        assert made.views.ready().ready
        assert [*(await made.views.names()).items] == ["one"]
        loaded = await made.residency.load(Reference("one", alias="champion"))
        assert isinstance(loaded, tuple)
    finally:
        await made.stop()
    assert asyncio.all_tasks() == tasks
    assert eventually(lambda: threads() == before)


async def test_settings_for_models_that_do_not_exist_are_named(tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("version: 1\nmodels: {}\n")
    named = settings(tmp_path, models={"irs": {"timeout": "5s"}})
    made = app.Gateway(named, open_registry(str(tmp_path / "registry.yaml")))
    await made.start()
    try:
        assert made.views.ready().ready
        await until(lambda: "irs" in made.views.ready().settings_unmatched)
    finally:
        await made.stop()


async def test_a_gateway_that_refuses_takes_no_request(tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("version: 1\nmodels: {}\n")
    made = app.Gateway(settings(tmp_path), open_registry(str(tmp_path / "registry.yaml")))
    await made.start()
    try:
        assert not made.parts.draining()
        made.refuse()
        assert made.parts.draining()
        late = RequestRecord(late=made.service.stopping)
        inference = Inference(Reference("one"), RawInput("instances", [1]), record=late)
        with pytest.raises(Problem, match="stopping"):
            await made.service.predict(inference)
    finally:
        await made.stop()


def test_it_stays_a_list_of_parts() -> None:
    text = Path(app.__file__).read_text()
    assert len(text.splitlines()) <= 250
