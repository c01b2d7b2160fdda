"""Notifications: signed, tried again, not lost by a restart, never waited for. Receivers are real servers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway import backoff
from gateway.events import Event, RolloutChanged, Swapped, SwapRefused
from gateway.notify import GIVEN_UP_AFTER, MAX_WAITING, Notifier, read_secret, shown, signed
from gateway.outbox import Outbox, Undelivered
from gateway.rollout_settings import Notify
from gateway.state import State
from tests.support.controlled import run

SECRET = "of-the-operator"


class Receiver:
    """A server on this machine. `answers` are its next statuses, then 204; `hold` blocks them. `endless`: the
    bodies of its answers do not end."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.changed = threading.Condition()
        self.hold = threading.Event()
        self.hold.set()
        self.endless = False
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert receiver.hold.wait(60)
                with receiver.changed:
                    receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                    status = receiver.answers.pop(0) if receiver.answers else 204
                    receiver.changed.notify_all()
                self.send_response(status)
                if status == 302:
                    self.send_header("location", "/elsewhere")
                self.send_header("content-length", str(1 << 40) if receiver.endless else "0")
                self.end_headers()
                with contextlib.suppress(OSError):
                    while receiver.endless:
                        self.wfile.write(bytes(1 << 16))

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?token=hidden"

    async def received(self, count: int) -> list[dict[str, Any]]:
        def wait() -> bool:
            with self.changed:
                return self.changed.wait_for(lambda: len(self.got) >= count, 60)

        assert await asyncio.to_thread(wait)
        return [json.loads(body) for _, body in self.got]

    def close(self) -> None:
        self.hold.set()
        self.endless = False
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "pause", lambda failures, **_: 0.0)


class Setup:
    def __init__(self, directory: Path, *urls: str, on: list[str] | None = None) -> None:
        self.secret = directory / "secret"
        if not self.secret.exists():
            self.secret.write_text(SECRET + "\n")
        more = {} if on is None else {"on": on}
        targets = [Notify(url=url, secret_file=self.secret, **more) for url in urls]
        self.state = State(directory / "state")
        self.pool = ThreadPoolExecutor(1)
        self.counts: Counter[str] = Counter()
        self.now = 1_000_000.0
        self.notifier = Notifier(
            targets, Outbox(self.state, "test"), self.pool, self.pool,
            counted=lambda result, number: self.counts.update({result: number}), wall=lambda: self.now,
        )  # fmt: skip

    def notice(self, *events: Event) -> None:
        for event in events:
            self.notifier.notice(event)

    async def until(self, **counts: int) -> None:
        while any(self.counts[name] < count for name, count in counts.items()):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        await asyncio.to_thread(self.pool.shutdown)
        self.state.close()


@asynccontextmanager
async def made(
    directory: Path, *urls: str, running: bool = True, on: list[str] | None = None
) -> AsyncIterator[Setup]:
    setup = Setup(directory, *urls, on=on)
    task = asyncio.get_running_loop().create_task(setup.notifier.run()) if running else None
    try:
        yield setup
    finally:
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        await setup.close()


def swapped(version: str = "2", previous: str | None = "1", model: str = "iris") -> Swapped:
    return Swapped(model, "champion", version, previous, "promote")


def changed(phase: str, reason: str | None = "why", **evidence: Any) -> RolloutChanged:
    return RolloutChanged("iris", "champion", "2", "1", phase, reason, evidence or None)


Test = Callable[[], Awaitable[None]]


