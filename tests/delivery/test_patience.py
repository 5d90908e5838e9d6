"""Clients that take nothing, or next to nothing, are dropped; slow ones are not."""

import asyncio

import pytest
import structlog

from tests.delivery.test_broken_deliveries import SIZE, connect, outcomes, request_bytes, until_idle
from tests.support.application import Jobs, Start, noise


@pytest.mark.parametrize("sender", ["sendfile", "chunks"], indirect=True)
@pytest.mark.parametrize(
    ("patience", "reason"),
    [
        ({"stall_timeout_seconds": 0.3}, "stalled"),
        (
            {
                "min_rate_bytes_per_second": 10**12,
                "min_rate_window_seconds": 0.2,
                "stall_timeout_seconds": 0.4,
            },
            "too slow",
        ),
    ],
)
async def test_a_client_that_takes_nothing_is_dropped(
    start: Start, jobs: Jobs, sender: str, patience: dict[str, object], reason: str
) -> None:
    client = await start(download={"sendfile": sender == "sendfile", **patience})
    package = jobs.add(noise(SIZE))
    connection = await connect(client)
    with structlog.testing.capture_logs() as logs:
        await asyncio.get_running_loop().sock_sendall(connection, request_bytes(package))
        await asyncio.get_running_loop().sock_recv(connection, 1000)
        await until_idle(client)
    connection.close()
    (ended,) = [entry for entry in logs if entry["event"] == "download_aborted"]
    assert (ended["reason"], ended["method"]) == (reason, sender)
    assert outcomes(jobs) == [("aborted", False)]
    assert jobs.counts(package)[0] == 0


@pytest.mark.parametrize(
    ("sender", "chunk_size"),
    [("sendfile", 65536), ("chunks", 65536), ("chunks", 16 * 1024 * 1024)],
    indirect=["sender"],
)
async def test_a_slow_client_is_not_a_stalled_one(
    start: Start, jobs: Jobs, sender: str, chunk_size: int
) -> None:
    """It takes a little more often than the time-out, for several time-outs."""
    timeout = 0.4
    client = await start(
        download={
            "sendfile": sender == "sendfile",
            "stall_timeout_seconds": timeout,
            "chunk_size": chunk_size,
        }
    )
    package = jobs.add(noise(SIZE))
    connection = await connect(client)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, request_bytes(package))
    received = 0
    began = loop.time()
    while loop.time() - began < 4 * timeout:
        # A third of what its own buffer holds, so that the kernel opens the window again.
        received += len(await loop.sock_recv(connection, 200_000))
        await asyncio.sleep(timeout / 8)
    while received < SIZE:
        data = await loop.sock_recv(connection, 1 << 20)
        assert data, "dropped"
        received += len(data)
    connection.close()
    await until_idle(client)
    assert jobs.counts(package)[0] == 1
