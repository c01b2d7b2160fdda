"""A reverse proxy before a real server: it may ask for a token, and speak TLS with its own certificate."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import needs

_DROPPED = frozenset({"host", "connection", "transfer-encoding", "content-length", "date", "server"})


class Front(http.server.ThreadingHTTPServer):
    """Passes on to `target` what carries the token as `Authorization: Bearer`; without one, everything."""

    daemon_threads = True

    def __init__(self, target: str, token: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.token = token
        self.authorizations: list[str | None] = []
        #: When each request came (`time.monotonic`), and its method and path.
        self.requests: list[tuple[float, str]] = []
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server_port}"
        self.client = httpx.Client(base_url=target, timeout=60)
        self._tls = tls

    def get_request(self) -> tuple[Any, Any]:
        connection, peer = super().get_request()
        if self._tls is not None:
            # The handshake is the handler's thread's: one that fails must not hold up the others.
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, peer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that does not trust it leaves in the handshake, as it should."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Front

    def _pass_on(self) -> None:
        told = self.headers["authorization"]
        self.server.authorizations.append(told)
        self.server.requests.append((time.monotonic(), f"{self.command} {self.path.partition('?')[0]}"))
        content = self.rfile.read(int(self.headers["content-length"] or 0))
        if self.server.token is not None and told != f"Bearer {self.server.token}":
            self._answer(401, {"content-type": "text/plain", "www-authenticate": "Bearer"}, b"who are you?")
            return
        passed = {name: value for name, value in self.headers.items() if name.lower() not in _DROPPED}
        passed.pop("Authorization", None)  # the server behind knows nothing of it
        answer = self.server.client.request(self.command, self.path, headers=passed, content=content)
        headers = {name: value for name, value in answer.headers.items() if name.lower() not in _DROPPED}
        self._answer(answer.status_code, headers, answer.content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815 - the base class's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Not to standard error."""


@contextmanager
def front(target: str, token: str | None = None, tls: ssl.SSLContext | None = None) -> Iterator[Front]:
    made = Front(target, token, tls)
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        made.client.close()


class Authority:
    """A certificate authority of one's own. `file` is what others need to trust it."""

    def __init__(self, directory: Path, name: str = "tests") -> None:
        needs("cryptography")
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"the authority of {name}")])
        self.file = directory / "authority.pem"
        self.file.write_bytes(self._signed(self._name, self._key.public_key(), authority=True))

    def issue(self, name: str, *hosts: str) -> Path:
        """A file with a key and a certificate for these addresses and names."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        file = self._directory / f"{name}.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + self._signed(subject, key.public_key(), hosts)
        )
        return file

    def server(self, *hosts: str, clients: bool = False) -> ssl.SSLContext:
        """TLS with a certificate for these; with `clients` only for those who show one, too."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.issue("server", *hosts))
        if clients:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.file)
        return context

    def _signed(
        self, subject: Any, key: Any, hosts: tuple[str, ...] = (), *, authority: bool = False
    ) -> bytes:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if hosts:
            names = [_general_name(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _general_name(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
