"""Figures of a server for Prometheus. Tested by tests/integration/test_serving.py."""

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from app.serving.scheduler import Scheduler

_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """What the endpoints count, and what the scheduler counts, read when they are asked for.

    Attributes:
        responses: Answers by path and status.
        seconds: How long a whole answer took, in seconds.
        first_piece_seconds: Time until the first piece of a streamed answer, in seconds.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._registry = scheduler, CollectorRegistry()
        self.responses = Counter("layerskip_responses", "Answers", ["path", "status"], registry=self._registry)
        self.seconds = self._histogram("layerskip_request_seconds", "Seconds of a whole answer")
        self.first_piece_seconds = self._histogram(
            "layerskip_first_piece_seconds", "Seconds to the first streamed text"
        )
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks of a collector."""
        counts = self._scheduler.counts
        yield GaugeMetricFamily("layerskip_waiting", "Prompts that wait", value=self._scheduler.waiting)
        yield GaugeMetricFamily("layerskip_running", "Prompts that are decoded now", value=self._scheduler.running)
        for name in ("prompt_tokens", "completion_tokens", "drafted", "accepted", "rounds"):
            text = f"Sum of {name} over all prompts that have ended"
            yield CounterMetricFamily(f"layerskip_{name}", text, value=getattr(counts, name))
        yield CounterMetricFamily("layerskip_joined", "Prompts that joined a batch that ran", value=counts.joined)
        yield _by("layerskip_prompts", "Prompts that have ended or were refused", "outcome", counts.jobs.copy())
        yield _by(
            "layerskip_batches",
            "Batches that have ended, by the most prompts at once",
            "size",
            counts.batch_sizes.copy(),
        )

    def page(self) -> bytes:
        """All figures in Prometheus' text format."""
        page: bytes = generate_latest(self._registry)
        return page


def _by(name: str, text: str, label: str, counts: dict[str, int] | dict[int, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([str(value)], count)
    return family
