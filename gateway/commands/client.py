"""The HTTP client of the command line: makes control calls to a running gateway.

Knows how to send a call and the JSON form of an error; must not know what a gateway does inside. Raises
`Failure` for every error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import httpx

from gateway.commands.terminal import Failure, apart

DEFAULT_URL = "http://127.0.0.1:8080"
_NOT_A_GATEWAY = "check that --url or GATEWAY_URL is the URL of a gateway"


class Client:
    """`url` is the gateway's base URL, `key` its admin key or None. Use it as a context manager."""

    def __init__(self, url: str, key: str | None = None, timeout: float | None = 30.0) -> None:
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)
        except httpx.InvalidURL as error:
            raise Failure(f"{url} is not a URL: {error}", f"write it like {DEFAULT_URL}", code=2) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def text(self, path: str) -> str:
        return self._send("GET", path).text

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float | None = None,
        accept: tuple[int, ...] = (),
        **query: bool,
    ) -> dict[str, Any]:
        """Returns the JSON answer if its status is a success or one of `accept`. Raises Failure otherwise.

        `timeout` is in seconds. None means the client's own timeout, 0 means no timeout.
        """
        options: dict[str, Any] = {"params": {name: "true" if on else "false" for name, on in query.items()}}
        if timeout is not None:
            options["timeout"] = httpx.Timeout(timeout or None, connect=10.0)
        if body is not None:
            options["json"] = body
        answer = self._send(method, path, accept, **options)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Failure(f"{self.url} answered {path} without a JSON object", _NOT_A_GATEWAY)
        return found

    def chunks(self, path: str, **query: str) -> Iterator[bytes]:
        """The pieces of an answer that may be large. Raises Failure."""
        try:
            with self._http.stream("GET", path, params=query) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _refusal(answer)
                yield from answer.iter_bytes()
        except httpx.TransportError as error:
            raise _away(self.url, error) from None

    def _send(self, method: str, path: str, accept: tuple[int, ...] = (), **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.UnsupportedProtocol:
            raise Failure(f"{self.url} is not a URL", f"write it like {DEFAULT_URL}", code=2) from None
        except httpx.TimeoutException:
            raise Failure(
                f"{self.url} did not answer {path} in time", "try again, or read the gateway's log"
            ) from None
        except httpx.TransportError as error:
            raise _away(self.url, error) from None
        if answer.is_success or answer.status_code in accept:
            return answer
        raise _refusal(answer)


def _away(url: str, error: Exception) -> Failure:
    reason = str(error) or type(error).__name__
    hint = "start one with `gateway serve`, or give its URL with --url"
    return Failure(f"no gateway answers at {url}: {reason}", hint)


def _refusal(answer: httpx.Response) -> Failure:
    """An error answer as a failure: with the answer's message and hint if it has the gateway's form."""
    try:
        body = answer.json()
        message, code = str(body["message"]), str(body["error_code"])
    except (ValueError, KeyError, TypeError):
        return Failure(f"{answer.request.url} answered {answer.status_code}", _NOT_A_GATEWAY)
    hint = body.get("hint")
    if code == "UNAUTHENTICATED":  # the server's hint is for HTTP clients
        hint = (
            "give the gateway's key with --admin-key-file FILE or GATEWAY_ADMIN_KEY; it is in the gateway's "
            "admin_key_file, else in the file control.key in its state_dir"
        )
    details = body.get("details") or ()
    if code == "INVALID_INPUT" and details:  # the message is the first of them, the hint is for HTTP clients
        faults = [_fault(detail) for detail in details]
        return Failure(f"the gateway does not accept the request ({code})", problems=faults)
    message, problems = apart(message, [str(detail.get("problem")) for detail in details])
    return Failure(f"{message} ({code})", str(hint) if hint else None, problems=problems)


def _fault(detail: Mapping[str, Any]) -> str:
    """A detail of an error answer in words: where it is, what is wrong, and what is expected."""
    expected = f"; expected: {detail['expected']}" if "expected" in detail else ""
    return f"{detail.get('path')} {detail.get('problem')}{expected}"
