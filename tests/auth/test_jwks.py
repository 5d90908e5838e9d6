"""An identity provider's published keys, fetched from a real server that rotates them, fails and lies."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import rsa

from exportd.auth import jwks
from exportd.auth.jwks import RemoteKeys
from exportd.auth.tokens import Claims, InvalidToken, KeysUnavailable, Tokens
from tests.auth.test_attacks import ANN, OTHER_RSA, RSA, claims, jwk
from tests.support.application import Start


class Provider:
    """Publishes keys; counts who asks."""

    def __init__(self) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey] = {"first": RSA}
        self.fetches = 0
        self.answer: Callable[[], web.Response] | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def handle(self, _: web.Request) -> web.Response:
        self.fetches += 1
        await self.gate.wait()
        if self.answer is not None:
            return self.answer()
        return web.json_response({"keys": [jwk(key, kid=name) for name, key in self.keys.items()]})

    def token(self, name: str, key: rsa.RSAPrivateKey | None = None) -> str:
        return jwt.encode(claims(), key or self.keys[name], algorithm="RS256", headers={"kid": name})


@pytest.fixture
async def provider() -> Provider:
    return Provider()


@pytest.fixture
async def url(provider: Provider) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/keys", provider.handle)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("/keys"))
    await server.close()


@contextlib.asynccontextmanager
async def verifying(url: str, **more: Any) -> AsyncIterator[tuple[Tokens, RemoteKeys]]:
    remote = RemoteKeys(url, 600)
    async with remote.kept_fresh():
        yield Tokens(Claims(), ["RS256", "HS256"], remote=remote, **more), remote


def let_time_pass(remote: RemoteKeys) -> None:
    remote._fetched_at -= jwks._MIN_INTERVAL_SECONDS


async def test_published_keys_verify(provider: Provider, url: str) -> None:
    async with verifying(url) as (tokens, _):
        assert await tokens.verify(provider.token("first")) == ANN
        assert provider.fetches == 1


async def test_a_new_key_is_fetched_when_a_token_names_it(provider: Provider, url: str) -> None:
    async with verifying(url) as (tokens, remote):
        provider.keys["second"] = OTHER_RSA
        let_time_pass(remote)
        assert await tokens.verify(provider.token("second")) == ANN
        assert await tokens.verify(provider.token("first")) == ANN
        assert provider.fetches == 2


async def test_unknown_keys_make_one_fetch_in_a_while_however_many_ask(provider: Provider, url: str) -> None:
    async with verifying(url) as (tokens, remote):
        let_time_pass(remote)
        made_up = [provider.token(f"key-{number}", OTHER_RSA) for number in range(20)]
        answers = await asyncio.gather(*map(tokens.verify, made_up), return_exceptions=True)
        assert {type(answer).__mro__[1] for answer in answers} == {InvalidToken}
        for token in made_up:
            with pytest.raises(InvalidToken):
                await tokens.verify(token)
        assert provider.fetches == 2


async def test_a_key_that_is_withdrawn_no_longer_verifies_tokens_it_verified(
    provider: Provider, url: str
) -> None:
    async with verifying(url) as (tokens, remote):
        token = provider.token("first")
        await tokens.verify(token)
        provider.keys = {"second": OTHER_RSA}
        let_time_pass(remote)
        await remote.refresh()
        with pytest.raises(InvalidToken):
            await tokens.verify(token)


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(status=500),
        lambda: web.Response(text="<html>"),
        lambda: web.json_response({"keys": []}),
        lambda: web.Response(body=b"[" * 100_000),
        lambda: web.Response(body=b" " * 2_000_000),
        lambda: web.Response(status=302, headers={"Location": "/keys"}),
    ],
    ids=["500", "HTML", "no keys", "nested", "huge", "moved"],
)
async def test_old_keys_stay_while_the_provider_fails(
    provider: Provider, url: str, answer: Callable[[], web.Response]
) -> None:
    async with verifying(url) as (tokens, remote):
        provider.answer = answer
        let_time_pass(remote)
        unknown = provider.token("second", OTHER_RSA)
        with pytest.raises(KeysUnavailable):
            await tokens.verify(unknown)
        assert await tokens.verify(provider.token("first")) == ANN
        provider.answer = None
        let_time_pass(remote)
        with pytest.raises(InvalidToken):
            await tokens.verify(unknown)


async def test_a_provider_that_is_away_at_the_start_is_asked_again(provider: Provider, url: str) -> None:
    provider.answer = lambda: web.Response(status=503)
    async with verifying(url, secret="s" * 32) as (tokens, remote):
        with pytest.raises(KeysUnavailable):
            await tokens.verify(provider.token("first"))
        # What the provider has no say in does not wait for it.
        assert await tokens.verify(tokens.sign("ann", None, 60)) == ANN
        with pytest.raises(InvalidToken):
            await tokens.verify(jwt.encode(claims(), "x" * 32))
        provider.answer = None
        let_time_pass(remote)
        assert await tokens.verify(provider.token("first")) == ANN


async def test_a_cancelled_request_does_not_cancel_the_fetch_of_others(provider: Provider, url: str) -> None:
    async with verifying(url) as (tokens, remote):
        provider.keys["second"] = OTHER_RSA
        let_time_pass(remote)
        provider.gate.clear()
        first, second = (asyncio.create_task(tokens.verify(provider.token("second"))) for _ in range(2))
        while provider.fetches < 2:
            await asyncio.sleep(0)
        first.cancel()
        provider.gate.set()
        assert await second == ANN
        assert provider.fetches == 2


async def test_the_daemon_answers_503_while_nobody_can_tell(
    provider: Provider, url: str, start: Start
) -> None:
    provider.answer = lambda: web.Response(status=503)
    client = await start(auth={"jwks_url": url})
    stats = "/api/tool-registry/export-jobs/11111111-2222-3333-4444-555555555555/download-stats"
    answer = await client.get(stats, headers={"Authorization": f"Bearer {provider.token('first')}"})
    assert (answer.status, (await answer.json())["code"]) == (503, "IDENTITY_PROVIDER_UNAVAILABLE")
    assert answer.headers["Retry-After"]
    answer = await client.get(stats, headers={"Authorization": "Bearer nonsense"})
    assert answer.status == 401
    assert json.loads(await answer.text())["code"] == "UNAUTHENTICATED"
