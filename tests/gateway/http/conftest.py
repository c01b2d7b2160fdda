"""One registry and one gateway for the tests of a session; see `served`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.served import MAX_BODY, Served, make_registry, settings


@pytest.fixture(scope="session")
def registry_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="session")
def server(registry_file: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One gateway for the tests that move no alias."""
    directory = tmp_path_factory.mktemp("gateway")
    chosen = settings(directory, "auto", max_body_bytes=MAX_BODY, default_model="models:/iris")
    with Served(chosen, registry_file) as served:
        yield served
