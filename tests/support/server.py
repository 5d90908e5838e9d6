"""The application behind the daemon's own connections, in this process."""

import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

from exportd.process.runner import DrainingRunner


class Served:
    """An application that is served on a port of 127.0.0.1."""

    def __init__(self, runner: DrainingRunner) -> None:
        self._runner = runner

    @property
    def port(self) -> int:
        port: int = self._runner.addresses[0][1]
        return port

    @property
    def connections(self) -> int:
        """How many are open."""
        assert self._runner.server is not None
        return len(self._runner.server.connections)


@contextlib.asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[Served]:
    """Serves ``app`` while the block lasts."""
    runner = DrainingRunner(app, drain_timeout_seconds=0.0, max_connections=1000)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Served(runner)
    finally:
        await runner.cleanup()
