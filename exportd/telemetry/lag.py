"""The lag of the event loop: how long every download waits while one task blocks the loop."""

import asyncio
import time
from collections.abc import Callable

_INTERVAL_SECONDS = 0.1


async def watch_lag(observe: Callable[[float], None]) -> None:
    """Sleeps for a tenth of a second, again and again, and reports how many seconds late it woke up.

    This is a sample: of shorter blockages it sees only a share.
    """
    while True:
        due = time.perf_counter() + _INTERVAL_SECONDS
        await asyncio.sleep(_INTERVAL_SECONDS)
        # Timers have a resolution of a millisecond and may fire a little early.
        observe(max(0.0, time.perf_counter() - due))
