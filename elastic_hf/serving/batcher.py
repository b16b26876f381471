"""Requests that wait for the model are answered together: what arrives while it works is the next batch."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar


Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Overloaded(RuntimeError):
    """More requests wait than may."""


class Batcher(Generic[Request, Answer]):
    """
    Answer requests of many coroutines a batch at a time. Nobody waits for a batch to fill up.

    Args:
        answer (`Callable[[list[Request]], list[Answer | Exception]]`):
            Answers a batch, in the order of its requests. An exception among the answers is raised to the one who
            asked; one that is raised, to all of the batch.
        executor (`concurrent.futures.ThreadPoolExecutor`): runs `answer`.
        max_batch_size (`int`): Requests in a batch.
        max_waiting (`int`): Requests that may wait; more are refused.
    """

    def __init__(
        self,
        answer: Callable[[list[Request]], list[Answer | Exception]],
        executor: ThreadPoolExecutor,
        max_batch_size: int,
        max_waiting: int,
    ) -> None:
        self.answer = answer
        self.executor = executor
        self.max_batch_size = max_batch_size
        self.queue: asyncio.Queue[tuple[Request, asyncio.Future[Answer]]] = asyncio.Queue(max_waiting)

    async def __call__(self, request: Request) -> Answer:
        """Return the answer to a request.

        Raises:
            Overloaded: if `max_waiting` requests wait already.
            Exception: what `answer` gave or raised.
        """
        future = asyncio.get_running_loop().create_future()
        try:
            self.queue.put_nowait((request, future))
        except asyncio.QueueFull as error:
            raise Overloaded(f"{self.queue.maxsize} requests wait already: try again later") from error
        return await future

    async def run(self) -> None:
        """Answer requests until this task is cancelled."""
        while True:
            batch = [await self.queue.get()]
            while len(batch) < self.max_batch_size and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            requests, futures = zip(*batch, strict=True)
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self.executor, self.answer, [*requests])
                answered = [*zip(futures, answers, strict=True)]
            except Exception as error:
                answered = [(future, error) for future in futures]
            for future, answer in answered:
                if future.done():  # whoever asked has gone
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
