"""A limit on the rate is handed to the kernel, and lifted again; without one, chunks keep it."""

import asyncio
import socket
import struct
from types import SimpleNamespace

import pytest
import structlog

from exportd.delivery import pacing, response
from tests.support.application import ANN, Jobs, Start, noise, until_idle


def pacing_rate(connection: socket.socket) -> int:
    rate: int = struct.unpack("Q", connection.getsockopt(socket.SOL_SOCKET, 47, 8))[0]
    return rate


def test_the_kernel_is_given_the_rate_and_no_more() -> None:
    with socket.socket() as connection:
        assert pacing.pace_by_kernel(connection.fileno(), 5_000_000)
        assert pacing_rate(connection) == 5_000_000
        assert pacing.pace_by_kernel(connection.fileno(), 0)
        assert pacing_rate(connection) == 2**64 - 1
        # The descriptor is still its owner's.
        assert connection.fileno() >= 0


@pytest.mark.parametrize("sender", ["sendfile", "chunks"], indirect=True)
async def test_a_download_is_paced_and_the_connection_freed_of_it(
    start: Start, jobs: Jobs, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(download={"sendfile": sender == "sendfile", "max_rate_bytes_per_second": 50_000_000})
    package = jobs.add(noise(500_000))
    rates: list[int] = []
    real = pacing.pace_by_kernel

    def noting(connection: int, rate: int) -> bool:
        rates.append(rate)
        return real(connection, rate)

    monkeypatch.setattr(response, "pace_by_kernel", noting)
    async with client.get(package.url, headers=ANN) as answer:
        assert await answer.read() == package.content
    await until_idle(client)
    assert rates == [50_000_000, 0]


async def test_chunks_keep_the_rate_if_the_kernel_cannot(
    start: Start, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(download={"max_rate_bytes_per_second": 10_000_000})
    package = jobs.add(noise(1_000_000))
    monkeypatch.setattr(response, "pace_by_kernel", lambda *_: False)
    waits: list[float] = []

    async def noting(delay: float) -> None:
        waits.append(delay)
        await asyncio.sleep(0)

    # In this module only, and by a clock that only its own waits move on.
    module = SimpleNamespace(sleep=noting, get_running_loop=lambda: SimpleNamespace(time=lambda: sum(waits)))
    monkeypatch.setattr(pacing, "asyncio", module)
    with structlog.testing.capture_logs() as logs:
        async with client.get(package.url, headers=ANN) as answer:
            assert await answer.read() == package.content
        await until_idle(client)
    assert next(entry for entry in logs if entry["event"] == "download_completed")["method"] == "chunks"
    assert sum(waits) == pytest.approx(0.1, rel=1e-3)


def test_a_system_without_the_option_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing.sys, "platform", "darwin")
    assert not pacing.pace_by_kernel(-1, 1)


@pytest.mark.parametrize("sender", ["sendfile", "chunks"], indirect=True)
async def test_little_waits_in_the_socket_of_a_client_that_does_not_read(
    start: Start, jobs: Jobs, sender: str
) -> None:
    client = await start(download={"sendfile": sender == "sendfile", "stall_timeout_seconds": 0.5})
    package = jobs.add(noise(24_000_000))
    with structlog.testing.capture_logs() as logs:
        async with client.get(package.url, headers=ANN) as answer:
            await until_idle(client)
            answer.close()
    (ended,) = [entry for entry in logs if entry["event"] == "download_aborted"]
    assert ended["bytes_sent"] - ended["bytes_acknowledged"] < 3 * 1024 * 1024
