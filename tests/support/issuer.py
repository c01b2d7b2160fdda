"""A small OpenID Connect issuer for tests: real keys, which rotate, at a real URL, and its tokens.

It also signs what no issuer would, for attacks.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

AUDIENCE = "model-gateway"


class SigningKey:
    """A private key of the issuer. `alg`: RS256, ES256 or EdDSA."""

    def __init__(self, kid: str, alg: str = "RS256", bits: int = 2048) -> None:
        self.kid, self.alg = kid, alg
        self.private: Any
        if alg.startswith("RS"):
            self.private = rsa.generate_private_key(65537, bits)
        elif alg == "EdDSA":
            self.private = ed25519.Ed25519PrivateKey.generate()
        else:
            self.private = ec.generate_private_key(ec.SECP256R1())

    def public(self) -> dict[str, Any]:
        """As the issuer publishes it."""
        algorithm = jwt.get_algorithm_by_name(self.alg)
        return {**json.loads(algorithm.to_jwk(self.private.public_key())), "kid": self.kid, "use": "sig"}


class Issuer:
    """Publishes the keys in `published`; counts in `asked` how often they were read. `broken`: it answers
    with an error."""

    def __init__(self) -> None:
        self.published: list[dict[str, Any]] = []
        self.asked = 0
        self.broken = False
        self.body: bytes | None = None
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                body = issuer.body or json.dumps({"keys": issuer.published}).encode()
                self.send_response(503 if issuer.broken else 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def publish(self, *keys: SigningKey) -> None:
        self.published = [key.public() for key in keys]

    def claims(self, **changed: Any) -> dict[str, Any]:
        now = int(time.time())
        known = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "alice",
            "exp": now + 300,
            "iat": now,
            "groups": ["fraud"],
        }
        return {name: value for name, value in {**known, **changed}.items() if value is not None}

    def sign(self, key: SigningKey, head: dict[str, Any] | None = None, **changed: Any) -> str:
        """A token. What is None in its header or its claims is left out."""
        header = {"alg": key.alg, "typ": "JWT", "kid": key.kid, **(head or {})}
        header = {name: value for name, value in header.items() if value is not None}
        unsigned = forged(header, self.claims(**changed))[:-1]
        signature = jwt.get_algorithm_by_name(key.alg).sign(unsigned.encode(), key.private)
        return f"{unsigned}.{_base64(signature)}"

    def settings(self) -> dict[str, Any]:
        """The setting `access.jwt` for this issuer."""
        return {"issuer": self.url, "audience": [AUDIENCE], "jwks": f"{self.url}/keys"}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def forged(head: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    """A token of these parts, whatever they say."""
    parts = [json.dumps(head).encode(), json.dumps(claims).encode(), signature]
    return ".".join(map(_base64, parts))


def _base64(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


@contextmanager
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    try:
        yield made
    finally:
        made.close()
