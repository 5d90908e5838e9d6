"""``python -m benchmarks.probe serve …``: exportd's own command, with a probe in its event loop.

The probe writes lines to the file named by ``PROBE``: ``lag T SECONDS`` every 5 ms, and ``tasks T NUMBER``
every second; T is the time of CLOCK_MONOTONIC, which all processes share.

The lag is how late the loop turned to something that was due. While the loop stands still, every 5 ms that
pass are due and each is written with its own lateness, as if requests came in that rhythm: one long halt is
many late requests, not one. uvloop's clock has a resolution of 1 ms, so figures up to that mean "at once".
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from exportd import app as application
from exportd.cli.main import main
from exportd.limits.memory import SharedMemory
from exportd.settings import Settings
from exportd.telemetry.shared_metrics import SharedMetrics

_INTERVAL_SECONDS = 0.005
_TASKS_INTERVAL_SECONDS = 1.0


@dataclass(frozen=True)
class Recording:
    """What a probe has written: (time, value) of each line."""

    lags: list[tuple[float, float]]
    tasks: list[tuple[float, float]]

    def lags_between(self, start: float, stop: float) -> list[float]:
        return [seconds for at, seconds in self.lags if start <= at <= stop]


def read_recording(file: Path) -> Recording:
    found: dict[str, list[tuple[float, float]]] = {"lag": [], "tasks": []}
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            kind, at, value = line.split()
            found[kind].append((float(at), float(value)))
    return Recording(found["lag"], found["tasks"])


async def _probe() -> None:
    with open(os.environ["PROBE"], "a", buffering=1) as output:
        due = next_tasks = time.monotonic()
        while True:
            await asyncio.sleep(max(due - time.monotonic(), 0.001))
            now = time.monotonic()
            while due <= now:
                output.write(f"lag {due:.6f} {now - due:.6f}\n")
                due += _INTERVAL_SECONDS
            if next_tasks <= now:
                output.write(f"tasks {now:.6f} {len(asyncio.all_tasks())}\n")
                next_tasks = now + _TASKS_INTERVAL_SECONDS


_make_app = application.make_app


def _make_probed_app(
    settings: Settings,
    dsn: str,
    memory: SharedMemory | None = None,
    shared_metrics: SharedMetrics | None = None,
) -> web.Application:
    app = _make_app(settings, dsn, memory, shared_metrics)

    async def probe(_: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(_probe())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app.cleanup_ctx.append(probe)
    return app


if __name__ == "__main__":
    application.make_app = _make_probed_app  # the command imports it when it runs
    main()
