"""The OpenAPI documents, exercised by schemathesis against a running gateway: no answer is a 500, and each
has a status and a content type that the document names."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guarded import guarded
from tests.support.served import Served, make_registry, settings

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
#: What a path names: without it almost all requests would end at a name that does not exist. A deadline of a
#: millisecond passes.
CONFIGURATION = """
[parameters]
"path.model" = "iris@champion"
"path.version" = "1"
"path.alias" = "champion"

[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def served(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(settings(tmp_path_factory.mktemp("openapi")), registry) as running:
        yield running


def exercise(
    schemathesis: str, served: Served, place: str, directory: Path, *options: str, key: str | None
) -> None:
    """Runs schemathesis with the document at `place`, without the answers that it calls `default`: those
    stand for any status."""
    document = served.get(place, **({"authorization": f"Bearer {key}"} if key else {})).json
    for path in document["paths"].values():
        for operation in path.values():
            if isinstance(operation, dict):
                operation["responses"].pop("default", None)
    url = f"http://127.0.0.1:{served.port}"
    (directory / "openapi.json").write_text(json.dumps({**document, "servers": [{"url": url}]}))
    (directory / "schemathesis.toml").write_text(CONFIGURATION)
    options += (
        "--seed",
        "1",
        "--no-color",
        "--no-shrink",
        "--continue-on-failure",
        "--request-timeout",
        "60",
    )
    options += ("--exclude-path", "/events", "--suppress-health-check", "all")  # its answer has no end
    if key:
        options += ("-H", f"Authorization: Bearer {key}")
    done = subprocess.run(
        [schemathesis, "run", "openapi.json", "--url", url, "-c", CHECKS, *options],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "Tested: 0" not in done.stdout


def test_every_route_answers_as_the_document_says(schemathesis: str, served: Served, tmp_path: Path) -> None:
    exercise(schemathesis, served, "/openapi.json", tmp_path, "-n", "3", key=served.key)


@pytest.mark.parametrize("model", ["iris", "tensor"])
def test_a_model_answers_as_its_document_says(
    schemathesis: str, served: Served, tmp_path: Path, model: str
) -> None:
    exercise(schemathesis, served, f"/models/{model}/openapi.json", tmp_path, "-n", "15", key=None)


def test_without_the_credential_that_is_needed_too(schemathesis: str, registry: str, tmp_path: Path) -> None:
    with guarded(registry, tmp_path) as served:
        exercise(schemathesis, served, "/openapi.json", tmp_path, "-n", "1", "--phases", "fuzzing", key=None)
