"""The queue of a server and the one thread that decodes. Tested by tests/unit/serving/test_scheduler.py."""

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from threading import Condition, Thread
from time import perf_counter
from typing import NamedTuple

import torch

from app.decoding.engine import Decoding
from app.decoding.result import DecodingResult
from app.decoding.strategies import Strategy
from app.protocols import ExitableDecoder
from app.serving.job import BatchKey, Job

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
        batch_sizes: How many batches have ended that decoded so many jobs at once, at most.
        joined: Jobs that joined a batch while it ran.
    """

    jobs: Counter[str] = field(default_factory=Counter)
    batch_sizes: Counter[int] = field(default_factory=Counter)
    joined: int = 0
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


class _Seat(NamedTuple):
    """A job that is decoded now: as which prompt of which decoding, and since when by `perf_counter`, in seconds."""

    job: Job
    decoding: Decoding
    place: int
    seated_at: float


class Scheduler:
    """Decodes jobs in batches, in one thread of its own, in the order in which they came.

    A batch begins with the first of the queue and those behind it that sample alike. While it runs and has room, those
    that come to the head of the queue and sample alike join it between rounds; the first one that does not waits until
    the batch has ended, so that none waits forever. Each accepts its own drafts, has its own budget, stop strings and
    random stream, and leaves the batch when it ends, so its output is what it would be alone.

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
        self._job_seconds = 1.0
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
                raise BusyError(math.ceil(self._job_seconds * batches))
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
            batch = self._take(self._queue[0].batch_key, most=self._batch_size, from_head=False)
            self._running = batch
            return batch

    def _take(self, key: BatchKey, *, most: int, from_head: bool) -> list[Job]:
        """Take the first jobs with this key out of the queue; `from_head` takes none from behind one of another key."""
        alike: Iterable[Job] = (job for job in self._queue if job.batch_key == key)
        if from_head:
            alike = takewhile(lambda job: job.batch_key == key, self._queue)
        taken = list(islice(alike, most))
        self._queue = deque(job for job in self._queue if job not in taken)
        return taken

    def _run(self, batch: list[Job]) -> None:
        """Decode a batch. Those that join it are added to the list, and those that have ended are taken out of it."""
        try:
            self._decode(batch)
        except Exception as error:
            again = self._after_failure(batch, error)
            with self._changed:
                for job in again:
                    job.alone = True
                self._queue.extendleft(reversed(again))

    def _after_failure(self, jobs: Sequence[Job], error: Exception) -> list[Job]:
        """Return those of several jobs that can be tried again one by one; those that have said something fail."""
        _log.exception("%d requests could not be decoded together", len(jobs))
        again = [job for job in jobs if len(jobs) > 1 and job.can_begin_again]
        for job in jobs:
            if job in again:
                job.begin()
            elif not job.ended:
                self.counts.jobs["cancelled" if job.cancelled else "failed"] += 1
                job.fail(error)
        return again

    def _decode(self, batch: list[Job]) -> None:
        key, decoding = batch[0].batch_key, self._new_decoding(batch)
        now = perf_counter()
        seats = {index: _Seat(job, decoding, index, now) for index, job in enumerate(batch)}
        most = len(batch)
        try:
            with torch.inference_mode():
                for index, step in decoding:
                    seats[index].job.take(step.tokens)
                    self._clear(seats, [index], batch)
                    while decoding.takes_prompts and (jobs := self._next_to_join(key, batch)):
                        self._seat(jobs, decoding, seats, batch)
                        most = max(most, len(batch))
            self._clear(seats, [*seats], batch)  # those that had no room for a token
        finally:
            self.counts.batch_sizes[most] += 1

    def _next_to_join(self, key: BatchKey, batch: Sequence[Job]) -> list[Job]:
        """Take what can join a batch that runs; nothing joins one that has come to its end."""
        if not self._queue or not batch:
            return []
        with self._changed:
            return self._take(key, most=self._batch_size - len(batch), from_head=True)

    def _seat(self, jobs: list[Job], decoding: Decoding, seats: dict[int, _Seat], batch: list[Job]) -> None:
        """Run the prompts of jobs, and let them join a decoding. If several fail together, each is tried by itself."""
        started_at = perf_counter()
        try:
            own = self._new_decoding(jobs)
            for index, step in own.begin():
                jobs[index].take(step.tokens)
        except Exception as error:
            for job in self._after_failure(jobs, error):
                self._seat([job], decoding, seats, batch)
            return
        indices = decoding.join(own)
        for place, (index, job) in enumerate(zip(indices, jobs, strict=True)):
            seats[index] = _Seat(job, own, place, started_at)
        batch += jobs
        self.counts.joined += len(jobs)
        self._clear(seats, indices, batch)

    def _new_decoding(self, jobs: Sequence[Job]) -> Decoding:
        return Decoding(
            self._decoder,
            [job.tokens for job in jobs],
            strategy=self._strategy,
            settings=jobs[0].settings,
            generators=[torch.Generator(self._decoder.device).manual_seed(job.seed) for job in jobs],
            ends=[job.ends for job in jobs],
        )

    def _clear(self, seats: dict[int, _Seat], indices: Sequence[int], batch: list[Job]) -> None:
        """Tell the end of those at these indices that have ended, and forget them."""
        for index in indices:
            job, decoding, place, seated_at = seats[index]
            if (result := decoding.result(place)).stop_reason != "interrupted":
                del seats[index]
                batch.remove(job)
                self._job_seconds = max(1.0, perf_counter() - seated_at)
                self._finish(job, result)

    def _finish(self, job: Job, result: DecodingResult) -> None:
        """Count before the end is told, so that whoever sees the end sees the counts."""
        self.counts.jobs["cancelled" if job.cancelled else result.stop_reason] += 1
        self.counts.prompt_tokens += len(job.tokens)
        self.counts.add(result)
        job.finish(result)
