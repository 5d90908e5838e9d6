"""Batches of items that are sent to the database together.

If no call is running, an item is sent immediately. Items that arrive during a call form the next batch. So an
idle daemon loses no time, and a busy one needs a fraction of the statements.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from exportd.db.pool import DatabaseUnavailable

Item = TypeVar("Item")
Answer = TypeVar("Answer")

MAX_BATCH_SIZE = 500

# Called after each batch with its size, its duration in seconds, and whether it succeeded.
Observe = Callable[[int, float, bool], None]


class Batcher(Generic[Item, Answer]):
    """Calls ``run`` with batches of items. ``run`` returns an answer for each item, in order, or raises. A
    batch that fails with any error but DatabaseUnavailable is retried item by item.

    At most ``at_once`` calls run at the same time.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Answer]]],
        at_once: int,
        observe: Observe = lambda *_: None,
    ) -> None:
        self._run = run
        self._at_once = at_once
        self._observe = observe
        self._under_way = 0
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._running: set[asyncio.Task[None] | None] = set()

    @property
    def waiting(self) -> int:
        """The number of items without an answer."""
        return len(self._waiting) + self._under_way

    def submit(self, item: Item) -> asyncio.Future[Answer]:
        """Returns a future of the item's answer. Cancelling the future does not stop the call."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if len(self._running) < self._at_once:
            task = asyncio.create_task(self._work())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return answer

    async def _work(self) -> None:
        try:
            await self._work_off()
        finally:
            # Do it here: the callback runs a turn of the event loop later, and an item that is submitted
            # until then would start no task.
            self._running.discard(asyncio.current_task())

    async def _work_off(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[:MAX_BATCH_SIZE], self._waiting[MAX_BATCH_SIZE:]
            self._under_way += len(group)
            try:
                await self._answer(group)
            except BaseException:
                for _, future in group:
                    future.cancel()
                raise
            finally:
                self._under_way -= len(group)

    async def _answer(self, group: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        began, went_well = time.perf_counter(), False
        try:
            answers = await self._run([item for item, _ in group])
            went_well = True
        except Exception as error:  # noqa: BLE001  # every waiting caller must get the error
            if len(group) > 1 and not isinstance(error, DatabaseUnavailable):
                # An item that fails must not fail the others.
                for waiting in group:
                    await self._answer([waiting])
                return
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), answer in zip(group, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        finally:
            self._observe(len(group), time.perf_counter() - began, went_well)
