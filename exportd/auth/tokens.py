"""Bearer tokens: a JWT becomes a principal, and back. The one door to PyJWT."""

import os
import secrets
import time
from pathlib import Path

import jwt

from exportd.auth.principal import Principal

_ALGORITHM = "HS256"
_SECRET_BYTES = 32
# A user's id ends up in log lines, rows and headers; nobody's is longer.
_LONGEST_USER_ID = 255
# Verified tokens are remembered: a check costs as much as all the rest of the authentication.
_MOST_REMEMBERED = 1024


class InvalidToken(Exception):
    """The token does not prove who is asking. The message says why, for the log, never for the client."""


class Tokens:
    """Signs and verifies tokens with one shared secret.

    ``user_claim`` and ``role_claim`` name the claims that hold the user's id and role; whose role is
    ``admin_role`` is an admin.
    """

    def __init__(self, secret: str, *, user_claim: str, role_claim: str, admin_role: str) -> None:
        self._secret = secret
        self._user_claim = user_claim
        self._role_claim = role_claim
        self._admin_role = admin_role
        self._verified: dict[str, tuple[float, Principal]] = {}

    def verify(self, token: str) -> Principal:
        """The principal a token was issued to. Raises InvalidToken.

        A token that was good a moment ago is good until it expires, and is not verified again.
        """
        known = self._verified.get(token)
        if known is not None and time.time() < known[0]:
            return known[1]
        expires_at, principal = self._verify(token)
        if len(self._verified) >= _MOST_REMEMBERED:
            # Dictionaries keep their order: the one remembered longest goes.
            del self._verified[next(iter(self._verified))]
        self._verified[token] = (expires_at, principal)
        return principal

    def _verify(self, token: str) -> tuple[float, Principal]:
        """The token's expiry, in seconds since the epoch, and its principal."""
        try:
            claims = jwt.decode(token, self._secret, algorithms=[_ALGORITHM], options={"require": ["exp"]})
        except (jwt.InvalidTokenError, ValueError, TypeError, OverflowError) as error:
            # PyJWT lets some nonsense through to what it calls.
            raise InvalidToken(ascii(str(error))) from error
        user_id = claims.get(self._user_claim)
        if isinstance(user_id, int) and not isinstance(user_id, bool):
            user_id = str(user_id)
        if not isinstance(user_id, str) or not _is_storable(user_id):
            raise InvalidToken(f"claim {self._user_claim!r} holds no user id")
        return float(claims["exp"]), Principal(user_id, claims.get(self._role_claim) == self._admin_role)

    def sign(self, user_id: str, role: str | None, ttl_seconds: int) -> str:
        """A token for ``user_id`` that is valid for ``ttl_seconds`` from now."""
        now = int(time.time())
        claims: dict[str, object] = {self._user_claim: user_id, "iat": now, "exp": now + ttl_seconds}
        if role is not None:
            claims[self._role_claim] = role
        return jwt.encode(claims, self._secret, algorithm=_ALGORITHM)


def _is_storable(user_id: str) -> bool:
    """Whether the database and the logs can hold it: NUL and halves of surrogate pairs they cannot."""
    try:
        user_id.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(user_id) <= _LONGEST_USER_ID and "\0" not in user_id


def load_or_make_secret(data_dir: Path) -> str:
    """The secret of a data folder, made at random the first time and readable by its owner alone.

    Processes that start together end up with the same one. Raises OSError.
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
            # A link never replaces: whoever comes second keeps the first one's secret.
            path.hardlink_to(draft)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text(encoding="ascii").strip()
