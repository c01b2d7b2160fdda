"""JWTs: what is accepted, every attack that is not, and keys that rotate while the issuer is there or not."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import needs

needs("jwt")

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: E402

from gateway.access import Access  # noqa: E402
from gateway.access import issuer as issuers  # noqa: E402
from gateway.access.issuer import Issuer, Refused, UnknownKey, keys_of  # noqa: E402
from gateway.access.keptkeys import OLDEST  # noqa: E402
from gateway.credentials import AccessSettings, Jwt, Team  # noqa: E402
from gateway.settings import Settings  # noqa: E402
from tests.support.issuer import Issuer as Real  # noqa: E402
from tests.support.issuer import SigningKey, forged, issuer  # noqa: E402

pytestmark = pytest.mark.anyio
RSA, EC, ED = SigningKey("one", "RS256"), SigningKey("two", "ES256"), SigningKey("three", "EdDSA")


@pytest.fixture
def real() -> Iterator[Real]:
    with issuer() as made:
        made.publish(RSA, EC, ED)
        yield made


async def verifier(real: Real, **settings: Any) -> Issuer:
    made = Issuer(Jwt(**{**real.settings(), **settings}))
    assert await made.look()
    return made


@pytest.mark.parametrize("key", [RSA, EC, ED], ids=lambda key: key.alg)
async def test_a_token_of_the_issuer_is_accepted(real: Real, key: SigningKey) -> None:
    verifies = await verifier(real)
    claims = verifies.verify(real.sign(key, exp=int(time.time()) + 100).encode())
    assert (claims.subject, claims.teams) == ("alice", ("fraud",))
    assert claims.until == pytest.approx(time.time() + 130, abs=20)
    without_kid = real.sign(key, {"kid": None})
    assert verifies.verify(without_kid.encode()).subject == "alice"
    several = real.sign(key, aud=["x", "model-gateway"], groups="fraud")
    assert verifies.verify(several.encode()).teams == ("fraud",)


def only(directory: Path) -> Path:
    """The one file there."""
    (file,) = directory.iterdir()
    return file


async def test_a_gateway_that_starts_while_the_issuer_is_away_uses_the_last_keys(
    real: Real, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Jwt(**real.settings())
    assert await Issuer(settings, state_dir=tmp_path).look()
    file = only(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600
    real.broken = True
    token = real.sign(RSA).encode()
    again = Issuer(settings, state_dir=tmp_path)
    assert not await again.look()
    assert again.verify(token).subject == "alice"
    # The keys of another issuer, or of another place, are not these.
    elsewhere = Jwt(**{**real.settings(), "jwks": f"{real.url}/others"})
    for other in (Issuer(elsewhere, state_dir=tmp_path), Issuer(settings), Issuer(settings, state_dir=file)):
        with pytest.raises(UnknownKey):
            other.verify(token)
    # What the issuer withdraws is gone once it can be read again.
    real.broken = False
    real.publish(EC)
    assert await again.look()
    with pytest.raises(UnknownKey):
        Issuer(settings, state_dir=tmp_path).verify(token)
    assert only(tmp_path) == file


@pytest.mark.parametrize(
    "way", ["old", "of the future", "readable", "writable", "a link", "a pipe", "no keys", "large"]
)
async def test_kept_keys_that_others_may_have_written_or_that_are_old_are_not_used(
    way: str, real: Real, tmp_path: Path
) -> None:
    settings = Jwt(**real.settings())
    assert await Issuer(settings, state_dir=tmp_path).look()
    file = only(tmp_path)
    now = time.time()
    match way:
        case "old":
            os.utime(file, (now, now - OLDEST - 60))
        case "of the future":
            os.utime(file, (now, now + 3600))
        case "readable":
            file.chmod(0o640)
        case "writable":
            file.chmod(0o602)
        case "a link":
            file.rename(tmp_path / "there")
            file.symlink_to(tmp_path / "there")
        case "a pipe":
            file.unlink()
            os.mkfifo(file, 0o600)
        case "no keys":
            file.write_text("{}")
        case _:
            file.write_bytes(file.read_bytes() + b" " * issuers.MAX_DOCUMENT)
    again = Issuer(settings, state_dir=tmp_path)
    with pytest.raises(UnknownKey):
        again.verify(real.sign(RSA).encode())
    assert await again.look()
    assert again.verify(real.sign(RSA).encode()).subject == "alice"


async def test_an_unchanged_key_is_as_young_as_its_last_read(real: Real, tmp_path: Path) -> None:
    verifies = Issuer(Jwt(**real.settings()), state_dir=tmp_path)
    assert await verifies.look()
    file = only(tmp_path)
    os.utime(file, (0, 0))
    assert await verifies.look()
    assert time.time() - file.stat().st_mtime < 3600


async def test_other_claims_may_name_caller_and_teams(real: Real) -> None:
    verifies = await verifier(real, subject="email", teams="roles")
    claims = verifies.verify(real.sign(RSA, email="a@b.example", roles=["x", 5, "y"]).encode())
    assert (claims.subject, claims.teams) == ("a@b.example", ("x", "y"))
    with pytest.raises(Refused, match="no claim email"):
        verifies.verify(real.sign(RSA).encode())


def hmac_with(secret: bytes, real: Real, alg: str = "HS256") -> str:
    """A token whose HMAC uses public bytes as the secret."""
    unsigned = forged({"alg": alg, "kid": "one", "typ": "JWT"}, real.claims())[:-1]
    signature = hmac.new(secret, unsigned.encode(), hashlib.sha256).digest()
    import base64

    return unsigned + "." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()


PEM = RSA.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
NOW = int(time.time())


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        (lambda real: forged({"alg": "none", "kid": "one"}, real.claims()), "algorithm"),
        (lambda real: forged({"alg": "None"}, real.claims()), "algorithm"),
        (lambda real: hmac_with(PEM, real), "algorithm"),
        (lambda real: hmac_with(json.dumps(RSA.public()).encode(), real), "algorithm"),
        (lambda real: forged({"alg": "PS256", "kid": "one"}, real.claims(), b"x" * 256), "algorithm"),
        (lambda real: forged({"alg": ["RS256"], "kid": "one"}, real.claims(), b"x"), "algorithm|not known"),
        (lambda real: forged({"alg": "RS256", "kid": "one"}, real.claims(), b"x" * 256), "signature"),
        (lambda real: forged({"alg": "RS256", "kid": "one"}, real.claims()), "signature"),
        (lambda real: real.sign(SigningKey("one")), "signature"),
        (lambda real: real.sign(RSA, exp=NOW - 3600), "expired"),
        (lambda real: real.sign(RSA, exp=None), "exp"),
        (lambda real: real.sign(RSA, exp="soon"), "not valid"),
        (lambda real: real.sign(RSA, exp=1e400), "not valid|expired"),
        (lambda real: real.sign(RSA, aud="another"), "audience"),
        (lambda real: real.sign(RSA, aud=None), "aud"),
        (lambda real: real.sign(RSA, iss="https://evil.example"), "issuer"),
        (lambda real: real.sign(RSA, iss=None), "iss"),
        (lambda real: real.sign(RSA, nbf=NOW + 3600), "not valid yet"),
        (lambda real: real.sign(RSA, sub=None), "sub"),
        (lambda real: real.sign(RSA, sub="x" * 300), "sub"),
        (lambda real: real.sign(RSA, sub="eve\n2026-01-01 INFO admin"), "sub"),
        (lambda real: real.sign(RSA, {"crit": ["x"], "x": 1}), "not valid|not known"),
        (lambda real: real.sign(RSA) + "x" * 20_000, "too long"),
        (lambda real: "a.b.c", "not known"),
        (lambda real: "..", "not known"),
        (lambda real: "é.ü.ñ", "not known"),
    ],
)
async def test_an_attack_is_refused(real: Real, attack: Any, why: str) -> None:
    verifies = await verifier(real)
    try:
        token = attack(real)
    except ValueError:
        pytest.skip("the library does not write it")
    with pytest.raises(Refused, match=why) as caught:
        verifies.verify(token.encode())
    assert token[:20] not in str(caught.value)


@pytest.mark.parametrize("kid", ["../../etc/passwd", "four", "http://evil.example/keys", "one\x00", ""])
async def test_a_kid_is_only_compared(real: Real, kid: str, tmp_path: Path) -> None:
    verifies = await verifier(real)
    asked = real.asked
    head = {
        "kid": kid,
        "jku": "http://127.0.0.1:1/keys",
        "jwk": SigningKey("x").public(),
        "x5u": "http://127.0.0.1:1/",
    }
    with pytest.raises(UnknownKey):
        verifies.verify(real.sign(SigningKey("evil"), head).encode())
    assert real.asked == asked


async def test_an_algorithm_must_fit_the_key(real: Real) -> None:
    verifies = await verifier(real)
    for alg, kid in (("ES256", "one"), ("RS256", "two"), ("EdDSA", "one")):
        with pytest.raises(UnknownKey):
            verifies.verify(forged({"alg": alg, "kid": kid}, real.claims(), b"x" * 64).encode())
    real.published = [{**RSA.public(), "alg": "RS512"}]
    only = await verifier(real)
    with pytest.raises(UnknownKey):
        only.verify(real.sign(RSA).encode())


async def test_keys_rotate_and_a_key_that_is_gone_verifies_nothing(real: Real) -> None:
    told: list[int] = []
    verifies = Issuer(Jwt(**real.settings()), changed=lambda: told.append(1))
    await verifies.look()
    old = real.sign(RSA).encode()
    verifies.verify(old)
    new = SigningKey("new")
    real.publish(new)
    token = real.sign(new).encode()
    with pytest.raises(UnknownKey):
        verifies.verify(token)
    assert not await verifies.look_for_a_new_key(), "the keys were read a moment ago"
    verifies._looked -= issuers.LOOK_AGAIN
    assert await verifies.look_for_a_new_key()
    assert verifies.verify(token).subject == "alice"
    with pytest.raises(UnknownKey):
        verifies.verify(old)
    assert len(told) == 2
    asked = real.asked
    for _ in range(20):
        await verifies.look_for_a_new_key()
    assert real.asked == asked, "unknown keys do not make the issuer busy"


async def test_a_key_that_is_gone_ends_what_it_signed_and_the_sessions_of_browsers(
    real: Real, tmp_path: Path
) -> None:
    teams = {"*": Team(predict=["iris"])}
    known = AccessSettings(jwt=Jwt(**real.settings()), teams=teams)
    access = Access(Settings(state_dir=tmp_path, access=known))
    headers = {b"authorization": b"Bearer " + real.sign(RSA).encode()}
    caller = await access.identify(headers)
    assert caller.known
    secret = access.sessions.begin(access.sessions.code(caller))
    cookie = f"{access.sessions.cookie}={secret}".encode()
    assert access.signed_in(cookie) is caller
    real.publish(SigningKey("new"))
    assert access._issuer is not None
    await access._issuer.look()
    assert access.recall(headers) is None
    assert access.signed_in(cookie) is None


@pytest.mark.parametrize("fault", ["broken", "empty", "not json", "large", "gone"])
async def test_while_the_issuer_is_out_the_last_keys_stay(
    real: Real, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    verifies = await verifier(real)
    if fault == "broken":
        real.broken = True
    elif fault == "gone":
        verifies._settings = verifies._settings.model_copy(update={"jwks": "http://127.0.0.1:1/keys"})
    else:
        texts = {"empty": b'{"keys": []}', "not json": b"<html>", "large": b" " * (2 << 20)}
        real.body = texts[fault]
    assert not await verifies.look()
    assert "cannot read the keys" in caplog.text
    assert verifies.verify(real.sign(RSA).encode()).subject == "alice"


async def test_keys_in_a_file_are_followed(real: Real, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [RSA.public()]}))
    verifies = await verifier(real, jwks=str(file))
    verifies.verify(real.sign(RSA).encode())
    fresh = tmp_path / "fresh"
    fresh.write_text(json.dumps({"keys": [EC.public()]}))
    os.replace(fresh, file)
    assert await verifies.look()
    verifies.verify(real.sign(EC).encode())
    with pytest.raises(UnknownKey):
        verifies.verify(real.sign(RSA).encode())
    file.unlink()
    assert not await verifies.look()
    verifies.verify(real.sign(EC).encode())
    assert real.asked == 0


def test_only_keys_that_can_be_trusted_are_used() -> None:
    symmetric = {"kty": "oct", "k": "c2VjcmV0", "kid": "s", "alg": "HS256"}
    weak = SigningKey("weak", bits=1024).public()
    encrypting = {**RSA.public(), "use": "enc"}
    odd = [{"kty": "RSA", "n": 5}, {"kty": "EC", "crv": "secp256k1"}, "word", {"kty": ["RSA"]}]
    document = json.dumps({"keys": [symmetric, weak, encrypting, *odd, ED.public()]}).encode()
    assert [key.kid for key in keys_of(document)] == ["three"]
    for bad in ([symmetric], [], [RSA.public()] * 101):
        with pytest.raises(ValueError, match="key"):
            keys_of(json.dumps({"keys": bad}).encode())
