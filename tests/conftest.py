"""What every test may use. Nothing here replaces a part of the product."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator
from types import ModuleType
from xml.etree import ElementTree

import httpx
import pytest
from hypothesis import HealthCheck, settings

# A property is about answers, not about how fast a shared machine finds examples. `.ci/run` takes the same
# examples each time; every other run looks for new ones.
settings.register_profile(
    "patient",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="TESTS_REPEATABLE" in os.environ,
)
settings.load_profile("patient")


# A model that does not fit this interpreter would be given an environment of its own. Tests of that bring an
# index of their own, or say that they use this machine's; no other test asks an index.
os.environ["UV_OFFLINE"] = "1"

# A test's client is patient: httpx's own five seconds are short where several test runs share two processors.
_TIMEOUT = inspect.signature(httpx.request).parameters["timeout"].default
_TIMEOUT.connect = _TIMEOUT.read = _TIMEOUT.write = _TIMEOUT.pool = 60.0


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs in this process and names no cache uses one of this test run, and not the user's: several
    runs may share a machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATEWAY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, as the gateway does."""
    return "asyncio"


def needs(module: str) -> ModuleType:
    """Returns the module. Without it, skips with the package to install; fails if GATEWAY_TEST_ALL is set."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"needs {module}, which is not installed here (part of the test-all set)"
        if os.environ.get("GATEWAY_TEST_ALL"):
            pytest.fail(f"{reason}: {error}")
        pytest.skip(reason, allow_module_level=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what passed in the run whose JUnit file TESTS_PASSED_BEFORE names: `.ci/run` runs the same
    tests in the same versions twice, with few frameworks and with all. The contracts of each framework run in
    both."""
    earlier = os.environ.get("TESTS_PASSED_BEFORE")
    if not earlier:
        return
    cases = ElementTree.parse(earlier).iter("testcase")
    passed = {(case.get("classname"), case.get("name")) for case in cases if not len(case)}
    repeated = [
        item
        for item in items
        if not item.nodeid.startswith("tests/contracts/")
        and (item.nodeid.partition(".py::")[0].replace("/", "."), item.name) in passed
    ]
    config.hook.pytest_deselected(items=repeated)
    items[:] = [item for item in items if item not in set(repeated)]


pytest_plugins = ["tests.support.mlflow_server", "tests.support.object_store"]
