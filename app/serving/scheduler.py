"""The queue of a server and the one thread that decodes. Tested by tests/unit/serving/test_scheduler.py."""

import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from time import perf_counter

import torch

from app.decoding.engine import Decoding
from app.decoding.result import DecodingResult
from app.decoding.strategies import Strategy
from app.protocols import ExitableDecoder
from app.serving.job import Job

_log = logging.getLogger(__name__)


class BusyError(Exception):
    """The queue is full; `retry_after` is about when there will be room, in whole seconds, at least 1."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class ClosingError(Exception):
    """The server is shutting down: it finishes what it has taken, and takes nothing more."""


@dataclass
class Counts:
    """What has been decoded since the start.

    Attributes:
        jobs: By outcome: eos, stop, max_new_tokens and context_length as in app.decoding.result, cancelled, failed,
            and refused, of a full queue.
        batch_sizes: How many batches of each size were decoded.
    """

    jobs: Counter[str] = field(default_factory=Counter)
    batch_sizes: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0

    def add(self, result: DecodingResult) -> None:
        self.completion_tokens += result.num_tokens
        self.drafted += result.drafted
        self.accepted += result.accepted
        self.rounds += result.rounds


class Scheduler:
    """Decodes jobs in batches, in one thread of its own, in the order in which they came.

    A prompt cannot join a batch that is running, so a batch is made of those that wait when the one before has ended:
    the first of the queue, and those behind it that sample alike. Each accepts its own drafts, has its own budget,
    stop strings and random stream, and leaves the batch when it ends, so its output is what it would be alone.

    Args:
        batch_size: Most jobs that are decoded together, at least 1.
        max_waiting: Most jobs that wait, at least 1; more are refused.
    """

    def __init__(self, decoder: ExitableDecoder, strategy: Strategy, *, batch_size: int, max_waiting: int) -> None:
        self._decoder, self._strategy = decoder, strategy
        self._batch_size, self.max_waiting = batch_size, max_waiting
        self._changed = Condition()
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._closing = False
        self._batch_seconds = 1.0
        self.counts = Counts()
        self._thread = Thread(target=self._work, name="decoding", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return sum(not job.is_over for job in self._running)

    @property
    def closing(self) -> bool:
        return self._closing

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put all of these jobs into the queue, or none.

        Raises:
            BusyError: There is no room for all of them.
            ClosingError: `refuse_more` or `close` was called.
        """
        with self._changed:
            if self._closing:
                raise ClosingError
            if len(self._queue) + len(jobs) > self.max_waiting:
                self.counts.jobs["refused"] += len(jobs)
                batches = math.ceil(len(jobs) / self._batch_size)  # that will make room for as many
                raise BusyError(math.ceil(self._batch_seconds * batches))
            self._queue.extend(jobs)
            self._changed.notify_all()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop these jobs: those that wait leave the queue now, those that run leave their batch after this round."""
        with self._changed:
            for job in jobs:
                job.cancelled = job.cancelled or not job.ended
                if job in self._queue:
                    self._queue.remove(job)
                    self.counts.jobs["cancelled"] += 1

    def refuse_more(self) -> None:
        """Finish what was taken, and refuse every later job. A handler of signals may call this."""
        self._closing = True

    def close(self) -> None:
        """Finish what was taken, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._run(batch)

    def _next_batch(self) -> list[Job]:
        """Wait for jobs, and take a batch out of the queue; it is empty when the scheduler is closed."""
        with self._changed:
            self._running = []
            while not self._queue:
                if self._closing:
                    return []
                self._changed.wait()
            key = self._queue[0].batch_key
            batch = [job for job in self._queue if job.batch_key == key][: self._batch_size]
            self._queue = deque(job for job in self._queue if job not in batch)
            self._running = batch
            return batch

    def _run(self, batch: Sequence[Job]) -> None:
        """Decode a batch. If it fails, those of it that have said nothing yet are decoded again, each alone."""
        started_at = perf_counter()
        try:
            self._decode(batch)
        except Exception as error:
            _log.exception("%d requests could not be decoded together", len(batch))
            again = [job for job in batch if len(batch) > 1 and job.can_begin_again]
            for job in batch:
                if job not in again and not job.is_over:
                    self.counts.jobs["failed"] += 1
                    job.fail(error)
            for job in again:
                job.begin()
                self._run([job])
        self._batch_seconds = max(1.0, perf_counter() - started_at)

    def _decode(self, batch: Sequence[Job]) -> None:
        self.counts.batch_sizes[len(batch)] += 1
        decoding = Decoding(
            self._decoder,
            [job.tokens for job in batch],
            strategy=self._strategy,
            settings=batch[0].settings,
            generators=[torch.Generator(self._decoder.device).manual_seed(job.seed) for job in batch],
            ends=[job.ends for job in batch],
        )
        over = set[int]()
        with torch.inference_mode():
            for index, step in decoding:
                batch[index].take(step.tokens)
                if (result := decoding.result(index)).stop_reason != "interrupted":
                    over.add(index)
                    self._finish(batch[index], result)
        for index in {*range(len(batch))} - over:  # those that had no room for a token
            self._finish(batch[index], decoding.result(index))

    def _finish(self, job: Job, result: DecodingResult) -> None:
        """Count before the end is told, so that whoever sees the end sees the counts."""
        self.counts.jobs["cancelled" if job.cancelled else result.stop_reason] += 1
        self.counts.prompt_tokens += len(job.tokens)
        self.counts.add(result)
        job.finish(result)
