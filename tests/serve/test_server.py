"""The server, asked by OpenAI's own client and by clients that do not behave."""

import itertools
import json
import shutil
import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection

import httpx
import pytest
import torch

from ptmoe.errors import PtmoeError
from ptmoe.models.adapter_set import BASE
from ptmoe.models.greedy import GREEDY
from ptmoe.serve import start
from ptmoe.serve.engine import EngineError, Token
from ptmoe.serve.limits import Limits
from ptmoe.serve.start import bind, local_service
from testing.serving import Paced, alone, running, save, service_of, until

openai = pytest.importorskip("openai")
PROMPT = "the baker of the harbor is"
GREEDILY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def service(model):
    return service_of(model)


@pytest.fixture(scope="module")
def address(service):
    with running(service, admin_key="secret") as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def post(address, body, **options):
    content = {"json": body} if isinstance(body, dict) else {"content": body}
    return httpx.post(f"{address}/v1/completions", **content, **options)


def test_an_answer_does_not_wait_for_the_client_to_acknowledge_its_headers():
    with bind("127.0.0.1", 0) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid", "a..b"])
def test_a_port_that_cannot_be_had_is_named_before_a_base_is_loaded(host, model, run, monkeypatch):
    monkeypatch.setattr(start, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        status, _, told = run("serve", model.folder / "adapters", "--host", host, "--port", port)
    assert status == 2
    assert f"cannot listen on {host}, port {port}: " in " ".join(told.split())


def test_a_port_is_one_servers_while_it_loads_and_free_once_it_is_gone():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(PtmoeError, match=f"cannot listen on 127.0.0.1, port {port}: "):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()


@pytest.mark.ci
def test_a_connection_that_a_client_keeps_is_there_when_it_asks_again(address):
    connection = HTTPConnection(address.removeprefix("http://"))
    for wait in (0, 6):  # httpx keeps one for 5 seconds
        time.sleep(wait)
        connection.request("GET", "/health")
        assert json.load(connection.getresponse())["engine"]["ok"]
    connection.close()


def expected(model, service, name, prompt=PROMPT, new=12):
    return alone(model, service, BASE if name == "base" else name, prompt, new)


@pytest.mark.parametrize("name", ["routed", "fixed", "base"])
def test_a_completion_is_what_generate_says(client, model, service, name):
    whole = expected(model, service, name)
    made = client.completions.create(model=name, prompt=PROMPT, extra_body={"ptmoe": True}, **GREEDILY)
    assert made.choices[0].text == whole
    assert made.choices[0].finish_reason in ("stop", "length")
    virtual = {"routed": 6, "fixed": 5, "base": 0}[name]
    assert made.usage.prompt_tokens == len(service._encode(PROMPT, None))
    assert made.usage.prompt_tokens_details.virtual_tokens == virtual
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    routing = made.choices[0].ptmoe
    if name == "routed":
        gate = model.adapters.encode(
            model.adapters.embedding(torch.tensor([service._encode(PROMPT, None)])),
            torch.ones(1, made.usage.prompt_tokens).bool(),
            ["routed"],
        ).routing.gate[0]
        assert routing["gate"] == pytest.approx(gate.tolist())
        assert routing["expert"] == int(gate.argmax())
    else:
        assert routing == {"expert": None, "gate": None}
    chunks = list(client.completions.create(model=name, prompt=PROMPT, stream=True, **GREEDILY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_a_chat_completion_streams_what_it_says_whole(client, model, service):
    messages = [{"role": "user", "content": PROMPT}]
    whole = expected(model, service, "routed", messages)
    made = client.chat.completions.create(model="routed", messages=messages, logprobs=True, top_logprobs=2, **GREEDILY)
    assert made.choices[0].message.content == whole
    entries = made.choices[0].logprobs.content
    assert len(entries) == made.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == entry.top_logprobs[0].logprob for entry in entries)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(model="routed", messages=messages, **options, **GREEDILY)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert last.usage == made.usage
    assert not last.choices


def test_an_answers_message_is_sent_back_as_it_came(client):
    messages = [{"role": "user", "content": PROMPT}]
    first = client.chat.completions.create(model="routed", messages=messages, **GREEDILY).choices[0].message
    more = {"role": "user", "content": "more"}
    plain = {"role": "assistant", "content": first.content}
    usages = [
        client.chat.completions.create(model="routed", messages=[*messages, said, more], **GREEDILY).usage
        for said in (first, first.model_dump(), {**plain, "annotations": [], "tool_calls": []}, plain)
    ]
    assert usages == usages[-1:] * 4


def test_answers_are_counted_stopped_and_drawn_as_asked(client, model, service):
    whole = expected(model, service, "fixed", new=24)
    stop = whole[len(whole) // 2 :][:2]
    made = client.completions.create(model="fixed", prompt=PROMPT, stop=[stop], **{**GREEDILY, "max_tokens": 24})
    assert made.choices[0].text == whole[: whole.index(stop)]
    assert made.choices[0].finish_reason == "stop"
    drawn = {"model": "fixed", "prompt": [PROMPT, "a"], "n": 3, "seed": 5, "max_tokens": 8, "logprobs": 1}
    first, again = client.completions.create(**drawn), client.completions.create(**drawn)
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert [choice.index for choice in first.choices] == list(range(6))
    assert len({choice.text for choice in first.choices[:3]}) > 1
    for choice in first.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)
    ids = service._encode(PROMPT, None)
    assert (
        client.completions.create(model="fixed", prompt=ids, **GREEDILY).choices[0].text
        == whole[: len(expected(model, service, "fixed"))]
    )


def test_an_end_token_ends_an_answer_and_is_counted(client, model, service, monkeypatch):
    ids = torch.tensor([service._encode(PROMPT, None)])
    made = model.generate(ids, adapter_names=["routed"], max_new_tokens=12, **GREEDY)[0, ids.shape[1] :].tolist()
    monkeypatch.setattr(service, "ends", frozenset(made[6:7]))
    place = made.index(made[6])
    answer = client.completions.create(model="routed", prompt=PROMPT, **GREEDILY)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == service._decode(made[:place])
    assert answer.usage.completion_tokens == place + 1


def test_many_clients_each_get_their_own_answer(client, model, service):
    prompts = [f"{PROMPT} {'very ' * index}" for index in range(12)]
    names = ["routed", "fixed", "base"]
    want = [expected(model, service, names[index % 3], prompt) for index, prompt in enumerate(prompts)]
    got = [None] * len(prompts)

    def ask(index):
        made = client.completions.create(model=names[index % 3], prompt=prompts[index], **GREEDILY)
        got[index] = made.choices[0].text

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want
    until(lambda: service.in_flight == 0)


BAD = {
    "unknown parameter": ({"prompt": "a", "colour": 1}, 400, "colour"),
    "penalty": ({"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
    "echo": ({"prompt": "a", "echo": True}, 400, "echo"),
    "temperature": ({"prompt": "a", "temperature": 3}, 400, "temperature"),
    "wrong type": ({"prompt": "a", "max_tokens": "12"}, 400, "max_tokens"),
    "no prompt": ({}, 400, "prompt"),
    "empty": ({"prompt": ""}, 400, None),
    "token": ({"prompt": [5, 100_000]}, 400, None),
    "negative token": ({"prompt": [-1]}, 400, "prompt"),
    "half a character": ({"prompt": "\ud800"}, 400, None),
    "too many": ({"prompt": "a", "n": 100}, 400, None),
    "too long": ({"prompt": "a " * 3000}, 400, None),
    "too many tokens": ({"prompt": "a", "max_tokens": 5000}, 400, None),
    "unknown model": ({"prompt": "a", "model": "routde"}, 404, "model"),
    "a path": ({"prompt": "a", "model": "../adapters/routed"}, 404, "model"),
    "half a name": ({"prompt": "a", "model": "\udc00"}, 400, "model"),
    "stream option": ({"prompt": "a", "stream_options": {"obfuscated": True}}, 400, "stream_options"),
}
CHAT = {  # what is wrong with a message: the words that the error has
    "name": ({"content": "a", "name": "me"}, "unknown parameter 'messages.0.name'"),
    "calls": ({"content": "a", "tool_calls": [{}]}, "tool_calls cannot be honoured"),
    "empty": ({}, "messages.0.content: field required"),
    "null": ({"content": None}, "messages.0.content: "),
    "number": ({"content": 1}, "messages.0.content: "),
    "image": ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content: input should be"),
}


@pytest.mark.parametrize(("body", "status", "param"), BAD.values(), ids=BAD)
def test_what_cannot_be_honoured_is_refused_by_name(address, body, status, param):
    content = json.dumps({"model": "routed", **body}).encode()
    got = post(address, content, headers={"content-type": "application/json"})
    assert got.status_code == status, got.text
    error = got.json()["error"]
    assert error["param"] == param
    assert error["message"]
    if param not in (None, "model"):
        assert param in error["message"]


def test_two_limits_of_one_answer_are_refused(address):
    body = {"model": "routed", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    for other, status in ((2, 200), (3, 400)):
        got = httpx.post(f"{address}/v1/chat/completions", json={**body, "max_completion_tokens": other})
        assert got.status_code == status
    assert got.json()["error"]["param"] == "max_tokens"


def test_alternatives_without_log_probabilities_are_refused(address):
    body = {"model": "routed", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": False}
    for alternatives, status in ((0, 200), (1, 400)):
        got = httpx.post(f"{address}/v1/chat/completions", json={**body, "top_logprobs": alternatives})
        assert got.status_code == status
    assert got.json()["error"]["param"] == "top_logprobs"


@pytest.mark.parametrize(("change", "words"), CHAT.values(), ids=CHAT)
def test_an_error_in_a_conversation_says_where_it_is(address, change, words):
    body = {"model": "routed", "messages": [{"role": "user", **change}]}
    got = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert got.status_code == 400
    assert words in got.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{"content-type": "application/x-www-form-urlencoded"}, {}])
def test_a_body_sent_as_something_else_says_which_header_is_needed(address, headers):
    got = post(address, json.dumps({"model": "routed", "prompt": "a"}).encode(), headers=headers)
    assert got.status_code == 400
    assert "'Content-Type: application/json'" in got.json()["error"]["message"]


def test_errors_say_what_would_fit(address):
    assert "'routed'" in post(address, {"model": "routde", "prompt": "a"}).json()["error"]["message"]
    message = post(address, {"model": "routed", "prompt": "a " * 3000}).json()["error"]["message"]
    assert "2,048" in message
    tokens = [token for token in message.replace(",", "").split() if token.isdigit()]
    assert len(tokens) >= 2


RAW = {
    "not JSON": b"{",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 50_000,
    "no object": b"[1]",
    "bytes": b"\xff\xfe\x00",
    "digits": b'{"model": "routed", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    "infinite": b'{"model": "routed", "prompt": "a", "temperature": NaN}',
    "empty": b"",
}


@pytest.mark.parametrize("content", RAW.values(), ids=RAW)
def test_a_body_that_is_none_is_refused_and_the_server_goes_on(address, content):
    got = post(address, content, headers={"content-type": "application/json"})
    assert got.status_code == 400, got.text
    assert set(got.json()["error"]) == {"message", "type", "param", "code"}


def test_a_huge_body_is_not_read(address):
    got = post(address, {"model": "routed", "prompt": "a" * 1_100_000})
    assert got.status_code == 413
    assert "1,000,000" in got.json()["error"]["message"]


def test_other_paths_and_verbs_are_errors_in_the_same_form(address):
    for got, status in ((httpx.get(f"{address}/v1/nothing"), 404), (httpx.get(f"{address}/v1/completions"), 405)):
        assert got.status_code == status
        assert got.json()["error"]["type"]
    for path in ("embeddings", "responses", "load_lora_adapter"):  # which other servers have
        said = httpx.post(f"{address}/v1/{path}", json={}).json()["error"]["message"]
        assert all(f"/v1/{own}" in said for own in ("completions", "chat/completions", "models", "adapters/NAME"))


def test_the_likeliest_tokens_are_named_while_others_are_answered(address, service, monkeypatch):
    naming, answered, name = threading.Event(), threading.Event(), service.token_text

    def patient(token):
        naming.set()
        assert answered.wait(10)
        return name(token)

    monkeypatch.setattr(service, "token_text", patient)
    got = []
    body = {"model": "base", "prompt": "a", "max_tokens": 2, "logprobs": 2}
    thread = threading.Thread(target=lambda: got.append(post(address, body, timeout=30)))
    thread.start()
    assert naming.wait(10)
    with suppress(httpx.TimeoutException):
        httpx.get(f"{address}/health", timeout=5)
        answered.set()
    thread.join()
    assert answered.is_set()
    assert len(got[0].json()["choices"][0]["logprobs"]["tokens"]) == 2


def test_models_health_and_metrics(client, address):
    assert [model.id for model in client.models.list()] == ["base", "fixed", "routed"]
    assert client.models.retrieve("fixed").id == "fixed"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("fxed")
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    client.completions.create(model="routed", prompt=PROMPT, **GREEDILY)
    page = httpx.get(f"{address}/metrics").text
    assert 'ptmoe_expert_use_total{adapter="routed"' in page
    for name in ("ptmoe_batch_rows_count", "ptmoe_first_token_seconds_bucket", "ptmoe_answers_in_progress 0.0"):
        assert name in page


def test_keys_are_needed_where_there_are_any(model, address):
    def headers(key):
        return {"authorization": f"Bearer {key}"}

    assert httpx.get(f"{address}/v1/adapters").status_code == 401
    assert httpx.get(f"{address}/v1/adapters", headers=headers("secret")).json()["fixed"]["served"]
    with running(service_of(model), api_keys=["one", "twö"]) as other:
        assert httpx.get(f"{other}/v1/models").status_code == 401
        assert httpx.get(f"{other}/metrics").status_code == 401
        assert httpx.get(f"{other}/v1/models", headers=headers("three")).status_code == 401
        assert httpx.get(f"{other}/v1/models", headers=headers("one")).status_code == 200
        for encoding, status in (("utf-8", 200), ("latin-1", 401)):  # the bytes are compared, as a terminal sends them
            sent = "Bearer twö".encode(encoding)
            assert httpx.get(f"{other}/v1/models", headers={"authorization": sent}).status_code == status
        assert httpx.get(f"{other}/v1/adapters", headers=headers("one")).status_code == 403
        assert httpx.get(f"{other}/health").status_code == 200


def slow(pause):
    return Paced(itertools.repeat(65), pause)


def with_engine(model, engine, **limits):
    service = service_of(model, limits=Limits(**limits))
    service.engine = engine
    return service


@pytest.mark.ci
def test_a_full_queue_refuses_and_says_when_to_come_back(model):
    engine = slow(0.05)
    with running(with_engine(model, engine, max_batch=1, queue=1)) as address:
        body = {"model": "base", "prompt": "a", "max_tokens": 20}
        threads = [threading.Thread(target=post, args=(address, body)) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: engine.open == 2)
        got = post(address, body)
        assert got.status_code == 429
        assert int(got.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join()
        assert engine.ended == 2
        assert post(address, {**body, "max_tokens": 1}).status_code == 200


def test_a_completion_that_asks_for_no_length_gets_what_the_limit_allows(model):
    with running(with_engine(model, slow(0), max_tokens=3)) as address:
        got = post(address, {"model": "base", "prompt": "a"})
        assert got.status_code == 200, got.text
        assert got.json()["usage"]["completion_tokens"] == 3


def test_a_request_whose_adapter_is_replaced_meanwhile_is_of_one_adapter_and_in_its_form(model, tmp_path):
    for name in ("routed", "fixed"):
        shutil.copytree(model.folder / "adapters" / name, tmp_path / name)
    (tmp_path / "fixed" / "config.yaml").write_text("chat: false\n")
    service = local_service(tmp_path, model=str(model.folder / "base"), device="cpu")
    registry, compose = service.registry, service.registry.compose
    plain, templated = (
        service._prepare(name, [[{"role": "user", "content": PROMPT}]], 1)[0] for name in ("fixed", "routed")
    )
    assert len(plain.row.token_ids) < len(templated.row.token_ids)

    def replaced_after_the_first(*arguments):
        row = compose(*arguments)
        registry.compose = compose
        shutil.rmtree(tmp_path / "fixed")
        (tmp_path / "routed").rename(tmp_path / "fixed")
        registry.scan(settled=True)
        return row

    registry.compose = replaced_after_the_first
    rows = service._prepare("fixed", [[{"role": "user", "content": PROMPT}]] * 2, 1)
    assert [row.row.token_ids for row in rows] == [templated.row.token_ids] * 2
    assert [row.gate for row in rows] == [templated.gate] * 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.ci
def test_a_client_that_goes_away_ends_its_answer(model, stream):
    engine = slow(0.02)
    service = with_engine(model, engine)
    with running(service) as address:
        body = {"model": "base", "prompt": "a", "max_tokens": 4000, "stream": stream}
        with (
            suppress(httpx.TimeoutException),
            httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=0.4) as got,
        ):
            next(got.iter_lines())
        until(lambda: engine.open == 0)
        assert engine.ended == 0
        until(lambda: service.in_flight == 0)


@pytest.mark.slow
def test_a_client_that_stops_reading_is_cut_off(model, monkeypatch):
    monkeypatch.setattr("ptmoe.serve.app.GRACE", 0.5)
    service = with_engine(model, slow(0), deadline=4.0)
    with running(service) as address, socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        body = json.dumps({"model": "base", "prompt": "a", "max_tokens": 4000, "n": 16, "stream": True})
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        silent.sendall(f"{head}\r\n\r\n{body}".encode())
        until(lambda: 'ptmoe_requests_total{status="timeout"} 1.0' in service.metrics.page().decode(), 15)
        until(lambda: service.in_flight == 0)
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_client_that_sends_too_slowly_is_told_so_and_cut_off(model, monkeypatch):
    monkeypatch.setattr("ptmoe.serve.app.GRACE", 0.2)
    with running(with_engine(model, slow(0), deadline=0.3)) as address, socket.socket() as client:
        client.settimeout(10)
        client.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9"
        client.sendall(f"{head}\r\n\r\n{{".encode())
        head, body = b"".join(iter(lambda: client.recv(4096), b"")).split(b"\r\n\r\n")
        described = httpx.get(f"{address}/openapi.json").json()["paths"]["/v1/completions"]["post"]["responses"]
    assert head.startswith(b"HTTP/1.1 408 ")
    assert "408" in described
    assert "longer than 0.5 s" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.ci
def test_a_deadline_ends_an_answer(model, stream):
    engine = slow(0.05)
    with running(with_engine(model, engine, deadline=0.3)) as address:
        got = post(address, {"model": "base", "prompt": "a", "max_tokens": 4000, "stream": stream})
        assert got.status_code == (200 if stream else 504)
        assert "longer than 0.3 s" in got.text
        assert not stream or got.text.endswith("data: [DONE]\n\n")
        until(lambda: engine.open == 0)


FAULTS = {
    "expected": (EngineError("it broke"), 500, "it broke"),
    "too long after all": (PtmoeError("no room"), 400, "no room"),
    "unexpected": (KeyError("secret"), 500, "the server failed"),
}


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("fault", "status", "words"), FAULTS.values(), ids=FAULTS)
@pytest.mark.ci
def test_a_fault_of_the_engine_is_one_requests_error(model, fault, status, words, started):
    class Failing(Paced):
        async def generate(self, row, sampling):
            if started:
                yield Token(65)
            raise fault

    with running(with_engine(model, Failing([]))) as address:
        got = post(address, {"model": "base", "prompt": "a"})
        assert got.status_code == status
        streamed = post(address, {"model": "base", "prompt": "a", "stream": True}).text
        *_, event, done = streamed.split("\n\n")[:-1]
        assert done == "data: [DONE]"
        for error in (got.json(), json.loads(event.removeprefix("data: "))):
            assert words in error["error"]["message"]
            assert "secret" not in str(error)


def test_an_unexpected_fault_is_counted_and_leaves_its_client_the_connection(model, caplog):
    class Failing(Paced):
        async def generate(self, row, sampling):
            raise KeyError("secret")
            yield

    body = json.dumps({"model": "base", "prompt": "a"})
    with running(with_engine(model, Failing([]))) as address:
        connection = HTTPConnection(address.removeprefix("http://"), timeout=30)
        for _ in range(2):
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            got = connection.getresponse()
            got.read()
            assert got.status == 500
        page = httpx.get(f"{address}/metrics").text
        connection.close()
    assert 'ptmoe_requests_total{status="500"} 2.0' in page
    assert "KeyError: 'secret'" in caplog.text


@pytest.mark.ci
def test_accepted_requests_finish_when_the_server_is_told_to_stop(model):
    engine, got = slow(0.05), []
    with running(with_engine(model, engine)) as address:
        body = {"model": "base", "prompt": "a", "max_tokens": 20}
        thread = threading.Thread(target=lambda: got.append(post(address, body)))
        thread.start()
        until(lambda: engine.open == 1)
    thread.join()
    assert got[0].status_code == 200
    assert engine.ended == 1
