"""The keys that an identity provider publishes (JWKS)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import aiohttp
import structlog

from exportd.auth.keys import UnusableKey, VerificationKey, parse_jwks

log = structlog.get_logger()

_FETCH_SECONDS = 5.0
_MAX_DOCUMENT_BYTES = 1024 * 1024
# The least time between fetches, whatever unknown keys tokens name.
_MIN_INTERVAL_SECONDS = 30.0


class RemoteKeys:
    """The keys at a JWKS address. Fetched regularly by ``kept_fresh``, and again for an unknown key.

    The last keys remain valid while the provider does not respond.
    """

    def __init__(self, url: str, refresh_seconds: float) -> None:
        self.keys: tuple[VerificationKey, ...] = ()
        # Incremented with each change of the keys.
        self.version = 0
        # Whether the last fetch succeeded.
        self.is_current = False
        self._url = url
        self._refresh_seconds = refresh_seconds
        self._session: aiohttp.ClientSession | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._fetched_at = -_MIN_INTERVAL_SECONDS

    @contextlib.asynccontextmanager
    async def kept_fresh(self) -> AsyncIterator[None]:
        """Fetches the keys now, and regularly while the block runs. If the provider is unavailable, there are
        no keys yet."""
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_FETCH_SECONDS), cookie_jar=aiohttp.DummyCookieJar()
        ) as session:
            self._session = session
            await self.refresh()
            task = asyncio.create_task(self._refresh_for_ever())
            try:
                yield
            finally:
                task.cancel()
                if self._fetching is not None:
                    self._fetching.cancel()
                await asyncio.gather(task, *filter(None, [self._fetching]), return_exceptions=True)

    async def refresh(self) -> None:
        """Fetches the keys, unless they were just fetched. Joins a running fetch."""
        if self._fetching is None or self._fetching.done():
            if time.monotonic() - self._fetched_at < _MIN_INTERVAL_SECONDS:
                return
            self._fetching = asyncio.create_task(self._fetch())
        # Shielded, because other callers wait for the same fetch.
        await asyncio.shield(self._fetching)

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds if self.is_current else _MIN_INTERVAL_SECONDS)
            await self.refresh()

    async def _fetch(self) -> None:
        assert self._session is not None
        try:
            # A redirect would let the server at this address name another one.
            async with self._session.get(self._url, allow_redirects=False) as response:
                if response.status != 200:
                    raise UnusableKey(f"the answer is {response.status}")
                document = b""
                async for chunk in response.content.iter_any():
                    document += chunk
                    if len(document) > _MAX_DOCUMENT_BYTES:
                        raise UnusableKey("the answer is too large")
            keys = parse_jwks(document)
        except (aiohttp.ClientError, OSError, TimeoutError, UnusableKey) as error:
            self.is_current = False
            log.warning("jwks_not_refreshed", error=str(error) or type(error).__name__, keys=len(self.keys))
        else:
            self.is_current = True
            if keys != self.keys:
                self.keys = keys
                self.version += 1
                log.info("jwks_refreshed", keys=[key.key_id for key in keys])
        finally:
            self._fetched_at = time.monotonic()
