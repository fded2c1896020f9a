"""The HTTP application: a part of OpenAI's API, over one model. Tested by tests/integration/test_serving.py."""

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from app.decoding.settings import DecodingSettings
from app.errors import ConfigError, UserError
from app.generation.request import seed_of
from app.serving.answers import Answers, RefusedError, error_answer, usage
from app.serving.bodies import Body, ChatBody, CompletionBody, read_body
from app.serving.job import Event, Failed, Finished, Job
from app.serving.metrics import Metrics
from app.serving.offer import Offer
from app.serving.scheduler import BusyError, ClosingError, Scheduler

_log = logging.getLogger(__name__)
_GONE = 499  # nobody sees it but the metrics

Handler = Callable[[Request], Awaitable[Response]]


def application(offer: Offer, scheduler: Scheduler) -> Starlette:
    """Make the application; it starts the scheduler and closes it when the server ends."""
    endpoints = _Endpoints(offer, scheduler)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.close)

    def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse(error_answer(error.detail, status=error.status_code), error.status_code, error.headers)

    routes = [
        Route("/v1/completions", endpoints.guarded(endpoints.completions), methods=["POST"]),
        Route("/v1/chat/completions", endpoints.guarded(endpoints.chat), methods=["POST"]),
        Route("/v1/models", endpoints.guarded(endpoints.models)),
        Route("/v1/models/{name:path}", endpoints.guarded(endpoints.models)),
        Route("/health", endpoints.health),
        Route("/metrics", endpoints.figures),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refused})


class _Asked(NamedTuple):
    """A request that was taken: its jobs, and what they tell, each with the job's index."""

    jobs: Sequence[Job]
    events: "asyncio.Queue[tuple[int, Event]]"
    answers: Answers


