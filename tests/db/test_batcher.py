"""Items that come in together are answered together, and each is answered."""

import asyncio

from exportd.db.batcher import MAX_BATCH_SIZE, Batcher


async def test_an_item_submitted_during_the_last_answer_is_processed() -> None:
    async def double(items: list[int]) -> list[int]:
        await asyncio.sleep(0.001)
        return [2 * item for item in items]

    gatherer = Batcher(double, at_once=1)
    async with asyncio.timeout(30):
        for number in range(5):
            # Each in the loop's turn in which the one before was answered.
            assert await gatherer.submit(number) == 2 * number
    assert gatherer.waiting == 0


async def test_many_that_end_at_any_moment_are_answered() -> None:
    async def wait(items: list[int]) -> list[int]:
        await asyncio.sleep(0.001)
        return items

    gatherer = Batcher(wait, at_once=2)

    async def ask(number: int) -> None:
        for turns in range(20):
            assert await gatherer.submit(number) == number
            for _ in range((turns * number) % 5):
                await asyncio.sleep(0)

    async with asyncio.timeout(30):
        await asyncio.gather(*map(ask, range(5)))
    assert gatherer.waiting == 0


async def test_a_batch_has_a_largest_size() -> None:
    sizes: list[int] = []

    async def measure(items: list[int]) -> list[int]:
        sizes.append(len(items))
        return items

    batcher = Batcher(measure, at_once=1)
    await asyncio.gather(*(batcher.submit(number) for number in range(2 * MAX_BATCH_SIZE + 1)))
    assert sizes == [MAX_BATCH_SIZE, MAX_BATCH_SIZE, 1]
