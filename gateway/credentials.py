"""The settings of access: which credentials are accepted, what they allow, and limits.

Part of `gateway.settings`. Must not know how a credential is verified.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from gateway.patterns import InvalidPattern, parse
from gateway.quantities import Part, listed


def address(text: str) -> tuple[str, int]:
    """Splits HOST:PORT; an IPv6 address is in brackets, for example `[::1]:8080`. Raises ValueError."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != host.startswith("[") or not re.fullmatch(r"\d{1,5}", port):
        raise ValueError("write HOST:PORT, such as 127.0.0.1:9090 or [::1]:9090")
    if int(port) > 65535:
        raise ValueError(f"{port} is not a port")
    return bare, int(port)


def named_address(text: str) -> tuple[str, int | None]:
    """Splits NAME or NAME:PORT. The port is None if it is missing. Raises ValueError."""
    host, port = address(text) if ":" in text else (text, None)
    if port == 0 or not re.fullmatch(r"[A-Za-z0-9_.:-]{1,253}", host):
        raise ValueError("write a DNS name, or NAME:PORT, such as gateway-peers or gateway-peers:8080")
    return host, port


def _patterns(value: object) -> object:
    texts = listed(value)
    for text in texts if isinstance(texts, list) else ():
        try:
            parse(str(text))
        except InvalidPattern as error:
            raise ValueError(str(error)) from None
    return texts


PatternList = Annotated[list[str], BeforeValidator(_patterns)]


class Jwt(Part):
    """The issuer whose JWTs are credentials."""

    issuer: Annotated[str, Field(min_length=1)]
    """The claim `iss` of its tokens."""
    audience: Annotated[list[str], BeforeValidator(listed), Field(min_length=1)]
    """The claim `aud`: one of these."""
    jwks: Annotated[str, Field(min_length=1)]
    """Its public keys (JSON Web Key Set): a URL, or a file."""
    subject: str = "sub"
    """The claim with the name of the caller."""
    teams: str = "groups"
    """The claim with the teams of the caller."""


class Team(Part):
    """The models that the members of a team may use, as patterns of references."""

    predict: PatternList = []
    """The models that they may use and read about."""
    control: PatternList = []
    """The models that they may control and read about."""


class AccessSettings(Part):
    """Decides who may call the gateway."""

    tokens_file: Path | None = None
    """A list of `{name, sha256, team, predict, control, until}`; `gateway token create` makes an entry."""
    jwt: Jwt | None = None
    """The issuer whose JWTs are credentials. Needs the extra `jwt`."""
    teams: dict[str, Team] = {}
    """What the callers with a JWT may use, by team; `"*"`: every caller with a valid JWT."""
    anonymous: Literal["predict", "none"] | None = None
    """What a caller without a credential may do. Not set: `predict` while neither `tokens_file` nor `jwt` is
    set, `none` once one is."""

    audit_file: Path | None = None
    """The file of the audit log. Not set: `audit.jsonl` in `state_dir`."""

    @field_validator("tokens_file", "audit_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @property
    def guarded(self) -> bool:
        """Returns True if requests are checked for credentials."""
        return self.tokens_file is not None or self.jwt is not None or self.anonymous == "none"

    @property
    def anonymous_predicts(self) -> bool:
        return self.anonymous == "predict" or not self.guarded


class Limit(Part):
    """What a team, or a token, may use. Not set: as much as there is."""

    requests_per_second: Annotated[float, Field(gt=0)] | None = None
    """Predictions per second; more get 429."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Predictions at the same time; more get 429."""
    rows_per_second: Annotated[float, Field(gt=0)] | None = None
    """Rows per second, on average; while it is exceeded, requests get 429."""
