"""The error form of the contract, and request ids."""

from __future__ import annotations

import logging
from typing import Any

import orjson
import pytest

from gateway.errors import HINTS, MAX_DETAILS, RETRYABLE, STATUS, Detail, Problem, pathless
from gateway.http import problems
from tests.support.served import Served

ID = b"abc"


def content(problem: Problem) -> dict[str, Any]:
    document = orjson.loads(problems.document(problem, ID))
    assert isinstance(document, dict)
    return document


def head(problem: Problem) -> dict[bytes, bytes]:
    return dict(problems.header_list(problem, ID))


@pytest.mark.parametrize("code", STATUS)
def test_every_code_has_the_same_form(code: str) -> None:
    problem = Problem(code, "what happened", hint="do this")
    assert content(problem) == {
        "error_code": code,
        "message": "what happened",
        "details": [],
        "hint": "do this",
        "retryable": code in RETRYABLE,
        "request_id": "abc",
    }
    assert head(problem)[b"x-request-id"] == ID
    assert (b"retry-after" in head(problem)) == (STATUS[code] in (429, 502, 503))
    assert content(Problem(code, "what happened"))["hint"] == HINTS[code]


def test_details_say_what_is_known_of_them() -> None:
    details = [Detail("inputs[0].age", "has the wrong type", "long", "string"), Detail("b", "is missing")]
    assert content(Problem("INVALID_INPUT", "m", details=details))["details"] == [
        {"path": "inputs[0].age", "problem": "has the wrong type", "expected": "long", "got": "string"},
        {"path": "b", "problem": "is missing"},
    ]


def test_at_most_a_hundred_details_and_then_a_count() -> None:
    details = [Detail(f"c{i}", "is missing") for i in range(MAX_DETAILS + 37)]
    shown = content(Problem("INVALID_INPUT", "m", details=details))["details"]
    assert len(shown) == MAX_DETAILS + 1
    assert shown[-1] == {"path": "", "problem": "and 37 more"}
    assert (
        len(content(Problem("INVALID_INPUT", "m", details=details[:MAX_DETAILS]))["details"]) == MAX_DETAILS
    )


@pytest.mark.parametrize(
    ("seconds", "header"), [(0.0, b"1"), (0.2, b"1"), (1.0, b"1"), (1.01, b"2"), (30.0, b"30")]
)
def test_retry_after_is_in_whole_seconds_and_at_least_one(seconds: float, header: bytes) -> None:
    assert head(Problem("MODEL_LOADING", "m", retry_after=seconds))[b"retry-after"] == header


def test_a_challenge_comes_with_401() -> None:
    assert head(Problem("UNAUTHENTICATED", "m"))[b"www-authenticate"].startswith(b"Bearer")


def test_a_message_that_is_not_unicode_is_still_answered() -> None:
    assert content(Problem("INVALID_REFERENCE", "the name '\ud800'"))["message"] == "the name '?'"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "[Errno 2] No such file or directory: '/srv/models/iris/2/x.bin'",
            "[Errno 2] No such file or directory: '…/x.bin'",
        ),
        ("cannot read /srv/x.yaml: it is gone", "cannot read …/x.yaml: it is gone"),
        ("error:/srv//models/x, file:///srv/models/y and //srv/models/z", "error:…/x, …/y and …/z"),
        (
            "https://example.com/models/registry.yaml answered 500",
            "https://example.com/models/registry.yaml answered 500",
        ),
        ("s3://bucket/iris/2/x and http://host:5000/a/b", "s3://bucket/iris/2/x and http://host:5000/a/b"),
        ("https://ann:pass@host/a/b, s3://bucket/x@y", "https://…@host/a/b, s3://bucket/x@y"),
        ("12 and/or 3/4 of models:/iris@champion", "12 and/or 3/4 of models:/iris@champion"),
    ],
)
def test_a_message_names_files_and_not_where_they_lie(text: str, shown: str) -> None:
    assert pathless(text) == shown


@pytest.mark.parametrize("given", [b"x", b"req-1/2:3", b"a b", b"y" * 128])
def test_a_sane_request_id_is_kept(given: bytes) -> None:
    assert problems.request_id({b"x-request-id": given}) == given


@pytest.mark.parametrize("given", [b"", b"y" * 129, b"a\tb", b"a\x7f", "é".encode(), b"\xff"])
def test_another_request_id_is_replaced(given: bytes) -> None:
    new = problems.request_id({b"x-request-id": given})
    assert new != given
    assert len(new) == 32
    assert new != problems.request_id({b"x-request-id": given})


def test_the_unexpected_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise OSError("/srv/secret/path is gone")
    except OSError as error:
        with caplog.at_level(logging.ERROR, "gateway.http"):
            problem = problems.unexpected(error, b"req-7")
    assert problem.code == "INTERNAL"
    assert "secret" not in str(content(problem))
    assert "req-7" in caplog.text
    assert "secret/path" in caplog.text


def test_a_control_call_is_told_of_control_calls(server: Served) -> None:
    for body in ({"version": 1}, b"{"):
        refused = server.request("PUT", "/models/iris/aliases/champion", body)
        assert refused.status in (400, 422)
        assert '{"version": "2"}' in refused.json["hint"]
