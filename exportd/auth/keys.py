"""Keys that verify tokens, each tied to the algorithms of its own kind.

A public key must never be taken for an HMAC secret, whatever a token's header says (RFC 8725, section 3.1):
a key's algorithms are fixed when the key is read, not when a token arrives.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from exportd.errors import OperatorError

_RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_EC_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
# An HMAC key is at least as long as the hash (RFC 7518, section 3.2).
HMAC_ALGORITHMS = {"HS256": 32, "HS384": 48, "HS512": 64}
# RFC 7518, section 3.3. The maximum limits the cost of a verification.
_MIN_RSA_BITS = 2048
_MAX_RSA_BITS = 16384


class UnusableKey(OperatorError):
    """The key cannot be used. The message says why, without any part of the key."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A key, its algorithms, and its name (``kid``), if it has one."""

    key: Any
    algorithms: frozenset[str]
    key_id: str | None = None


def secret_key(secret: str) -> VerificationKey:
    """Returns a shared secret as a key, for the HMAC algorithms that it is long enough for."""
    length = len(secret.encode())
    return VerificationKey(
        secret, frozenset(name for name, least in HMAC_ALGORITHMS.items() if length >= least)
    )


def load_public_key(path: Path) -> VerificationKey:
    """Returns the public key of a PEM file, or of the certificate in it. Raises UnusableKey and OSError."""
    content = path.read_bytes()
    if b"PRIVATE KEY-----" in content:
        raise UnusableKey(f"{path}: a private key; exportd needs the public one alone")
    try:
        if b"-----BEGIN CERTIFICATE-----" in content:
            from cryptography.x509 import load_pem_x509_certificate

            key: object = load_pem_x509_certificate(content).public_key()
        else:
            key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UnusableKey(f"{path}: no public key or certificate in PEM form") from error
    try:
        return VerificationKey(key, _algorithms_of(key))
    except UnusableKey as error:
        raise UnusableKey(f"{path}: {error}") from error


def parse_jwks(document: bytes) -> tuple[VerificationKey, ...]:
    """Returns the keys of a JSON Web Key Set (RFC 7517) that can verify tokens, and ignores the others.

    Raises UnusableKey if there is none.
    """
    try:
        entries = orjson.loads(document)["keys"]
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableKey("not a JSON Web Key Set") from error
    found = (
        [_parse_jwk(entry) for entry in entries if isinstance(entry, dict)]
        if isinstance(entries, list)
        else []
    )
    keys = tuple(key for key in found if key is not None)
    if not keys:
        raise UnusableKey("the JSON Web Key Set holds no key that verifies tokens")
    return keys


def _parse_jwk(entry: dict[str, Any]) -> VerificationKey | None:
    # A symmetric key in a published document is not secret.
    if entry.get("kty") not in ("RSA", "EC", "OKP") or entry.get("use", "sig") != "sig":
        return None
    key_id, algorithm = entry.get("kid"), entry.get("alg")
    try:
        # The algorithm that PyJWT chooses does not matter: the kind of the key decides below.
        key = jwt.PyJWK({name: value for name, value in entry.items() if name not in ("alg", "d")}).key
        algorithms = _algorithms_of(key)
    except (jwt.PyJWTError, UnusableKey, ValueError, TypeError):
        return None
    if algorithm is not None:
        algorithms &= {algorithm} if isinstance(algorithm, str) else frozenset()
    if not algorithms:
        return None
    return VerificationKey(key, algorithms, key_id if isinstance(key_id, str) else None)


def _algorithms_of(key: object) -> frozenset[str]:
    match key:
        case rsa.RSAPublicKey():
            if key.key_size < _MIN_RSA_BITS:
                raise UnusableKey(f"an RSA key of fewer than {_MIN_RSA_BITS} bits")
            if key.key_size > _MAX_RSA_BITS:
                raise UnusableKey(f"an RSA key of more than {_MAX_RSA_BITS} bits")
            return frozenset(_RSA_ALGORITHMS)
        case ec.EllipticCurvePublicKey() if key.curve.name in _EC_ALGORITHMS:
            return frozenset({_EC_ALGORITHMS[key.curve.name]})
        case ed25519.Ed25519PublicKey():
            return frozenset({"EdDSA"})
    raise UnusableKey("a kind of key that tokens are not signed with here")
