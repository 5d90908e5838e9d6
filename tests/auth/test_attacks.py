"""Tokens that somebody made up: none of them is let in, whatever keys are configured."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from exportd.auth.keys import UnusableKey, load_public_key, parse_jwks, secret_key
from exportd.auth.tokens import Claims, InvalidToken, Tokens
from exportd.domain.principal import Principal

SECRET = "s" * 64
RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
P256, P384 = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()
ALL = ["HS256", "HS384", "HS512", "RS256", "PS256", "ES256", "ES384", "EdDSA"]
ANN = Principal("ann", False)


def pem(key: Any) -> bytes:
    content: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return content


def claims(**more: object) -> dict[str, Any]:
    return {"userId": "ann", "exp": int(time.time()) + 60, **more}


def encoded(part: object) -> str:
    content = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def forged(header: Mapping[str, object], payload: object, key: bytes) -> str:
    """A token with an HMAC over any header at all."""
    message = f"{encoded(header)}.{encoded(payload)}"
    return f"{message}.{encoded(hmac.digest(key, message.encode(), hashlib.sha256))}"


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    """Verifies with a secret and with public keys of every kind."""
    keys = []
    for number, key in enumerate((RSA, P256, P384, ED25519)):
        path = tmp_path / f"{number}.pem"
        path.write_bytes(pem(key))
        keys.append(load_public_key(path))
    return Tokens(Claims(), ALL, secret=SECRET, keys=keys)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [(SECRET, "HS256"), (SECRET, "HS384"), (SECRET, "HS512"), (RSA, "RS256"), (RSA, "PS256"), (P256, "ES256"),
     (P384, "ES384"), (ED25519, "EdDSA")],
)  # fmt: skip
async def test_each_kind_of_key_verifies_its_own_algorithms(tokens: Tokens, key: Any, algorithm: str) -> None:
    assert await tokens.verify(jwt.encode(claims(), key, algorithm=algorithm)) == ANN


async def test_an_algorithm_that_is_not_listed_is_refused_though_a_key_fits(tokens: Tokens) -> None:
    with pytest.raises(InvalidToken, match="not allowed"):
        await tokens.verify(jwt.encode(claims(), RSA, algorithm="RS512"))


@pytest.mark.parametrize("length", [32, 47, 48, 63, 64])
async def test_a_secret_serves_the_algorithms_it_is_long_enough_for(length: int) -> None:
    expected = {"HS256"} | ({"HS384"} if length >= 48 else set()) | ({"HS512"} if length >= 64 else set())
    assert secret_key("x" * length).algorithms == expected


async def test_a_public_key_is_never_taken_for_a_secret(tokens: Tokens) -> None:
    header, der = {"alg": "HS256", "typ": "JWT"}, PublicFormat.SubjectPublicKeyInfo
    for key in (RSA, P256, ED25519):
        for material in (pem(key), pem(key).strip(), key.public_key().public_bytes(Encoding.DER, der)):
            with pytest.raises(InvalidToken):
                await tokens.verify(forged(header, claims(), material))


@pytest.mark.parametrize(
    "name", ["none", "None", "NONE", "nOnE", "", "HS256 ", "hs256", "HS1", "ES256K", "A128KW"]
)
async def test_made_up_algorithms_are_refused(tokens: Tokens, name: str) -> None:
    for signature in ("", "AAAA"):
        with pytest.raises(InvalidToken):
            await tokens.verify(f"{encoded({'alg': name})}.{encoded(claims())}.{signature}")
    with pytest.raises(InvalidToken):
        await tokens.verify(forged({"alg": name}, claims(), SECRET.encode()))


@pytest.mark.parametrize("algorithm", [None, 5, True, ["HS256"], {"a": 1}])
async def test_an_algorithm_of_a_wrong_type_is_refused(tokens: Tokens, algorithm: object) -> None:
    with pytest.raises(InvalidToken):
        await tokens.verify(forged({"alg": algorithm}, claims(), SECRET.encode()))


@pytest.mark.parametrize("kid", [5, None, [], "../../../dev/null", "x' UNION SELECT 'y", "\0", "k" * 5000])
async def test_the_name_of_a_key_opens_nothing(tokens: Tokens, kid: object) -> None:
    # An HMAC with what /dev/null holds, and with what the injected query would give.
    for key in (b"", b"y"):
        with pytest.raises(InvalidToken):
            await tokens.verify(forged({"alg": "HS256", "kid": kid}, claims(), key))


async def test_keys_that_the_token_brings_itself_are_ignored(tokens: Tokens) -> None:
    own = jwt.algorithms.RSAAlgorithm.to_jwk(OTHER_RSA.public_key(), as_dict=True)
    for header in (
        {"jwk": own},
        {"jku": "http://127.0.0.1:9/keys"},
        {"x5u": "http://127.0.0.1:9/certificate"},
        {"x5c": ["MIIB"]},
        {"jwk": own, "kid": "mine", "jku": "http://127.0.0.1:9/keys"},
    ):
        with pytest.raises(InvalidToken):
            await tokens.verify(jwt.encode(claims(), OTHER_RSA, algorithm="RS256", headers=header))


async def test_a_critical_extension_is_not_passed_over(tokens: Tokens) -> None:
    with pytest.raises(InvalidToken):
        await tokens.verify(forged({"alg": "HS256", "crit": ["exp"], "exp": 1}, claims(), SECRET.encode()))
    with pytest.raises(InvalidToken):
        await tokens.verify(
            forged({"alg": "HS256", "crit": ["b64"], "b64": False}, claims(), SECRET.encode())
        )


@pytest.mark.parametrize("part", [0, 1, 2])
async def test_a_change_in_any_part_is_noticed(tokens: Tokens, part: int) -> None:
    token = jwt.encode(claims(), SECRET, algorithm="HS256")
    parts = token.split(".")
    for place in range(len(parts[part])):
        other = "A" if parts[part][place] != "A" else "B"
        changed = parts[part][:place] + other + parts[part][place + 1 :]
        altered = [*parts[:part], changed, *parts[part + 1 :]]
        if base64.urlsafe_b64decode(changed + "==") == base64.urlsafe_b64decode(parts[part] + "=="):
            continue  # only the padding's bits differ
        with pytest.raises(InvalidToken):
            await tokens.verify(".".join(altered))
    with pytest.raises(InvalidToken):
        await tokens.verify(".".join([*parts[:part], "", *parts[part + 1 :]]))


@pytest.mark.parametrize(
    "wrong",
    [{"exp": None}, {"exp": []}, {"exp": "soon"}, {"exp": -1}, {"exp": 0}, {"exp": True}, {"nbf": "x"},
     {"nbf": 99999999999}, {"iat": 99999999999}, {"iat": "x"}, {"userId": {"id": "ann"}}, {"userId": 1.5},
     {"aud": "somebody else"}],
    ids=repr,
)  # fmt: skip
async def test_wrong_claims_are_refused(tokens: Tokens, wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidToken):
        await tokens.verify(jwt.encode(claims(**wrong), SECRET, algorithm="HS256"))


@pytest.mark.parametrize(
    "payload", [b"[]", b"null", b"5", b'"ann"', b"\xff", b"{", b"[" * 5000, b"", b'{"exp":NaN}']
)
async def test_a_payload_that_is_no_object_is_refused(tokens: Tokens, payload: bytes) -> None:
    with pytest.raises(InvalidToken):
        await tokens.verify(forged({"alg": "HS256"}, payload, SECRET.encode()))


async def test_a_huge_token_is_refused_unread(tokens: Tokens) -> None:
    with pytest.raises(InvalidToken, match="too long"):
        await tokens.verify(jwt.encode(claims(x="y" * 20000), SECRET, algorithm="HS256"))


async def test_a_former_secret_still_verifies_and_a_stranger_does_not() -> None:
    tokens = Tokens(Claims(), ["HS256"], secret="n" * 32, keys=[secret_key("f" * 32)])
    for secret in ("n" * 32, "f" * 32):
        assert await tokens.verify(jwt.encode(claims(), secret, algorithm="HS256")) == ANN
    assert jwt.decode(tokens.sign("ann", None, 60), "n" * 32, algorithms=["HS256"])
    with pytest.raises(InvalidToken, match="no key verifies"):
        await tokens.verify(jwt.encode(claims(), "x" * 32, algorithm="HS256"))


async def test_issuer_and_audience_must_be_the_configured_ones() -> None:
    tokens = Tokens(Claims(issuer="https://login", audience=("api", "web")), ["HS256"], secret=SECRET)
    assert await tokens.verify(tokens.sign("ann", None, 60)) == ANN
    for good in ("api", "web", ["x", "web"]):
        await tokens.verify(jwt.encode(claims(iss="https://login", aud=good), SECRET))
    for bad in (
        {"iss": "https://login"},
        {"aud": "api"},
        {"iss": "https://login/", "aud": "api"},
        {"iss": ["https://login"], "aud": "api"},
        {"iss": "https://login", "aud": "apis"},
        {"iss": "https://login", "aud": []},
        {"iss": "https://login", "aud": {"api": 1}},
    ):
        with pytest.raises(InvalidToken):
            await tokens.verify(forged({"alg": "HS256"}, claims() | bad, SECRET.encode()))


async def test_the_leeway_is_for_clocks_that_differ() -> None:
    tokens = Tokens(Claims(leeway_seconds=30), ["HS256"], secret=SECRET)
    now = int(time.time())
    for _ in range(2):
        assert (
            await tokens.verify(jwt.encode(claims(exp=now - 10, nbf=now + 10, iat=now + 10), SECRET)) == ANN
        )
    for wrong in ({"exp": now - 31}, {"nbf": now + 60}):
        with pytest.raises(InvalidToken):
            await tokens.verify(jwt.encode(claims(**wrong), SECRET))


@pytest.mark.parametrize(
    ("role", "is_admin"),
    [("admin", True), (["user", "admin"], True), (["admins"], False), ("administrator", False), (None, False),
     (["user", ["admin"]], False), ({"admin": True}, False), ("user admin", False), (True, False)],
)  # fmt: skip
async def test_the_role_is_a_text_or_a_list(role: object, is_admin: bool) -> None:
    nested = Tokens(Claims(role="realm_access.roles"), ["HS256"], secret=SECRET)
    plain = Tokens(Claims(role="https://example.com/role"), ["HS256"], secret=SECRET)
    expected = Principal("ann", is_admin)
    assert await nested.verify(jwt.encode(claims(realm_access={"roles": role}), SECRET)) == expected
    assert await plain.verify(jwt.encode(claims(**{"https://example.com/role": role}), SECRET)) == expected
    assert await nested.verify(jwt.encode(claims(realm_access=role), SECRET)) == ANN


@pytest.mark.parametrize("path", ["role", "realm_access.roles", "https://example.com/role"])
async def test_a_signed_token_verifies(path: str) -> None:
    tokens = Tokens(Claims(user="sub", role=path), ["HS256"], secret=SECRET)
    assert await tokens.verify(tokens.sign("ann", "admin", 60)) == Principal("ann", True)


@given(st.text(max_size=200) | st.from_regex(r"[\w-]{0,40}\.[\w-]{0,40}\.[\w-]{0,40}"))
async def test_any_text_at_all_is_refused_in_words(text: str) -> None:
    with pytest.raises(InvalidToken) as raised:
        await Tokens(Claims(), ALL, secret=SECRET).verify(text)
    str(raised.value).encode()


@given(
    st.dictionaries(
        st.sampled_from(["alg", "kid", "crit", "typ", "b64", "jwk", "cty"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.sampled_from(ALL),
            st.lists,
            max_leaves=5,
        ),
    ),
    st.recursive(st.none() | st.integers() | st.text(max_size=9), lambda inner: st.dictionaries(
        st.sampled_from(["exp", "nbf", "aud", "iss", "userId", "role", "sub", "jti"]), inner
    ), max_leaves=20),
)  # fmt: skip
async def test_any_claims_of_a_signed_token_verify_or_are_refused(
    header: dict[str, object], payload: object
) -> None:
    token = forged({"alg": "HS256"} | header, payload, SECRET.encode())
    try:
        principal = await Tokens(Claims(), ALL, secret=SECRET).verify(token)
    except InvalidToken:
        return
    assert isinstance(payload, dict)
    assert principal.user_id == str(payload["userId"])


def jwk(key: Any, **more: object) -> dict[str, object]:
    algorithm = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }[next(kind for kind in (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey)
           if isinstance(key, kind))]  # fmt: skip
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), **more}


def test_a_key_set_gives_the_keys_that_verify_and_passes_over_the_rest() -> None:
    weak = rsa.generate_private_key(65537, 1024)
    document = {
        "keys": [
            jwk(RSA, kid="a"),
            jwk(P256, kid="b", alg="ES256", use="sig"),
            jwk(ED25519),
            jwk(RSA, kid="for encryption", use="enc"),
            jwk(RSA, kid="of another algorithm", alg="RSA-OAEP"),
            jwk(P256, kid="mismatched", alg="RS256"),
            jwk(weak, kid="weak"),
            {"kty": "oct", "k": encoded(SECRET.encode()), "kid": "a secret"},
            {"kty": "RSA", "n": 5, "e": [], "kid": "broken"},
            {"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"},
            "no key",
        ]
    }
    keys = parse_jwks(json.dumps(document).encode())
    assert [(key.key_id, "RS256" in key.algorithms, "HS256" in key.algorithms) for key in keys] == [
        ("a", True, False),
        ("b", False, False),
        (None, False, False),
    ]


@pytest.mark.parametrize(
    "document", [b"", b"[]", b"{}", b'{"keys": 5}', b'{"keys": []}', b'{"keys": [{}]}', b"<"]
)
def test_an_invalid_key_set_is_refused(document: bytes) -> None:
    with pytest.raises(UnusableKey):
        parse_jwks(document)


def test_a_key_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    weak = rsa.generate_private_key(65537, 1024)
    private = RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content, reason in (
        (private, "private key"),
        (b"no key", "no public key"),
        (pem(weak), "2048"),
        (pem(ec.generate_private_key(ec.SECP256K1())), "kind of key"),
    ):
        path.write_bytes(content)
        with pytest.raises(UnusableKey, match=f"key.pem: .*{reason}"):
            load_public_key(path)
