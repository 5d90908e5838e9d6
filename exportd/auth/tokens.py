"""Bearer tokens: verifies JWTs and signs them."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt

from exportd.auth.keys import HMAC_ALGORITHMS, VerificationKey, load_public_key, secret_key
from exportd.domain.principal import Principal
from exportd.errors import OperatorError

if TYPE_CHECKING:
    # `exportd token` needs no HTTP client, which takes long to import.
    from exportd.auth.jwks import RemoteKeys
    from exportd.settings import AuthSettings

_SIGNING_ALGORITHM = "HS256"
_SECRET_BYTES = 32
# A user id goes into log lines, rows and headers.
_MAX_USER_ID_LENGTH = 255
_MAX_TOKEN_LENGTH = 16 * 1024
# In seconds since 1970. Every JSON parser reads whole numbers up to here exactly.
_MAX_TIME = 2**53
# Verified tokens are cached, because a verification costs as much as the rest of the authentication.
_MAX_REMEMBERED_TOKENS = 1024


class InvalidToken(Exception):
    """The token does not authenticate the caller. The message is for the log, never for the client."""


class KeysUnavailable(Exception):
    """The token may be valid, but the identity provider, whose keys it needs, does not respond."""


class CannotSign(OperatorError):
    """There is no secret to sign with."""


class _UnknownKey(InvalidToken):
    """The token names an unknown key."""


@dataclass(frozen=True, slots=True)
class Claims:
    """The claims that a token must have, and those that name its user and role.

    ``user``, ``role``: names of claims, or paths into nested ones such as ``realm_access.roles``. The role is
    a string or a list of strings; ``admin_role`` makes an admin. ``issuer``, ``audience``: not required if
    empty. A token for an audience is rejected if none is configured (RFC 7519, section 4.1.3).
    """

    user: str = "userId"
    role: str = "role"
    admin_role: str = "admin"
    issuer: str | None = None
    audience: tuple[str, ...] = ()
    leeway_seconds: float = 0


class Tokens:
    """Verifies tokens with several keys, local ones and an identity provider's, and signs with one secret.

    Only ``algorithms`` are accepted, and each key only with those of its own kind.
    """

    def __init__(
        self,
        claims: Claims,
        algorithms: Collection[str],
        *,
        secret: str | None = None,
        keys: Sequence[VerificationKey] = (),
        remote: RemoteKeys | None = None,
    ) -> None:
        self._claims = claims
        self._algorithms = frozenset(algorithms)
        self._secret = secret
        self._local = (*([] if secret is None else [secret_key(secret)]), *keys)
        self._remote = remote
        self._remote_version = 0
        self._verified: dict[str, Principal] = {}

    async def verify(self, token: str) -> Principal:
        """Returns the principal of a token. Raises InvalidToken and KeysUnavailable.

        A verified token is cached until it expires or the provider's keys change.
        """
        if self._remote is not None and self._remote.version != self._remote_version:
            self._remote_version = self._remote.version
            self._verified.clear()
        known = self._verified.get(token)
        if known is not None and time.time() < known.expires_at:
            return known
        try:
            principal = self._verify(token)
        except _UnknownKey:
            if self._remote is None:
                raise
            await self._remote.refresh()
            try:
                principal = self._verify(token)
            except _UnknownKey as error:
                if self._remote.is_current:
                    raise
                raise KeysUnavailable(str(error)) from error
        if len(self._verified) >= _MAX_REMEMBERED_TOKENS:
            # Dictionaries keep their order, so the oldest token is removed.
            del self._verified[next(iter(self._verified))]
        self._verified[token] = principal
        return principal

    def _verify(self, token: str) -> Principal:
        if len(token) > _MAX_TOKEN_LENGTH:
            raise InvalidToken("too long")
        try:
            header = jwt.get_unverified_header(token)
            claims = self._verified_claims(token, header)
        except (jwt.InvalidTokenError, ValueError, TypeError, OverflowError, RecursionError) as error:
            # PyJWT does not catch every error of the libraries that it calls.
            raise InvalidToken(ascii(str(error))) from error
        user_id = _find_claim(claims, self._claims.user)
        if isinstance(user_id, int) and not isinstance(user_id, bool):
            user_id = str(user_id)
        if not isinstance(user_id, str) or not _is_storable(user_id):
            raise InvalidToken(f"claim {self._claims.user!r} holds no user id")
        role = _find_claim(claims, self._claims.role)
        is_admin = self._claims.admin_role in (role if isinstance(role, list) else [role])
        expires_at = _read_times(claims) + self._claims.leeway_seconds
        return Principal(user_id, is_admin, expires_at)

    def _verified_claims(self, token: str, header: dict[str, Any]) -> dict[str, Any]:
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in self._algorithms:
            raise InvalidToken(f"algorithm {algorithm!a:.40} is not allowed")
        keys = [*self._local, *(self._remote.keys if self._remote else ())]
        # A key without a name matches every name.
        fitting = [
            key
            for key in keys
            if algorithm in key.algorithms and (key_id is None or key.key_id in (None, key_id))
        ]
        for key in fitting:
            try:
                return self._decode(token, key, algorithm)
            except jwt.InvalidSignatureError:
                continue
        is_named = key_id is not None and any(key.key_id == key_id for key in fitting)
        if self._remote is not None and algorithm not in HMAC_ALGORITHMS and not is_named:
            raise _UnknownKey(f"no key verifies it; it names {key_id!a:.80}")
        raise InvalidToken("no key verifies its signature" if fitting else f"no key is for {algorithm}")

    def _decode(self, token: str, key: VerificationKey, algorithm: str) -> dict[str, Any]:
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                issuer=self._claims.issuer,
                audience=self._claims.audience or None,
                leeway=self._claims.leeway_seconds,
                # The user's claim has rules of its own, which accept numbers.
                options={"require": ["exp"], "verify_sub": False},
            )
        except jwt.InvalidAudienceError as error:
            if self._claims.audience:
                raise
            raise InvalidToken("it is for an audience, and none is configured ([auth] audience)") from error
        return claims

    def sign(self, user_id: str, role: str | None, ttl_seconds: int) -> str:
        """Returns a token for ``user_id`` that is valid for ``ttl_seconds`` from now. Raises CannotSign."""
        if self._secret is None or _SIGNING_ALGORITHM not in self._algorithms:
            raise CannotSign(
                "tokens come from the identity provider here: no secret is configured to sign with"
            )
        now = int(time.time())
        claims: dict[str, Any] = {"iat": now, "exp": now + ttl_seconds}
        _put_claim(claims, self._claims.user, user_id)
        if role is not None:
            _put_claim(claims, self._claims.role, role)
        if self._claims.issuer is not None:
            claims["iss"] = self._claims.issuer
        if self._claims.audience:
            claims["aud"] = self._claims.audience[0]
        return jwt.encode(claims, self._secret, algorithm=_SIGNING_ALGORITHM)


def _read_times(claims: dict[str, Any]) -> float:
    """Returns when the token expires, in seconds since 1970. Raises InvalidToken.

    Times are numbers (RFC 7519, section 2). PyJWT 2.15 also accepts text and booleans for some.
    """
    for name in ("exp", "iat", "nbf"):
        value = claims.get(name, 0)
        # A number of 400 digits does not fit a float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_TIME:
            raise InvalidToken(f"claim {name!r} is not a time")
    return float(claims["exp"])


def _find_claim(claims: dict[str, Any], path: str) -> object:
    """Returns the claim with exactly that name (which may be a URL with dots), or the claim at the path."""
    if path in claims:
        return claims[path]
    found: object = claims
    for name in path.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(name)
    return found


def _put_claim(claims: dict[str, Any], path: str, value: str) -> None:
    """Sets the claim where ``_find_claim`` looks for it."""
    if "://" in path:
        claims[path] = value
        return
    *parents, last = path.split(".")
    for name in parents:
        claims = claims.setdefault(name, {})
    claims[last] = value


def _is_storable(user_id: str) -> bool:
    """Whether the database and the logs can hold it: they cannot hold NUL and lone surrogates."""
    try:
        user_id.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(user_id) <= _MAX_USER_ID_LENGTH and "\0" not in user_id


def make_tokens(settings: AuthSettings, data_dir: Path, remote: RemoteKeys | None = None) -> Tokens:
    """Returns Tokens with the configured keys, or else with the data folder's own secret.

    Raises OSError, UnusableKey and SettingsError.
    """
    return Tokens(
        Claims(
            user=settings.user_claim,
            role=settings.role_claim,
            admin_role=settings.admin_role,
            issuer=settings.issuer,
            audience=settings.audience,
            leeway_seconds=settings.leeway_seconds,
        ),
        settings.algorithms,
        secret=load_or_make_secret(data_dir) if settings.makes_own_secret else settings.read_secret(),
        keys=[
            *(secret_key(former.get_secret_value()) for former in settings.former_secrets),
            *(load_public_key(path) for path in settings.public_key_files),
        ],
        remote=remote,
    )


def load_or_make_secret(data_dir: Path) -> str:
    """Returns the secret of a data folder. It is random, and readable only by its owner.

    Processes that start together get the same secret. Raises OSError.
    """
    path = data_dir / "secret"
    data_dir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        draft = data_dir / f"secret.{secrets.token_hex(8)}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_SECRET_BYTES))
            file.flush()
            os.fsync(descriptor)
        try:
            # A link replaces no file: the second process uses the first one's secret.
            path.hardlink_to(draft)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text(encoding="ascii").strip()
