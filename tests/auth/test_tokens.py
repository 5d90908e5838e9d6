import json
import stat
import threading
import time
from datetime import datetime, tzinfo
from pathlib import Path

import jwt
import pytest

from exportd.auth.tokens import Claims, InvalidToken, Tokens, load_or_make_secret
from exportd.domain.principal import Principal

SECRET = "s" * 64


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(Claims(), ["HS256"], secret=SECRET)


def signed(claims: dict[str, object], secret: str = SECRET, algorithm: str = "HS256") -> str:
    return jwt.encode({"exp": int(time.time()) + 60, **claims}, secret, algorithm=algorithm)


async def test_a_signed_token_verifies_to_its_principal(tokens: Tokens) -> None:
    assert await tokens.verify(tokens.sign("ann", None, 60)) == Principal("ann", False)
    assert await tokens.verify(tokens.sign("ann", "admin", 60)) == Principal("ann", True)
    assert await tokens.verify(tokens.sign("ann", "Admin", 60)) == Principal("ann", False)


async def test_a_numeric_user_id_is_its_digits(tokens: Tokens) -> None:
    assert await tokens.verify(signed({"userId": 42})) == Principal("42", False)


async def test_other_claim_names_are_honoured() -> None:
    tokens = Tokens(Claims("sub", "grp", "ops"), ["HS256"], secret=SECRET)
    assert await tokens.verify(signed({"sub": "ann", "grp": "ops"})) == Principal("ann", True)


NOT_TOKENS = {
    "empty": "",
    "not a JWT": "a.b.c",
    "not ASCII": "é",
    "signed with another secret": signed({"userId": "ann"}, "x" * 64),
    "signed with another algorithm": signed({"userId": "ann"}, algorithm="HS512"),
    "not signed": jwt.encode({"userId": "ann", "exp": 9999999999}, "", algorithm="none"),
    "expired": signed({"userId": "ann", "exp": 1}),
    "without expiry": jwt.encode({"userId": "ann"}, SECRET, algorithm="HS256"),
    "without user": signed({}),
    "user is empty": signed({"userId": ""}),
    "user is null": signed({"userId": None}),
    "user is a truth value": signed({"userId": True}),
    "user is a list": signed({"userId": ["ann"]}),
    "user is too long": signed({"userId": "x" * 256}),
    "user holds NUL": signed({"userId": "a\0b"}),
    "user holds half a surrogate pair": signed({"userId": "ann\ud800"}),
    "bytes that are no ASCII": "\udcff\udcfe.\udcff.\udcff",
    "a header of half a surrogate pair": jwt.encode(
        {"userId": "ann", "exp": 9999999999}, SECRET, headers={"crit": ["\ud800"]}
    ),
    "expiry beyond time": signed({"userId": "ann", "exp": 1e400}),
}


@pytest.mark.parametrize("name", NOT_TOKENS)
async def test_anything_else_is_no_token(tokens: Tokens, name: str) -> None:
    with pytest.raises(InvalidToken):
        await tokens.verify(NOT_TOKENS[name])


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    first = load_or_make_secret(folder)
    assert len(first.encode()) >= 32
    assert load_or_make_secret(folder) == first
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["secret"]


def test_processes_that_start_together_agree_on_the_secret(tmp_path: Path) -> None:
    found: list[str] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        found.append(load_or_make_secret(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {(tmp_path / "secret").read_text()}


async def test_an_invalid_token_has_a_reason_for_the_log(tokens: Tokens) -> None:
    for token in NOT_TOKENS.values():
        with pytest.raises(InvalidToken) as raised:
            await tokens.verify(token)
        str(raised.value).encode()


@pytest.mark.parametrize("claim", ["exp", "iat", "nbf"])
@pytest.mark.parametrize(
    "value",
    [
        10**400,
        -(10**400),
        1e300,
        float("inf"),
        float("nan"),
        "9999999999",
        "1",
        "",
        True,
        False,
        None,
        [1],
        {},
    ],
    ids=str,
)
async def test_a_time_that_is_no_time_is_refused(tokens: Tokens, claim: str, value: object) -> None:
    payload = json.dumps({"userId": "ann", "exp": 9999999999, claim: value})
    token = jwt.PyJWS().encode(payload.encode(), SECRET, "HS256")
    with pytest.raises(InvalidToken):
        await tokens.verify(token)


async def test_a_remembered_token_expires_all_the_same(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tokens.sign("ann", None, 60)
    assert await tokens.verify(token) == Principal("ann", False)
    later = time.time() + 61
    monkeypatch.setattr("exportd.auth.tokens.time.time", lambda: later)
    monkeypatch.setattr("jwt.api_jwt.datetime", _Clock(later))
    with pytest.raises(InvalidToken):
        await tokens.verify(token)


class _Clock:
    """Stands in for the datetime class where PyJWT asks it for the time."""

    def __init__(self, now: float) -> None:
        self._now = now

    def now(self, tz: tzinfo) -> datetime:
        return datetime.fromtimestamp(self._now, tz)


async def test_the_cache_of_tokens_is_bounded(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exportd.auth.tokens._MAX_REMEMBERED_TOKENS", 3)
    issued = [tokens.sign(f"user-{number}", None, 60) for number in range(10)]
    for token in issued:
        await tokens.verify(token)
    assert list(tokens._verified) == issued[-3:]