def test_the_news_and_their_signature(tmp_path: Path, receiver: Receiver) -> None:
    async def main() -> None:
        async with made(tmp_path, receiver.url) as setup:
            setup.notice(swapped())
            (body,) = await receiver.received(1)
            assert body["type"] == "served"
            assert body["timestamp"] == "1970-01-12T13:46:40.000+00:00"
            data = body["data"]
            assert (data["model"], data["alias"], data["version"], data["previous"]) == (
                "iris", "champion", "2", "1",
            )  # fmt: skip
            headers, raw = receiver.got[0]
            # As any receiver verifies it.
            content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + raw
            digest = base64.b64encode(hmac.new(SECRET.encode(), content, hashlib.sha256).digest())
            assert headers["webhook-signature"] == f"v1,{digest.decode()}"
            assert headers["webhook-timestamp"] == "1000000"
            assert headers["content-type"] == "application/json"

    run(main)


def test_the_signature_is_that_of_the_standard() -> None:
    # The example of the specification's reference libraries.
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    found = signed(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert found["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_secrets(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    assert read_secret(file) == base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    for text, error in (("whsec_?", "base64"), ("", "empty"), (" \n", "empty")):
        file.write_text(text)
        with pytest.raises(ValueError, match=error):
            read_secret(file)
    with pytest.raises(OSError, match="not a file"):
        read_secret(tmp_path)


def test_which_events_are_news(tmp_path: Path, receiver: Receiver) -> None:
    async def main() -> None:
        async with made(tmp_path, receiver.url) as setup:
            setup.notice(
                swapped(previous=None),  # loaded after a start
                changed("canary 5 %"),
                changed("held"),
                changed("refused", compared=5),
                SwapRefused("iris", "champion", "2", "why"),
                SwapRefused("iris", "champion", "2", "why"),  # tried again
                SwapRefused("iris", "champion", "3", "why"),
                changed("rolled_back", errors=3),
                changed("done"),
                swapped(),
            )
            bodies = await receiver.received(5)
            kinds = [body["type"] for body in bodies]
            assert kinds == ["held", "refused", "refused", "rolled_back", "served"]
            assert bodies[1]["data"]["evidence"] == {"compared": 5}
            assert "evidence" not in bodies[2]["data"]
            assert bodies[3]["data"]["evidence"] == {"errors": 3}
            assert bodies[3]["data"]["reason"] == "why"

    run(main)


def test_the_same_news_come_again_after_a_while_or_after_others(tmp_path: Path, receiver: Receiver) -> None:
    async def main() -> None:
        async with made(tmp_path, receiver.url) as setup:
            refused = SwapRefused("iris", "champion", "2", "why")
            setup.notice(refused, refused, swapped(), refused)
            setup.now += 3601
            setup.notice(refused)
            bodies = await receiver.received(4)
            assert [body["type"] for body in bodies] == ["refused", "served", "refused", "refused"]

    run(main)


def test_a_url_gets_what_it_asked_for(tmp_path: Path, receiver: Receiver) -> None:
    async def main() -> None:
        async with made(tmp_path, receiver.url, on=["rolled_back"]) as setup:
            setup.notice(swapped(), changed("rolled_back"))
            (body,) = await receiver.received(1)
            assert body["type"] == "rolled_back"

    run(main)


@pytest.mark.parametrize("status", [500, 404, 429, 302])
def test_a_receiver_that_fails_first_gets_it_later_and_in_order(
    tmp_path: Path, receiver: Receiver, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.notify")

    async def main() -> None:
        receiver.answers = [status] * 3
        async with made(tmp_path, receiver.url) as setup:
            setup.notice(swapped("2"), swapped("3"))
            await setup.until(delivered=2)
            bodies = await receiver.received(5)
            assert [body["data"]["version"] for body in bodies] == ["2", "2", "2", "2", "3"]
            assert len({headers["webhook-id"] for headers, _ in receiver.got[:4]}) == 1
            assert setup.counts == {"failed": 3, "delivered": 2}
        said = [record.getMessage() for record in caplog.records if record.name == "gateway.notify"]
        assert len(said) == 2  # once that it fails, once that it works
        assert f"answered {status}" in said[0]
        assert not any(secret in line for line in said for secret in (SECRET, "hidden", "/hook"))

    run(main)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_that_its_receiver_refuses_does_not_hold_up_the_next(
    tmp_path: Path, receiver: Receiver, status: int
) -> None:
    async def main() -> None:
        receiver.answers = [status]
        async with made(tmp_path, receiver.url) as setup:
            setup.notice(swapped("2"), swapped("3"))
            await setup.until(delivered=2)
            versions = [body["data"]["version"] for body in await receiver.received(3)]
            assert sorted(versions) == ["2", "2", "3"]
            assert setup.counts == {"failed": 1, "delivered": 2}

    run(main)


def test_one_that_is_refused_for_good_waits_alone(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    outbox = Outbox(state, "test")
    for number in range(3):
        outbox.put(Undelivered(f"m{number}", "http://x", b"{}", 0.0, 0), 5)
    first, _ = outbox.next("http://x", 1.0, 100.0)
    assert first is not None
    outbox.failed(first, 300.0, alone=True)
    second, _ = outbox.next("http://x", 1.0, 100.0)
    assert second is not None
    assert second.id == "m1"
    outbox.failed(second, 50.0, alone=False)  # the receiver is away
    assert outbox.next("http://x", 1.0, 100.0) == (None, 50.0)
    again, _ = outbox.next("http://x", 50.0, 100.0)
    assert again is not None
    assert again.id == "m1"
    state.close()


def test_what_waits_for_a_url_that_is_not_configured_any_more_is_deleted(
    tmp_path: Path, receiver: Receiver
) -> None:
    async def main() -> None:
        async with made(tmp_path, "http://127.0.0.1:1/", running=False) as setup:
            setup.notice(swapped())
        async with made(tmp_path, receiver.url) as setup:
            setup.notice(swapped("3"))
            await setup.until(delivered=1)
            assert Outbox(setup.state, "test").next("http://127.0.0.1:1/", 2e9, 3e9) == (None, None)

    run(main)


def test_what_is_not_delivered_outlasts_a_restart(tmp_path: Path, receiver: Receiver) -> None:
    async def main() -> None:
        async with made(tmp_path, receiver.url, running=False) as setup:
            setup.notice(swapped())
        async with made(tmp_path, receiver.url) as setup:
            await setup.until(delivered=1)
            assert len(receiver.got) == 1
        async with made(tmp_path, receiver.url) as setup:
            setup.notice(swapped("3"))
            await setup.until(delivered=1)
        assert [body["data"]["version"] for body in await receiver.received(2)] == ["2", "3"]

    run(main)


def test_a_url_that_hangs_holds_up_no_other(tmp_path: Path, receiver: Receiver) -> None:
    async def main() -> None:
        other = Receiver()
        other.hold.clear()
        try:
            async with made(tmp_path, other.url, receiver.url) as setup:
                setup.notice(swapped("2"), swapped("3"))
                await receiver.received(2)
                assert other.got == []
                other.hold.set()
                await setup.until(delivered=4)
                await other.received(2)
        finally:
            other.close()

    run(main)


def test_a_receiver_that_is_away_is_given_up_after_a_day(tmp_path: Path) -> None:
    async def main() -> None:
        async with made(tmp_path, "http://127.0.0.1:1/") as setup:
            setup.notice(swapped())
            await setup.until(failed=2)
            assert not setup.counts["dropped"]
            setup.now += GIVEN_UP_AFTER
            await setup.until(dropped=1)

    run(main)


def test_a_secret_that_is_missing_is_read_again(tmp_path: Path, receiver: Receiver) -> None:
    async def main() -> None:
        async with made(tmp_path, receiver.url) as setup:
            setup.secret.unlink()
            setup.notice(swapped())
            await setup.until(failed=1)
            setup.secret.write_text(SECRET)
            await setup.until(delivered=1)

    run(main)


def test_the_oldest_go_when_too_many_wait(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    outbox = Outbox(state, "test")
    dropped = [outbox.put(Undelivered(f"m{number}", "http://x", b"{}", 0.0, 0), 5) for number in range(8)]
    assert sum(dropped) == 3
    first, _ = outbox.next("http://x", 1.0, 100.0)
    assert first is not None
    assert first.id == "m3"
    assert outbox.next("http://x", 1.0, 100.0) == (None, 100.0)  # claimed: nobody else sends it now
    assert outbox.next("http://y", 1.0, 100.0) == (None, None)
    assert Outbox(state, "other").next("http://x", 1.0, 100.0) == (None, None)
    assert MAX_WAITING > 100
    state.close()


def test_a_state_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with made(tmp_path, "http://127.0.0.1:1/", running=False) as setup:

            def broken(*_: Any) -> int:
                raise sqlite3.OperationalError("disk I/O error")

            setup.notifier._outbox.put = broken  # type: ignore[method-assign]
            setup.notice(swapped())
            await setup.until(dropped=1)
            assert "is lost" in caplog.text

    run(main)


def test_what_was_delivered_is_not_posted_again_if_the_state_cannot_say_so(
    tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with made(tmp_path, receiver.url) as setup:
            outbox = setup.notifier._outbox
            record, failures = outbox.delivered, [sqlite3.OperationalError("disk is full")]
            failed = threading.Event()

            def broken(identity: str) -> None:
                if failures:
                    failed.set()
                    raise failures.pop()
                record(identity)

            outbox.delivered = broken  # type: ignore[method-assign]
            setup.notice(swapped("2"))
            assert await asyncio.to_thread(failed.wait, 60)
            setup.now += 60  # nobody has claimed it any more
            setup.notice(swapped("3"))
            await setup.until(delivered=2)
            bodies = await receiver.received(2)
            assert [body["data"]["version"] for body in bodies] == ["2", "3"]
        assert setup.counts == {"delivered": 2}
        assert "disk is full" in caplog.text

    run(main)


def test_an_answer_without_an_end_is_not_read(tmp_path: Path, receiver: Receiver) -> None:
    async def main() -> None:
        receiver.answers, receiver.endless = [200], True
        async with made(tmp_path, receiver.url) as setup:
            setup.notice(swapped())
            while not setup.counts:  # noqa: ASYNC110 - the delivery decides
                await asyncio.sleep(0.005)
            assert setup.counts == {"delivered": 1}

    run(main)


def test_without_urls_nothing_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with made(tmp_path) as setup:
            setup.notice(swapped())
        assert setup.counts == {}

    run(main)


def test_a_url_is_shown_without_its_secrets() -> None:
    assert shown("https://user:pw@example.org:8443/services/T0/B0?token=x") == "https://example.org:8443"


def test_settings(tmp_path: Path) -> None:
    from gateway.configuration import load
    from gateway.settings import SettingsError

    text = '[{"url": "https://example.org/x", "secret_file": "s", "on": "held"}]'
    given = load({}, {"GATEWAY_NOTIFY": text})
    assert given.notify[0].on == ["held"]
    assert given.notify[0].secret_file.is_absolute()
    file = tmp_path / "gateway.yaml"
    for wrong, said in (
        ({"url": "ftp://x", "secret_file": "s"}, "notify.0.url: write an http or https URL"),
        ({"url": "https://x"}, "notify.0.secret_file"),
        ({"url": "https://x", "secret_file": "s", "on": ["done"]}, "notify.0.on"),
        ({"url": "https://x", "secret_fil": "s", "secret_file": "s"}, "did you mean secret_file"),
    ):
        file.write_text(json.dumps({"notify": [wrong]}))
        with pytest.raises(SettingsError, match=said):
            load({}, {}, file)
    same = {"url": "https://x/secret", "secret_file": "s"}
    file.write_text(json.dumps({"notify": [same, {**same, "url": "https://y"}, {**same, "on": ["held"]}]}))
    with pytest.raises(SettingsError, match="notify: entries 0 and 2 have the same url") as refused:
        load({}, {}, file)
    assert "x/secret" not in str(refused.value)
