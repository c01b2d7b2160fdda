"""The REST calls to an MLflow server that the registry and the artifact cache share.

Credentials and TLS come from the variables that MLflow's own client reads. Every call ends: it has a
deadline, a limit on the bytes that it reads, and a bounded number of retries. An answer that is not MLflow's
own (a proxy's page, half a document) counts as no answer. Knows URLs and JSON; must not know models.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import httpx

from gateway import backoff, tracing
from gateway.registries.deadline import Deadline

#: The deadline of one call with its retries, in seconds; MLFLOW_HTTP_REQUEST_TIMEOUT replaces it.
DEADLINE: Final = 10.0
#: MLFLOW_HTTP_REQUEST_MAX_RETRIES replaces it, up to `MOST_RETRIES`.
RETRIES: Final = 2
MOST_RETRIES: Final = 10
MAX_ANSWER: Final = 32 * 1024**2
_CHUNK: Final = 1 << 18
_RETRIED: Final = frozenset({408, 429, 500, 502, 503, 504})
#: The failures after which a write may be sent again, because the server has not begun to process it.
_RETRIED_WRITES: Final = frozenset({429, 503})
_FALSE: Final = ("", "false", "0")
_API: Final = "api/2.0/mlflow/"
_ARTIFACTS: Final = "api/2.0/mlflow-artifacts/artifacts"


class MLflowError(Exception):
    """The server refused a call. `code` is its error_code, `status` that of HTTP."""

    def __init__(
        self, message: str, code: str = "", status: int = 0, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.retry_after = retry_after

    @property
    def absent(self) -> bool:
        """Whether the server itself answered that the requested object does not exist."""
        return self.status == 404 and self.code == "RESOURCE_DOES_NOT_EXIST"


class MLflowUnavailable(MLflowError):
    """No answer, or an answer that is not MLflow's: it allows no conclusion. `reached`: a server did answer,
    so another call may succeed."""

    def __init__(
        self, message: str, *, status: int = 0, reached: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(message, status=status, retry_after=retry_after)
        self.reached = reached


class MLflowClient:
    """`target` is `http(s)://[USER:PASSWORD@]HOST[:PORT][/PATH]`, with or without `mlflow+` before it.

    `peer` is called with the host and the address of each connection, before anything is sent; what it raises
    ends the call. `base` is `target` without credentials and ending. All methods block and may be called from
    any thread. Raises ValueError for an invalid target or environment variable.
    """

    def __init__(
        self,
        target: str,
        environ: Mapping[str, str] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        peer: Callable[[str, list[str]], None] | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        parts = urlsplit(target.removeprefix("mlflow+"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{target} is not an MLflow server: write http(s)://HOST[:PORT][/PATH]")
        host = parts.netloc.rpartition("@")[2]
        self.base = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self.host = parts.hostname
        self._deadline = _number(environ, "MLFLOW_HTTP_REQUEST_TIMEOUT", DEADLINE)
        self._retries = int(min(MOST_RETRIES, _number(environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)))
        self._clock = clock
        self._pause = pause
        self._peer = peer
        self._headers = {"Accept-Encoding": "identity"}
        self._auth: httpx.Auth | None = None
        if parts.username:
            self._auth = httpx.BasicAuth(unquote(parts.username), unquote(parts.password or ""))
        else:
            self._sign_in(environ)
        self._verify = _tls(environ) if parts.scheme == "https" else True
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<MLflowClient {self.base}>"

    def call(
        self,
        method: str,
        path: str,
        values: Mapping[str, Any] | None = None,
        *,
        retries: int | None = None,
    ) -> dict[str, Any]:
        """Makes one call of the REST interface, below `api/2.0/mlflow/`. `values` are the query of a GET,
        else the body. Returns the answer's object. Raises MLflowError, MLflowUnavailable."""
        until = self._clock() + self._deadline
        left = self._retries if retries is None else retries
        tried = 0
        while True:
            try:
                return self._asked(method, path, values, until)
            except MLflowUnavailable as error:
                again = _RETRIED if method == "GET" else _RETRIED_WRITES
                tried += 1
                wait = backoff.pause(tried, first=0.2, longest=self._deadline, asked=error.retry_after)
                retry = error.status in again or (method == "GET" and not error.status)
                if not retry or left <= 0 or self._clock() + wait >= until:
                    raise
            left -= 1
            self._pause(wait)

    def _asked(
        self, method: str, path: str, values: Mapping[str, Any] | None, until: float
    ) -> dict[str, Any]:
        sent: dict[str, Any] = {"params": values} if method == "GET" else {"json": dict(values or {})}
        with self._sent(method, _API + path, until, **sent) as response:
            content = b"".join(self._chunks(response, MAX_ANSWER))
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if response.status_code == 200 and isinstance(answer, dict):
            return answer
        raise self._refusal(response, answer)

    # Files, through the server's artifact proxy. A place is a path below the proxy's root.

    def files(self, place: str) -> list[tuple[str, bool, int]]:
        """(name, whether it is a directory, bytes) of each entry of a directory, as the server lists it."""
        until = self._clock() + self._deadline
        with self._sent("GET", _ARTIFACTS, until, params={"path": place}) as response:
            content = b"".join(self._chunks(response, MAX_ANSWER))
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if response.status_code != 200 or not isinstance(answer, dict):
            raise self._refusal(response, answer)
        listed = answer.get("files", [])
        try:
            return [(str(f["path"]), bool(f.get("is_dir")), int(f.get("file_size") or 0)) for f in listed]
        except (TypeError, KeyError, ValueError, AttributeError):
            raise MLflowUnavailable(f"{self.base} lists files in a form that is not MLflow's") from None

    def download(self, place: str, size: int) -> Iterator[bytes]:
        """A file's bytes, exactly `size` of them. Raises MLflowUnavailable for fewer or more bytes."""
        until = self._clock() + download_seconds(size)
        got = 0
        with self._sent("GET", f"{_ARTIFACTS}/{quote(place)}", until) as response:
            if response.status_code != 200:
                raise self._refusal(response, None)
            for chunk in self._chunks(response, size):
                got += len(chunk)
                yield chunk
        if got != size:
            raise MLflowUnavailable(f"{self.base} sent {got} of {size} bytes", reached=True)

    def read_range(self, place: str, start: int, end: int) -> bytes:
        """The bytes of a file from `start` to `end`. Raises MLflowUnavailable, also if the server sends
        something else."""
        wanted = end - start
        until = self._clock() + download_seconds(wanted)
        headers = {"Range": f"bytes={start}-{end - 1}"}
        with self._sent("GET", f"{_ARTIFACTS}/{quote(place)}", until, headers=headers) as response:
            told = re.match(r"bytes (\d+)-(\d+)/", response.headers.get("content-range", ""))
            if response.status_code != 206 or told is None or int(told[1]) != start:
                raise self._refusal(response, None)
            content = b"".join(self._chunks(response, wanted))
        if len(content) != wanted:
            raise MLflowUnavailable(f"{self.base} sent {len(content)} of {wanted} bytes", reached=True)
        return content

    def upload(self, place: str, file: Path) -> None:
        """Uploads one file."""
        until = self._clock() + download_seconds(file.stat().st_size)
        with file.open("rb") as content:
            chunks = iter(lambda: content.read(_CHUNK), b"")
            headers = {"Content-Length": str(file.stat().st_size)}
            path = f"{_ARTIFACTS}/{quote(place)}"
            with self._sent("PUT", path, until, content=chunks, headers=headers) as response:
                self._drained(response)
        if response.status_code != 200:
            raise self._refusal(response, None)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    # Parts of the above.

    @contextlib.contextmanager
    def _sent(self, method: str, path: str, until: float, **parts: Any) -> Iterator[httpx.Response]:
        left = max(0.1, until - self._clock())
        timeout = httpx.Timeout(min(left, 30.0), connect=min(left, 5.0))
        headers = {**tracing.headers(), **parts.pop("headers", {})}

        def connected(stream: Any) -> None:
            if self._peer is not None:
                self._peer(self.host, [stream.get_extra_info("server_addr")[0]])

        with Deadline(left, connected) as deadline:
            try:
                with self._http().stream(
                    method,
                    f"{self.base}/{path}",
                    timeout=timeout,
                    auth=self._auth,
                    headers=headers,
                    extensions={"trace": deadline.trace},
                    **parts,
                ) as response:
                    yield response
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
                if deadline.passed:
                    reason = f"its answer did not come within {left:.0f} s"
                raise MLflowUnavailable(f"cannot reach {self.base}: {reason}") from error

    def _chunks(self, response: httpx.Response, limit: int) -> Iterator[bytes]:
        """The body. Raises MLflowUnavailable beyond the limit."""
        got = 0
        for chunk in response.iter_raw():
            got += len(chunk)
            if got > limit:
                raise MLflowUnavailable(f"{self.base} sent more than {limit} bytes", reached=True)
            yield chunk

    def _drained(self, response: httpx.Response) -> None:
        for _ in self._chunks(response, MAX_ANSWER):
            pass

    def _refusal(self, response: httpx.Response, answer: object) -> MLflowError:
        status = response.status_code
        if status in (401, 403):
            hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            message = f"{self.base} refuses this gateway's credentials ({status}): {hint}"
            return MLflowUnavailable(message, status=status, reached=True)
        code = answer.get("error_code") if isinstance(answer, dict) else None
        if isinstance(code, str) and 400 <= status < 500 and status not in _RETRIED:
            message = str(answer.get("message") or code) if isinstance(answer, dict) else code
            return MLflowError(message[:500], code, status)
        what = f"answered {status}" if status != 200 else "gave an answer that is not MLflow's"
        asked = backoff.retry_after(response.headers.get("retry-after"))
        return MLflowUnavailable(f"{self.base} {what}", status=status, reached=True, retry_after=asked)

    def _http(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                self._client = httpx.Client(
                    headers=self._headers,
                    verify=self._verify,
                    follow_redirects=False,
                    # Each call has its own connection, so that a call which does not end can be cut alone.
                    limits=httpx.Limits(max_connections=32, max_keepalive_connections=0),
                )
            return self._client

    def _sign_in(self, environ: Mapping[str, str]) -> None:
        """Signs in as MLflow's client does: user and password, else its credentials file, else a token."""
        for name in ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4"):
            if environ.get(name, "").lower() not in _FALSE:
                raise ValueError(f"{name} is not supported: this gateway signs in with a password or a token")
        user, password = environ.get("MLFLOW_TRACKING_USERNAME"), environ.get("MLFLOW_TRACKING_PASSWORD")
        if not (user and password):
            found = _credentials_file(environ)
            user, password = user or found[0], password or found[1]
        if user and password:
            self._auth = httpx.BasicAuth(user, password)
        elif token := environ.get("MLFLOW_TRACKING_TOKEN"):
            self._headers["Authorization"] = f"Bearer {token}"


def download_seconds(size: int) -> float:
    """The seconds that a download of `size` bytes may take, at the lowest accepted speed."""
    return 60.0 + size / 50_000


def _credentials_file(environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    home = environ.get("HOME")
    file = Path(home, ".mlflow", "credentials") if home else None
    if file is None or not file.is_file():
        return None, None
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(file.read_text(encoding="utf-8"))
    except (configparser.Error, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    section = parser["mlflow"] if parser.has_section("mlflow") else {}
    return section.get("mlflow_tracking_username"), section.get("mlflow_tracking_password")


def _tls(environ: Mapping[str, str]) -> ssl.SSLContext:
    """The TLS context: trusts any certificate, the operator's own authority, or the usual authorities."""
    if environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() not in _FALSE:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        names = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
        name, place = next(((n, environ[n]) for n in names if environ.get(n)), ("", ""))
        if not place:
            context = httpx.create_ssl_context()
        else:
            try:
                directory = os.path.isdir(place)
                context = ssl.create_default_context(
                    cafile=None if directory else place, capath=place if directory else None
                )
            except OSError as error:  # ssl.SSLError is one
                raise ValueError(f"cannot use {name}={place}: {error}") from error
    if client := environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
        try:
            context.load_cert_chain(client)
        except OSError as error:
            raise ValueError(f"cannot use MLFLOW_TRACKING_CLIENT_CERT_PATH={client}: {error}") from error
    return context


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ValueError(f"{name}={text} is not a valid number here")
    return value
