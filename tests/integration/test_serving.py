"""`layerskip serve` as a process of its own, seen through OpenAI's Python client."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest

from app.decoding.settings import DecodingSettings
from app.errors import ConfigError
from app.generation.loaded_model import load_decoder
from app.generation.model import Model
from tests.support.runs import cli
from tests.support.saved_models import save_model

openai = pytest.importorskip("openai")

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]  # the client's own warnings

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
DRAFTS = {"strategy": "self_speculative", "exit_layer": 2, "num_draft_tokens": 3, "fall_back": False}
KEY, WAITING, MOST, CONTEXT, BODY = "a secret", 40, 80, 512, 20_000
PROMPTS = [f"{word} {number}" for number in range(10) for word in ("the end of", "x =", "def", "Grüße aus", "café")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    settings = {"chat_template": TEMPLATE, "max_length": CONTEXT, "hidden_size": 64}
    return save_model(tmp_path_factory.mktemp("model") / "tiny", **settings)


@pytest.fixture(scope="module")
def alone(directory):
    """What the Python API gives for one prompt."""
    model = Model(load_decoder(str(directory), dtype="float32", device="cpu"))
    return lambda prompt, **options: model.generate(prompt, **DRAFTS, **options)


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory):
    """The process and its port."""
    limits = {"max_waiting": WAITING, "batch_size": 4, "max_new_tokens": MOST, "max_body_bytes": BODY}
    given = [f"--{name}={value}" for name, value in (DRAFTS | limits).items()]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "app", "serve", "--model", str(directory), "--port", "0", "--dtype", "float32"]
    with log.open("w") as file:
        process = subprocess.Popen([*command, *given], env=os.environ | {"LAYERSKIP_API_KEY": KEY}, stderr=file)
    try:
        while not (found := re.search(r"http://127.0.0.1:(\d+)/v1", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process, int(found[1]), log
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server[1]}/v1", api_key=KEY, max_retries=100) as client:
        yield client


def call(server, method, path, body=b"", **headers):
    """Status and text of an answer, without a client that knows better."""
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | headers
    with closing(HTTPConnection("127.0.0.1", server[1], timeout=60)) as connection:
        connection.request(method, path, body, given)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def figures(server):
    status, page = call(server, "GET", "/metrics")
    assert status == 200
    return {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", page, re.MULTILINE)}


def test_both_endpoints_answer_as_generate_does_streamed_or_not(client, alone):
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 30}
    for prompt, ask, text_of in (
        ("the end of", lambda **more: client.completions.create(prompt="the end of", **asked, **more), "text"),
        ("<user>hi<assistant>", lambda **more: client.chat.completions.create(messages=MESSAGES, **asked, **more), ""),
    ):
        expected = alone(prompt, max_new_tokens=30)
        whole = ask()
        choice = whole.choices[0]
        text = choice.text if text_of else choice.message.content
        assert (text, choice.finish_reason) == (expected.text, "length")
        pieces = list(ask(stream=True, stream_options={"include_usage": True}))
        shown = [piece.choices[0] for piece in pieces[:-1]]
        assert "".join((one.text if text_of else one.delta.content) or "" for one in shown) == text
        assert len(pieces) > 5
        for usage in (whole.usage, pieces[-1].usage):
            assert usage.completion_tokens == 30
            assert (usage.acceptance_rate, usage.mean_tokens_per_round) == (
                expected.acceptance_rate,
                expected.mean_tokens_per_round,
            )
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "max_tokens": 20}
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "max_new_tokens": 20}
    several = client.completions.create(model="tiny", prompt=PROMPTS[:3], **sampled)
    assert several.choices[0].text == alone(PROMPTS[0], **options).text
    assert len({choice.text for choice in several.choices}) == 3
    penalised = client.completions.create(prompt="x =", extra_body={"repetition_penalty": 1.7}, **asked)
    assert penalised.choices[0].text == alone("x =", max_new_tokens=30, repetition_penalty=1.7).text
    assert penalised.choices[0].text != alone("x =", max_new_tokens=30).text
    ids = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=3, temperature=0)
    assert ids.usage.prompt_tokens == 3


MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]


@pytest.mark.timeout(900)
def test_of_fifty_clients_some_of_whom_leave_each_gets_its_own_text_and_memory_stays_flat(server, client, alone):
    expected = {prompt: alone(prompt, max_new_tokens=24).text for prompt in PROMPTS}

    def ask(number):
        asked = {"model": "tiny", "prompt": PROMPTS[number], "max_tokens": 24, "temperature": 0}
        if number % 3:
            return client.completions.create(**asked).choices[0].text
        with client.completions.create(stream=True, **asked | {"max_tokens": MOST}) as stream:
            if number % 6 == 0:  # leaves in the middle
                return next(iter(stream)).choices[0].text
            return "".join(piece.choices[0].text for piece in stream)

    before, memory = figures(server), []
    for _ in range(3):
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            texts = list(pool.map(ask, range(len(PROMPTS))))
        for number, text in enumerate(texts):
            if number % 3:
                assert text == expected[PROMPTS[number]]
            elif number % 6 == 0:
                assert expected[PROMPTS[number]].startswith(text)
            else:
                assert text.startswith(expected[PROMPTS[number]].rstrip("\N{REPLACEMENT CHARACTER}"))
        memory.append(figures(server)["process_resident_memory_bytes"])
    assert memory[2] - memory[1] < 20e6
    while (after := figures(server))["layerskip_waiting"] + after["layerskip_running"]:
        time.sleep(0.1)
    told = {name: after[name] - before.get(name, 0) for name in after if name.startswith("layerskip_prompts_total")}
    assert told['layerskip_prompts_total{outcome="cancelled"}'] >= 3
    assert sum(told.values()) - told.get('layerskip_prompts_total{outcome="refused"}', 0) == 150
    assert after['layerskip_batches_total{size="4"}'] >= 1
    assert after["layerskip_joined_total"] > 50


def test_what_is_not_offered_is_refused_by_name_and_nothing_fails(server, client):
    good = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for path, body, status, field in [
        ("completions", {**good, "n": 2}, 400, "n"),
        ("completions", {**good, "logprobs": 5}, 400, "logprobs"),
        ("completions", {**good, "frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ("completions", {**good, "temperature": "hot"}, 400, "temperature"),
        ("completions", {**good, "temperature": -1}, 400, "temperature"),
        ("completions", {**good, "top_p": 0}, 400, "top_p"),
        ("completions", {**good, "repetition_penalty": 0}, 400, "repetition_penalty"),
        ("completions", {**good, "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {**good, "max_tokens": MOST + 1}, 400, "max_tokens"),
        ("completions", {**good, "max_tokens": True}, 400, "max_tokens"),
        ("completions", {**good, "seed": -1}, 400, "seed"),
        ("completions", {**good, "stop": ["a", ""]}, 400, "stop.1"),
        ("completions", {**good, "prompt": None}, 400, "prompt"),
        ("completions", {**good, "prompt": 7}, 400, "prompt"),
        ("completions", {**good, "prompt": []}, 400, "prompt"),
        ("completions", {**good, "prompt": ["x", ""]}, 400, "prompt.1"),
        ("completions", {**good, "prompt": [1, 10**9]}, 400, "prompt"),
        ("completions", {**good, "prompt": [1, 10**99]}, 400, "prompt"),
        ("completions", {**good, "prompt": "x " * CONTEXT}, 400, "prompt"),
        ("completions", {**good, "prompt": ["x"] * (WAITING + 1)}, 400, "prompt"),
        ("completions", {**good, "model": "other"}, 404, "model"),
        ("completions", [good], 400, "body"),
        ("completions", {**good, "prompt": "x" * BODY}, 413, None),
        ("chat/completions", {**chat, "tools": [{}]}, 400, "tools"),
        ("chat/completions", {**chat, "messages": []}, 400, "messages"),
        ("chat/completions", {**chat, "messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ("chat/completions", {**chat, "messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ("chat/completions", {**chat, "messages": [{"role": "user", "content": "x" * 2 * CONTEXT}]}, 400, "messages"),
        ("nothing", good, 404, None),
    ]:
        found, text = call(server, "POST", f"/v1/{path}", json.dumps(body))
        assert found == status, (body, text)
        error = json.loads(text)["error"]
        assert error["param"] == field, (body, error)
        assert field is None or error["message"].startswith(f"{field}: got")
    name = {**chat, "messages": [{"role": "user", "content": "x", "name": "x"}]}
    part = {**chat, "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "x": 1}]}]}
    for path, raw, told in [
        ("completions", json.dumps({**good, "stop": [""]}), "stop.0: got '', allowed at least 1 character"),
        ("completions", "{", "got b'{', allowed a JSON object; EOF while parsing an object at line 1 column 1"),
        ("chat/completions", json.dumps({**chat, "messages": []}), "messages: got [], allowed at least 1 item"),
        (
            "chat/completions",
            json.dumps(name),
            "messages.0.name: got 'a field that this server does not know', allowed role, content",
        ),
        ("chat/completions", json.dumps(part), "allowed type, text"),
    ]:
        assert json.loads(call(server, "POST", f"/v1/{path}", raw)[1])["error"]["message"].endswith(told)
    for raw in (b"", b"{", b'{"prompt": "\\ud800"}', b"[" * 10_000, b"\xff\xfe", b'{"prompt": NaN}'):
        assert call(server, "POST", "/v1/completions", raw)[0] == 400
    assert call(server, "POST", "/v1/completions", json.dumps(good), **{"Content-Type": "text/plain"})[0] == 415
    assert call(server, "GET", "/v1/completions")[0] == 405
    assert call(server, "GET", "/v1/models", Authorization="Bearer a secrex")[0] == 401
    assert call(server, "GET", "/health", Authorization="")[0] == 200
    nulls = {"n": None, "stop": None, "seed": None, "logprobs": None, "presence_penalty": 0}
    assert call(server, "POST", "/v1/completions", json.dumps(good | nulls))[0] == 200
    with pytest.raises(openai.BadRequestError, match="best_of: got 3, allowed 1"):
        client.completions.create(best_of=3, **good)
    assert "Traceback" not in server[2].read_text()


def test_requests_with_the_same_penalty_share_a_batch_and_static_rounds_have_none():
    from app.serving.bodies import CompletionBody  # these need the extra
    from app.serving.offer import Offer

    body = CompletionBody(prompt=["x"], temperature=0, repetition_penalty=1.2)
    given = {"name": "tiny", "loaded": None, "max_new_tokens": 9, "max_body_bytes": 9}
    offer = Offer(settings=DecodingSettings(max_new_tokens=1), **given)
    assert offer.settings_of(body, 3) == offer.settings_of(body.model_copy(), 3)
    static = Offer(settings=DecodingSettings(max_new_tokens=1, engine="static"), **given)
    with pytest.raises(
        ConfigError, match=r"repetition_penalty: got 1.2, allowed 1 with the engine of this server, static"
    ):
        static.settings_of(body, 3)


def test_a_conversation_that_no_template_takes_is_refused_by_the_name_of_its_field():
    from app.serving.offer import Offer  # this needs the extra

    loaded = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=None))
    settings = DecodingSettings(max_new_tokens=1)
    offer = Offer(name="tiny", loaded=loaded, settings=settings, max_new_tokens=9, max_body_bytes=9)
    with pytest.raises(
        ConfigError, match=r"^messages: got '1 of them', allowed what .* this tokenizer has no chat template"
    ):
        offer.encode_chat([{"role": "user", "content": "x"}])


def test_more_than_can_wait_is_refused_until_there_is_room(server):
    bare = openai.OpenAI(base_url=f"http://127.0.0.1:{server[1]}/v1", api_key=KEY, max_retries=0)
    asked = {"model": "tiny", "prompt": PROMPTS[:WAITING], "max_tokens": MOST, "temperature": 0, "stream": True}
    with bare.completions.create(**asked):  # a few of these run, the others wait
        with pytest.raises(openai.RateLimitError) as refused:
            bare.completions.create(**asked)
        assert int(refused.value.response.headers["retry-after"]) >= 1


def test_a_client_that_leaves_before_its_whole_answer_takes_its_prompt_along(server):
    def cancelled():
        return figures(server).get('layerskip_prompts_total{outcome="cancelled"}', 0)

    def answered(status):
        return figures(server).get(f'layerskip_responses_total{{path="/v1/completions",status="{status}"}}', 0)

    gone, failed = answered(499), answered(500)
    with socket.create_connection(("127.0.0.1", server[1])) as half:
        head = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        half.sendall(f'POST /v1/completions HTTP/1.1\r\n{head}{{"prompt":'.encode())
    while answered(499) + answered(500) == gone + failed:
        time.sleep(0.1)
    assert answered(500) == failed
    before, body = cancelled(), json.dumps({"prompt": "x", "max_tokens": MOST})
    for _ in range(6):  # some run, others wait
        connection = HTTPConnection("127.0.0.1", server[1], timeout=60)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/completions", body, headers)
        connection.close()
    while cancelled() < before + 6:
        time.sleep(0.1)


def test_an_address_that_cannot_be_had_is_told_before_the_model_is_loaded(server, directory, monkeypatch, capsys):
    assert cli(monkeypatch, "serve", "--model", str(directory), "--port", str(server[1])) == 2
    told = capsys.readouterr().err
    assert f"port: got '127.0.0.1:{server[1]}', allowed an address of this machine and a port that is free" in told
    assert cli(monkeypatch, "serve", "--model", str(directory), "--host", "", "--engine", "static") == 2
    assert "host: got '', allowed an address of this machine; 0.0.0.0 stands for all" in capsys.readouterr().err


def test_a_signal_ends_the_server_when_it_has_finished_what_it_took(server, client, alone):
    process, _, log = server
    asked = {"model": "tiny", "prompt": "the end of", "max_tokens": MOST, "temperature": 0}
    with ThreadPoolExecutor(8) as pool:
        streams = [client.completions.create(stream=True, **asked) for _ in range(8)]  # some of them wait
        process.send_signal(signal.SIGTERM)
        read = [pool.submit(lambda stream: "".join(p.choices[0].text for p in stream), stream) for stream in streams]
        expected = alone("the end of", max_new_tokens=MOST).text
        assert [future.result() for future in read] == [expected] * 8
    assert process.wait(60) == 0
    with pytest.raises(ConnectionRefusedError):
        call(server, "GET", "/health")
    assert "Traceback" not in log.read_text()
