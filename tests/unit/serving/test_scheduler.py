"""Jobs through the queue and the thread that decodes, on a tiny model and without HTTP."""

from dataclasses import replace
from threading import Event

import pytest

from app.decoding.engine import Decoding
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from app.decoding.stopping import StopStrings
from app.errors import NotFiniteError
from app.generation.loaded_model import load_decoder
from app.generation.model import Model
from app.serving.job import Failed, Finished, Job
from app.serving.scheduler import BusyError, ClosingError, Scheduler
from app.text.text_tokens import prompt_tokens
from tests.support.saved_models import save_model

PROMPTS = ["the end of", "x", "def more(x): return", "Grüße aus"]
DRAFTS = {"exit_layer": 2, "num_draft_tokens": 3}
SAMPLED = {"temperature": 0.9, "top_p": 0.9}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_decoder(str(save_model(tmp_path_factory.mktemp("model"))), dtype="auto", device="cpu")


@pytest.fixture
def alone(loaded):
    """What the Python API gives for one prompt."""
    return lambda prompt, **options: Model(loaded).generate(prompt, strategy="self_speculative", **DRAFTS, **options)


@pytest.fixture
def scheduler(loaded):
    scheduler = Scheduler(loaded.decoder, "self_speculative", batch_size=3, max_waiting=8)
    yield scheduler
    scheduler.close()


@pytest.fixture
def job(loaded):
    """A job that notes what it is told."""

    def make(prompt, *, budget=12, stop=(), seed=0, listen=None, **sampling):
        events = []
        settings = DecodingSettings(
            max_new_tokens=budget,
            stop=StopStrings(loaded.tokenizer, stop) if stop else None,
            eos_token_ids=loaded.eos_token_ids,
            sampling=SamplingSettings(**sampling),
            **DRAFTS,
        )
        made = Job(
            tokens=prompt_tokens(loaded.tokenizer, prompt),
            settings=settings,
            seed=seed,
            listen=lambda event: (events.append(event), listen and listen(made)),
            tokenizer=loaded.tokenizer,
            stop=tuple(stop),
        )
        made.events = events
        return made

    return make


def text_of(job):
    assert isinstance(job.events[-1], Finished)
    return "".join(event.text for event in job.events)


def test_jobs_that_wait_are_decoded_together_and_each_comes_out_as_alone(scheduler, job, alone):
    free = alone(PROMPTS[2], max_new_tokens=30).text
    pairs = (free[i : i + 2] for i in range(8, len(free)))
    stop = next(pair for pair in pairs if pair.isascii() and free.find(pair) >= 8)
    greedy = [job(PROMPTS[0]), job(PROMPTS[1], budget=5), job(PROMPTS[2], budget=30, stop=[stop])]
    sampled = [job(prompt, seed=seed, **SAMPLED) for seed, prompt in enumerate(PROMPTS)]
    scheduler.submit([greedy[0], *sampled, *greedy[1:]])
    scheduler.start()
    scheduler.close()
    assert scheduler.counts.batch_sizes == {3: 2}  # those that sample alike; the last one takes the first free seat
    assert scheduler.counts.joined == 1
    assert text_of(greedy[0]) == alone(PROMPTS[0], max_new_tokens=12).text
    assert text_of(greedy[1]) == alone(PROMPTS[1], max_new_tokens=5).text
    assert text_of(greedy[2]) == free[: free.find(stop)]
    for seed, (prompt, each) in enumerate(zip(PROMPTS, sampled, strict=True)):
        assert text_of(each) == alone(prompt, max_new_tokens=12, seed=seed, **SAMPLED).text
    assert [each.events[-1].reason for each in (*greedy, sampled[0])] == ["length", "length", "stop", "length"]
    assert len(greedy[0].events) > 2  # piece by piece
    assert scheduler.counts.completion_tokens == sum(each.events[-1].result.num_tokens for each in greedy + sampled)
    assert scheduler.counts.jobs.total() == 7


def test_a_short_job_joins_a_long_one_and_one_that_fails_as_it_joins_takes_no_other_down(
    scheduler, job, alone, monkeypatch, caplog
):
    first, bad, short, order = job(PROMPTS[0], budget=60), job(PROMPTS[2]), job(PROMPTS[1], budget=20), []

    class Failing(Decoding):
        def begin(self):
            if bad.tokens in [row.prompt for row in self._rows]:
                raise NotFiniteError("the model's logits are not finite")
            return super().begin()

    monkeypatch.setattr("app.serving.scheduler.Decoding", Failing)
    is_over = Event()
    for each in (first, short):

        def note(event, tell=each.listen, each=each):
            tell(event)
            order.append((each, event))
            if len(order) == 1:
                scheduler.submit([bad, short])
            if each is first and isinstance(event, Finished):
                is_over.set()

        each.listen = note
    scheduler.submit([first])
    scheduler.start()
    assert is_over.wait(120)
    scheduler.close()
    ended = [each for each, event in order if isinstance(event, Finished)]
    assert ended == [short, first]
    tellers = [each for each, _ in order]
    own = [at for at, each in enumerate(tellers) if each is short]
    assert first in tellers[own[0] : own[-1]]  # which goes on while the one that was to join with a bad one is decoded
    assert scheduler.counts.joined == 1
    assert text_of(first) == alone(PROMPTS[0], max_new_tokens=60).text
    assert text_of(short) == alone(PROMPTS[1], max_new_tokens=20).text
    assert isinstance(bad.events[-1], Failed)
    assert scheduler.counts.jobs == {"failed": 1, "max_new_tokens": 2}