class _Endpoints:
    def __init__(self, offer: Offer, scheduler: Scheduler) -> None:
        self._offer, self._scheduler, self._metrics = offer, scheduler, Metrics(scheduler)
        self._started = int(time.time())

    def guarded(self, handler: Handler) -> Handler:
        """Ask for the key, tell errors in OpenAI's form, and count the answers."""

        async def call(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await handler(request)
            except RefusedError as refusal:
                response = JSONResponse(refusal.answer, refusal.status, refusal.headers)
            except ConfigError as error:
                response = JSONResponse(error_answer(str(error), status=400, field=error.field), 400)
            except ClientDisconnect:  # before its whole body had come
                response = Response(status_code=_GONE)
            except Exception as error:
                _log.exception("a request failed")
                told = str(error) if isinstance(error, UserError) else "the server failed; its log says why"
                response = JSONResponse(error_answer(told, status=500), 500)
            path = request.scope["route"].path
            self._metrics.responses.labels(path, str(response.status_code)).inc()
            return response

        return call

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "closing"}, 503) if self._scheduler.closing else JSONResponse({"status": "ok"})

    async def figures(self, _: Request) -> Response:
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        model = {
            "id": self._offer.name,
            "object": "model",
            "created": self._started,
            "owned_by": "layerskip",
            "max_model_len": self._offer.loaded.decoder.max_length,
        }
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [model]})
        self._offer.check_model(name)
        return JSONResponse(model)

    async def completions(self, request: Request) -> Response:
        body = read_body(CompletionBody, await self._read(request))
        encode = partial(self._offer.encode, body.prompt)
        return await self._answer(request, body, encode, budget=body.max_tokens, chat=False)

    async def chat(self, request: Request) -> Response:
        body = read_body(ChatBody, await self._read(request))
        encode = partial(self._offer.encode_chat, [message.model_dump() for message in body.messages])
        budget = body.max_completion_tokens or body.max_tokens or self._offer.max_new_tokens
        return await self._answer(request, body, encode, budget=budget, chat=True)

    async def _answer(
        self, request: Request, body: Body, encode: Callable[[], list[list[int]]], *, budget: int, chat: bool
    ) -> Response:
        started_at = time.perf_counter()
        self._offer.check_model(body.model or self._offer.name)
        settings = self._offer.settings_of(body, budget)
        prompts = await asyncio.to_thread(encode)
        answers = Answers(identifier=secrets.token_hex(12), created=int(time.time()), model=self._offer.name, chat=chat)
        asked = self._ask(prompts, settings, body, answers)
        if body.stream:
            pieces = self._pieces(asked, started_at, with_usage=body.stream_options.include_usage)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = asyncio.ensure_future(self._whole(asked))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([whole, gone], return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                return Response(status_code=_GONE)
            answer = whole.result()
        finally:
            whole.cancel()
            gone.cancel()
            self._scheduler.cancel(asked.jobs)
        self._metrics.seconds.observe(time.perf_counter() - started_at)
        return JSONResponse(answer)

    def _ask(self, prompts: Sequence[list[int]], settings: DecodingSettings, body: Body, answers: Answers) -> _Asked:
        """Put a job for each prompt into the queue, or refuse them all."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        seed = secrets.randbits(63) if body.seed is None else body.seed

        def listener(index: int) -> Callable[[Event], None]:
            return lambda event: _from_thread(loop, events, (index, event))

        jobs = [
            Job(
                tokens=tokens,
                settings=settings,
                seed=seed_of(seed, index),
                listen=listener(index),
                tokenizer=self._offer.loaded.tokenizer,
                stop=tuple(body.stop),
            )
            for index, tokens in enumerate(prompts)
        ]
        if len(jobs) > self._scheduler.max_waiting:
            fix = "send them in several requests"
            raise ConfigError("prompt", got=f"{len(jobs)} prompts", allowed=f"{self._scheduler.max_waiting}", fix=fix)
        try:
            self._scheduler.submit(jobs)
        except BusyError as error:
            raise RefusedError(429, str(error), code="queue_full", Retry_After=str(error.retry_after)) from error
        except ClosingError as error:
            raise RefusedError(503, "the server is shutting down", code="closing", Retry_After="5") from error
        return _Asked(jobs, events, answers)

    async def _whole(self, asked: _Asked) -> dict[str, Any]:
        texts, ends = [""] * len(asked.jobs), dict[int, Finished]()
        while len(ends) < len(asked.jobs):
            index, event = await asked.events.get()
            if isinstance(event, Failed):
                raise event.error
            texts[index] += event.text
            if isinstance(event, Finished):
                ends[index] = event
        reasons = [ends[index].reason for index in range(len(ends))]
        return asked.answers.whole(texts, reasons, _usage(asked.jobs, [*ends.values()]))

    async def _pieces(self, asked: _Asked, started_at: float, *, with_usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events; when the client has gone, this ends and takes its jobs out of the scheduler."""
        ends, told_any = list[Finished](), False
        try:
            if asked.answers.chat:
                yield _event(asked.answers.piece(0, None, with_usage=with_usage))
            while len(ends) < len(asked.jobs):
                index, event = await asked.events.get()
                if isinstance(event, Failed):
                    told = str(event.error) if isinstance(event.error, UserError) else "the server failed"
                    yield _event(error_answer(told, status=500))
                    return
                if event.text:
                    if not told_any:
                        self._metrics.first_piece_seconds.observe(time.perf_counter() - started_at)
                    told_any = True
                    yield _event(asked.answers.piece(index, event.text, with_usage=with_usage))
                if isinstance(event, Finished):
                    ends.append(event)
                    yield _event(asked.answers.piece(index, None, event.reason, with_usage=with_usage))
            if with_usage:
                yield _event(asked.answers.last(_usage(asked.jobs, ends)))
            self._metrics.seconds.observe(time.perf_counter() - started_at)
            yield "data: [DONE]\n\n"
        finally:
            self._scheduler.cancel(asked.jobs)

    async def _read(self, request: Request) -> bytes:
        """The body, no longer than allowed; what asks for more is not read to its end."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a page of another site cannot send from a browser
            raise RefusedError(415, f"Content-Type: got {kind!r}, allowed application/json", field="Content-Type")
        limit, raw = self._offer.max_body_bytes, bytearray()
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > limit:
                raise RefusedError(413, f"body: got more than {limit} bytes, allowed {limit}", Connection="close")
        return bytes(raw)

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self._offer.key is not None and not hmac.compare_digest(
            given.encode("utf-8", "surrogateescape"), f"Bearer {self._offer.key}".encode()
        ):
            told = "Authorization: got no valid key, allowed the key that this server was started with"
            raise RefusedError(401, told, code="invalid_api_key", WWW_Authenticate="Bearer")


def _usage(jobs: Sequence[Job], ends: Sequence[Finished]) -> dict[str, Any]:
    return usage(sum(len(job.tokens) for job in jobs), [end.result for end in ends])


def _event(answer: dict[str, Any]) -> str:
    return f"data: {json.dumps(answer, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _from_thread(
    loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[tuple[int, Event]]", event: tuple[int, Event]
) -> None:
    if not loop.is_closed():  # after a second Ctrl-C the server ends without waiting for the decoding
        loop.call_soon_threadsafe(events.put_nowait, event)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
