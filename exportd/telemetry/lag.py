"""How late the event loop is: what every download waits for while one piece of work holds it up."""

import asyncio
import time
from collections.abc import Callable

_INTERVAL_SECONDS = 0.1


async def watch_lag(observe: Callable[[float], None]) -> None:
    """Until it is cancelled, sleeps a tenth of a second and tells how many seconds too late it woke up.

    A sample: of what holds the loop up for shorter than the interval, that share is seen.
    """
    while True:
        due = time.perf_counter() + _INTERVAL_SECONDS
        await asyncio.sleep(_INTERVAL_SECONDS)
        # A loop's timers count whole milliseconds, and may come a little early.
        observe(max(0.0, time.perf_counter() - due))
