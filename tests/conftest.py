"""What every test may use. Nothing here replaces a part of the product."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

# A property is about answers, not about how fast a shared machine finds examples.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def needs(module: str) -> ModuleType:
    """The module, or a skip that says what to install; where GATEWAY_TEST_ALL is set, a failure."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"needs {module}, which is not installed here (part of the test-all set)"
        if os.environ.get("GATEWAY_TEST_ALL"):
            pytest.fail(f"{reason}: {error}")
        pytest.skip(reason)


pytest_plugins = ["tests.support.mlflow_server", "tests.support.object_store"]
