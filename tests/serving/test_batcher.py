import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from elastic_hf.serving.batcher import Batcher, Overloaded


def run(answer, use, max_batch_size=3, max_waiting=5):
    """Run a coroutine that is given a batcher."""

    async def main():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(answer, executor, max_batch_size, max_waiting)
            task = asyncio.create_task(batcher.run())
            try:
                return await use(batcher)
            finally:
                task.cancel()

    return asyncio.run(main())


def test_what_arrives_while_a_batch_is_answered_is_the_next_batch():
    batches, is_open = [], threading.Event()

    def answer(requests):
        is_open.wait()
        batches.append(requests)
        return [10 * request for request in requests]

    async def use(batcher):
        first = asyncio.create_task(batcher(1))
        while not batcher.queue.empty() or first.done():
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(batcher(request)) for request in (2, 3, 4, 5, 6)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="5 requests wait already"):
            await batcher(7)
        others[1].cancel()  # whoever asked has gone: the others are answered
        is_open.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    answers = run(answer, use)
    assert isinstance(answers.pop(2), asyncio.CancelledError)
    assert answers == [10, 20, 40, 50, 60] and batches == [[1], [2, 3, 4], [5, 6]]


def test_an_error_is_of_its_request_or_of_its_batch():
    def answer(requests):
        if "all" in requests:
            raise OSError("all")
        return [
            KeyError("one") if request == "one" else request
            for request in requests[: 1 if "few" in requests else None]
        ]

    async def use(batcher):
        found = await asyncio.gather(batcher("one"), batcher("a"), batcher("b"), return_exceptions=True)
        found += await asyncio.gather(batcher("all"), batcher("c"), return_exceptions=True)
        found += await asyncio.gather(batcher("few"), batcher("d"), return_exceptions=True)
        return [*found, await batcher("e")]

    error, a, b, first, second, third, fourth, last = run(answer, use)
    assert isinstance(error, KeyError) and (a, b, last) == ("a", "b", "e")
    assert isinstance(first, OSError) and isinstance(second, OSError)
    assert isinstance(third, ValueError) and isinstance(fourth, ValueError)
