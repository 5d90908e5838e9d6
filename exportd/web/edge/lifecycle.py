"""The running requests, and whether the server is draining."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Lifecycle:
    """Shared by the middleware, which reports requests, and the server, which drains them."""

    def __init__(self) -> None:
        self.is_draining = False
        self._tasks: set[asyncio.Task[object]] = set()

    @contextmanager
    def request_under_way(self) -> Iterator[None]:
        """Marks the current task as a running request while the block runs."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Waits for the running requests. Returns False if some still run after ``timeout_seconds``."""
        if not self._tasks:
            return True
        _, pending = await asyncio.wait(set(self._tasks), timeout=timeout_seconds)
        return not pending

    def cancel_all(self) -> int:
        """Cancels every running request and returns their number."""
        for task in self._tasks:
            task.cancel()
        return len(self._tasks)