def test_static_rounds_serve_what_dynamic_ones_do_and_nothing_joins_them(scheduler, job, alone):
    jobs = [job(prompt, budget=budget) for prompt, budget in zip(PROMPTS, (9, 3, 12, 6), strict=True)]
    for each in jobs:
        each.settings = replace(each.settings, engine="static")
    scheduler.submit(jobs)
    scheduler.start()
    scheduler.close()
    assert scheduler.counts.batch_sizes == {3: 1, 1: 1}
    for prompt, each in zip(PROMPTS, jobs, strict=True):
        assert text_of(each) == alone(prompt, max_new_tokens=each.settings.max_new_tokens).text


def test_a_full_queue_refuses_all_prompts_of_a_request_or_none(scheduler, job):
    scheduler.submit([job("x") for _ in range(7)])
    with pytest.raises(BusyError) as refused:
        scheduler.submit([job("x"), job("x")])
    assert (refused.value.retry_after >= 1, scheduler.waiting) == (True, 7)
    scheduler.submit([job("x")])
    scheduler.start()
    scheduler.close()
    assert scheduler.counts.jobs == {"refused": 2, "max_new_tokens": 8}


def test_jobs_that_nobody_waits_for_leave_queue_and_batch(scheduler, job, alone):
    def leave(each):
        scheduler.cancel([each])

    leaving, staying, never = job(PROMPTS[0], budget=60, listen=leave), job(PROMPTS[1], budget=40), job(PROMPTS[2])
    scheduler.submit([leaving, staying, never])
    scheduler.cancel([never])
    scheduler.start()
    scheduler.close()
    assert [len(leaving.events), never.events] == [1, []]
    assert text_of(staying) == alone(PROMPTS[1], max_new_tokens=40).text
    assert scheduler.counts.jobs == {"cancelled": 2, "max_new_tokens": 1}
    assert scheduler.counts.completion_tokens < 60


def test_what_was_taken_is_finished_when_the_scheduler_closes_and_nothing_more_is_taken(scheduler, job):
    first, late = [job(prompt) for prompt in PROMPTS], job("x")
    scheduler.submit(first)
    scheduler.refuse_more()
    with pytest.raises(ClosingError):
        scheduler.submit([late])
    scheduler.start()
    scheduler.close()
    assert all(isinstance(each.events[-1], Finished) for each in first)
    assert late.events == []


@pytest.mark.parametrize("fails_at", ["the first round", "a later round"])
def test_a_prompt_that_cannot_be_decoded_takes_no_other_down_that_has_said_nothing(
    scheduler, job, alone, monkeypatch, caplog, fails_at
):
    bad, good, other, late = (job(prompt) for prompt in PROMPTS)

    class Failing(Decoding):
        def __init__(self, decoder, prompts, **settings):
            super().__init__(decoder, prompts, **settings)
            self.fails = bad.tokens in prompts

        def __iter__(self):
            for number, step in enumerate(super().__iter__()):
                if self.fails and (fails_at == "the first round" or number == 4):
                    other.cancelled = fails_at == "a later round"
                    raise NotFiniteError("the model's logits are not finite")
                yield step

    monkeypatch.setattr("app.serving.scheduler.Decoding", Failing)
    scheduler.submit([bad, good, other, late])
    scheduler.start()
    scheduler.close()
    assert isinstance(bad.events[-1], Failed)
    if fails_at == "the first round":
        assert text_of(good) == alone(PROMPTS[1], max_new_tokens=12).text
        assert scheduler.counts.batch_sizes == {3: 1, 1: 4}  # none joins one that is tried alone
        assert scheduler.counts.joined == 0
    else:
        assert isinstance(good.events[-1], Failed)  # its beginning was shown, and must not be shown again
        assert scheduler.counts.jobs == {"failed": 2, "cancelled": 1, "max_new_tokens": 1}  # each is counted once
    assert "could not be decoded together" in caplog.text


def test_settings_that_differ_in_more_than_the_end_are_not_batched(job):
    one = job("x")
    assert one.batch_key == job("y", budget=3, stop=["z"], seed=9).batch_key
    for changes in ({"sampling": SamplingSettings(temperature=0.5)}, {"num_draft_tokens": 2}):
        other = job("x")
        other.settings = replace(other.settings, **changes)
        assert one.batch_key != other.batch_key
