"""What commands print: lines that are made from a gateway's views, without a gateway."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

from gateway import cli
from gateway.commands.capture import _check_captured
from gateway.commands.checking import _in_service
from gateway.commands.operating import _differences, _places
from gateway.commands.rollouts import _line, _told, failure, follow
from gateway.commands.terminal import Failure, Output, note, result, working
from gateway.errors import HINTS, Problem
from gateway.http.problems import document
from gateway.http.schemas import Promotion, parsed
from gateway.registries.base import Alias, Model, Snapshot, Verdict
from gateway.rollouts.gates import FORCE
from tests.support.controlled import version

if TYPE_CHECKING:
    from gateway.commands.client import Client

ROLLOUT: dict[str, Any] = {
    "name": "iris",
    "alias": "old",
    "phase": "deleted",
    "desired": None,
    "serving": None,
    "diverged": False,
    "error": "the alias is no longer in the registry",
    "step": None,
}
KEPT = {**ROLLOUT, "serving": "2", "error": "the alias is no longer in the registry; it continues to answer"}
AWAY = {**ROLLOUT, "phase": "refused", "desired": "3", "diverged": True, "error": "too old"}


#: What no command can meet: it writes the request itself.
OF_REQUESTS = {
    *("MALFORMED_BODY", "INVALID_REFERENCE", "NOT_FOUND", "METHOD_NOT_ALLOWED", "UNSUPPORTED_MEDIA_TYPE"),
    *("UNAUTHENTICATED", "DEADLINE_EXCEEDED"),
}


@pytest.mark.parametrize(
    "hint", [FORCE, *(hint for code, hint in HINTS.items() if code not in OF_REQUESTS)], ids=str
)
def test_a_hint_names_commands_and_no_requests(hint: str) -> None:
    said = cli._in_commands(hint)
    assert said
    assert not re.search(r"[{}]|\b(GET|PUT|POST) /|Retry-After", said), said


def test_a_hint_keeps_what_a_person_types() -> None:
    assert cli._in_commands(FORCE) == "to move the alias anyway: --force"
    assert cli._in_commands(HINTS["PRECONDITION_FAILED"]) == (
        "look where the alias points now (`gateway models NAME`), then decide again"
    )


@pytest.mark.parametrize(
    ("rollout", "lines"),
    [
        (ROLLOUT, []),
        (KEPT, ["iris@old the alias is no longer in the registry; it continues to answer"]),
        (AWAY, ["iris@old should serve version 3, but serves no version: too old"]),
    ],
)
def test_status_names_no_fault_of_an_alias_that_ended_as_wanted(
    rollout: dict[str, Any], lines: list[str]
) -> None:
    assert _differences([rollout]) == lines


def test_status_says_where_versions_run_and_why() -> None:
    small = {"isolation": "pack", "reason": "it is small"}
    rows = [{"model": f"m{n}", "version": "1", "placement": small} for n in range(7)]
    rows.append({"model": "own", "version": "2", "placement": {"isolation": "process", "reason": "slow"}})
    rows.append({"model": "away", "version": "1", "placement": None})
    assert _places(rows, 5) == [
        "in packs: m0/1, m1/1, m2/1, m3/1, m4/1 and 2 more (it is small)",
        "in processes of their own: own/2 (slow)",
    ]
    assert "m6/1" in _places(rows, None)[0]


def test_no_command_shows_the_password_of_a_registry(capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://u:p%40ss@mlflow.internal:5000/x"
    result(Output.json, {"registry": url, "mail": "a@b"}, "")
    result(Output.text, {}, f"pushed to {url}")
    note(f"gateway gc --registry {url}")
    with working(f"reading {url}"):
        pass
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("http://***@mlflow.internal:5000/x") == 4
    assert "p%40ss" not in shown.out + shown.err
    assert "a@b" in shown.out


def test_a_rollout_without_a_version_says_so() -> None:
    assert _line(ROLLOUT) == "iris@old  deleted  serves no version: the alias is no longer in the registry"
    assert _line(AWAY) == "iris@old  refused  serves no version, wanted 3: too old"


@pytest.mark.parametrize(
    ("service", "line"), [("1", "version 2, compared with 1: done"), (None, "version 2: done")]
)
def test_a_rollout_names_the_version_that_it_is_compared_with_if_there_is_one(
    service: str | None, line: str
) -> None:
    view = shown("done")
    view["rollout"] |= {"compared_with": service, "reason": None, "evidence": None}
    assert _told(view).splitlines() == ["iris@old  done  serves 2", line]


@pytest.mark.parametrize(
    ("steps", "wrong"),
    [("5,500", "step 2 is 500"), ("5,many", "step 2 is many"), ("50,5", "step 2 is 5, after")],
)
def test_a_wrong_step_is_named_with_what_is_expected(
    steps: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    away = ["--url", "http://127.0.0.1:9"]
    assert cli.run(["promote", "iris@champion", "2", "--canary", steps, *away]) == 2
    told = capsys.readouterr().err
    assert wrong in told
    assert "write percentages between 0 and 100 that rise, such as 5, 25, 50" in told


def test_a_value_that_the_gateway_does_not_accept_is_named_with_what_is_expected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(self: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
        with pytest.raises(Problem) as caught:
            parsed(Promotion, options["json"])
        return httpx.Response(422, content=document(caught.value, b"1"), request=httpx.Request(method, path))

    monkeypatch.setattr(httpx.Client, "request", answer)
    away = ["--url", "http://127.0.0.1:9"]
    assert cli.run(["promote", "iris@champion", "2", "--shadow", "0", *away]) == 1
    assert capsys.readouterr().err.splitlines()[1:] == [
        "gateway: the gateway does not accept the request (INVALID_INPUT): shadow is not a share; expected: "
        "a number above 0, at most 1"
    ]


class Views:
    """A client whose gateway shows these views of an alias, one after the other."""

    def __init__(self, *views: dict[str, Any]) -> None:
        self.left = list(views)

    def call(self, method: str, path: str) -> dict[str, Any]:
        return self.left.pop(0)


def shown(
    phases: str,
    *,
    version: str = "2",
    serving: str | None = "2",
    desired: str | None = "2",
    earlier: Any = (),
    **said: Any,
) -> dict[str, Any]:
    """A view of an alias with a rollout that went through these phases. It is over if the last one is."""
    *_, last = names = phases.split()
    changes = [{"at": f"t{at}", "phase": phase} for at, phase in enumerate(names)]
    step = {} if last in ("canary", "watching", "held") else None
    phase = "serving (watching)" if last == "watching" else last
    known = {"version": version, "phase": phase, "reason": "why", "step": step, "changes": changes}
    view = {"phase": phase, "serving": serving, "desired": desired, "error": None, "rollout": known}
    return {"name": "iris", "alias": "old", **view, "earlier_rollouts": list(earlier), **said}


SUPERSEDED = [
    {"version": "2", "phase": "superseded", "reason": "the alias moved to version 3", "changes": []}
]


@pytest.mark.parametrize(
    ("views", "phases", "refused"),
    [
        (["canary", "canary watching", "canary watching done"], ["canary", "watching", "done"], None),
        # The swap is not the end: what is watched may still be taken back.
        (
            ["watching", shown("watching rolled_back", serving="1")],
            ["watching", "rolled_back"],
            "version 2 was rolled back: why",
        ),
        ([shown("canary held", serving="1")], ["canary", "held"], "the rollout of version 2 is held: why"),
        (
            [shown("canary", serving="1"), shown("canary", version="3", desired="3", earlier=SUPERSEDED)],
            ["canary"],
            "version 2 was superseded: the alias moved to version 3",
        ),
        # The newer version serves, and is no success for this one.
        (
            [shown("done", version="3", serving="3", desired="3", earlier=SUPERSEDED)],
            [],
            "version 2 was superseded: the alias moved to version 3",
        ),
        ([shown("done", serving="1", desired="1")], ["done"], "iris@old was moved to version 1 meanwhile"),
        ([shown("done", serving=None, desired=None)], ["done"], "iris@old was deleted meanwhile"),
        ([shown("done", rollout=None)], [], None),  # a first version has no rollout
    ],
)
def test_a_promotion_that_is_followed_ends_with_its_rollout(
    views: list[str | dict[str, Any]],
    phases: list[str],
    refused: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.commands.rollouts.LOOK_EVERY", 0.0)
    client = Views(*(shown(view) if isinstance(view, str) else view for view in views))
    view = follow(cast("Client", client), "iris", "old", "2")
    assert client.left == []
    lines = [line.split("version 2  ")[1] for line in capsys.readouterr().err.splitlines() if "  " in line]
    assert lines == phases
    found = failure(view, "2")
    assert (None if found is None else found.message) == refused


def test_a_rollout_that_is_watched_before_its_first_step_is_followed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.commands.rollouts.LOOK_EVERY", 0.0)
    trial = {"version": "2", "now": "files, digest and format", "checks": []}
    views = [
        shown("done", version="1", serving="1", desired="1", trial=trial),
        shown("done", version="1", serving="1", desired="1", trial={**trial, "now": None}),
        *[shown("done", version="1", serving="1", phase="loading")] * 2,
        shown("canary", serving="1"),
        shown("canary done"),
    ]
    client = Views(*views)
    follow(cast("Client", client), "iris", "old")
    assert client.left == []
    assert [line.partition("  ")[2] or line for line in capsys.readouterr().err.splitlines()] == [
        "version 2 is checked: files, digest and format",
        "version 2 is checked: the registry is written",
        "version 2 is loading",
        "version 2  canary",
        "version 2  done",
    ]


@pytest.mark.parametrize(
    ("alias", "expected"),
    [
        (Alias("2", last_good="1"), "2"),
        (Alias("2", last_good="1", verdict=Verdict("2", "rolled_back", "worse")), "1"),
        (Alias("2", last_good="1", verdict=Verdict("3", "rolled_back", "worse")), "2"),
        (Alias("2", last_good="9", verdict=Verdict("2", "refused", "no")), "2"),
    ],
    ids=["in service", "taken back", "another was", "the one before is not registered"],
)
def test_a_check_compares_with_the_version_that_callers_use(alias: Alias, expected: str) -> None:
    model = Model("iris", {number: version(int(number)) for number in "12"}, {"champion": alias})
    assert _in_service(Snapshot({"iris": model}, ""), "iris", "champion").version == expected


class OneModelsCaptures:
    """The captures as a token for one model meets them: without their list."""

    name = "a gateway"

    def summary(self) -> list[dict[str, Any]]:
        raise Failure("the credential of 'iris-team' may not control the whole gateway")


def test_a_token_for_one_model_may_export_its_captures() -> None:
    _check_captured(cast("Any", OneModelsCaptures()), "iris", None)
