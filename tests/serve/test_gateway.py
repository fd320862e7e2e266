"""The gateway's half of the protocol: engines that are down, slow, of another base, or fail.

What a real engine answers is for `test_vllm.py`.
"""

import asyncio
import base64
import io
import json
import subprocess
import sys

import httpx
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

import ptmoe
from ptmoe.models.bases import load_base, load_tokenizer, max_positions
from ptmoe.serve import gateway
from ptmoe.serve.engine import EngineError, Input, Sampling, Token, UnavailableError
from ptmoe.serve.gateway import GatewayEngine, encoded
from ptmoe.serve.matrix import read_embedding
from ptmoe.serve.start import bind, gateway_service, local_service
from ptmoe.serve.vllm_request import agree
from testing.architectures import ARCHITECTURES
from testing.bases import tiny
from testing.serving import listening, running, save

MATRIX = read_embedding("nano")
BREAKS = "?\u2028\u2029\x85"  # what breaks a line of text, and none of a stream, where vLLM leaves them as they are


@pytest.mark.parametrize(
    "url", ["", "http:", "http://", "http://[", "http://a:99999", "http://a:b", "http://a\n:1", "a:1"]
)
def test_what_is_no_url_of_a_server_is_refused(url):
    with pytest.raises(ptmoe.PtmoeError, match="needs http://HOST:PORT"):
        GatewayEngine(["http://127.0.0.1:1", url], MATRIX)


@pytest.mark.parametrize("key", ["", "a b", "a\n", "schlüssel"])
def test_a_key_that_no_request_can_carry_is_refused_and_not_shown(key):
    with pytest.raises(ptmoe.PtmoeError, match="characters that a request cannot carry") as refused:
        GatewayEngine(["http://127.0.0.1:1"], MATRIX, api_key=key)
    assert not key or key not in str(refused.value)


def spoken(mode="fine", **options):
    """An engine that speaks vLLM's protocol and continues any input with its token ids, backwards."""
    app = FastAPI()
    app.state.asked = []

    @app.get("/health")
    async def health():
        await asyncio.sleep(options.get("health", 0))
        return {}

    @app.get("/v1/models")
    async def models():
        return {"data": [{"id": "somewhere/nano", "max_model_len": 2048}]} if mode != "no vllm" else ["?"]

    @app.post("/v1/completions")
    async def completions(request: Request):
        body = await request.json()
        app.state.asked.append(body)
        ids = body.get("prompt")
        if ids is None:
            if mode == "no embeds":
                return JSONResponse({"error": {"message": "You must set --enable-prompt-embeds"}}, 400)
            embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
            ids = torch.cdist(embeds.float(), MATRIX.weight.float()).argmin(1).tolist()
            if mode == "other base":
                ids = [token + 1 for token in ids]
        answer = [*reversed(ids), *ids * 10][: body["max_tokens"]]
        if options.get("busy") and len(app.state.asked) > 2:
            return JSONResponse({"error": "busy"}, 503)

        async def events():
            for index, token in enumerate(answer):
                if len(app.state.asked) > 2:
                    pause = options.get("pause", 0)
                    for _ in range(int(pause / options.get("pings", pause + 1))):  # as proxies send, that stay open
                        await asyncio.sleep(options["pings"])
                        yield ": ping\n\n"
                    await asyncio.sleep(0 if "pings" in options else pause)
                    if index == options.get("breaks"):
                        raise RuntimeError("gone")
                    if index == options.get("aborts"):
                        choice = {"index": 0, "text": "", "token_ids": [], "logprobs": None, "finish_reason": "abort"}
                        yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                        break
                stops = token in body["stop_token_ids"]
                reason = "stop" if stops else "length" if index == len(answer) - 1 else None
                choice = {"index": 0, "text": BREAKS, "token_ids": [token], "finish_reason": reason}
                if body.get("logprobs") is not None:
                    top = {f"token_id:{token}": -0.1, "token_id:0": -2.5}
                    choice["logprobs"] = {"tokens": ["?"], "token_logprobs": [-0.1], "top_logprobs": [top]}
                if mode == "no ids":
                    del choice["token_ids"]
                if mode == "no numbers":
                    choice["token_ids"] = [float("inf")]
                yield f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n"
                if stops:
                    break
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def row(length=5):
    ids = list(range(3, 3 + length))
    return Input(MATRIX(torch.tensor(ids)).detach(), ids)


def asked(engine, *requests):
    async def one(sampling):
        return [token async for token in engine.generate(row(), sampling)]

    async def run():
        await engine.start()
        try:
            return await asyncio.gather(*map(one, requests), return_exceptions=True), await engine.health()
        finally:
            await engine.stop()

    return asyncio.run(run())


@pytest.mark.parametrize("sampling", [Sampling(4), Sampling(4, logprobs=1)])
@pytest.mark.parametrize(
    ("aborts", "kind", "message"), [(1, EngineError, "in the middle"), (0, UnavailableError, "no inference engine")]
)
def test_an_answer_that_the_engine_gives_up_is_a_failure_and_no_short_answer(sampling, aborts, kind, message, caplog):
    with listening(spoken(aborts=aborts)) as url:
        (failed,), health = asked(GatewayEngine([url], MATRIX), sampling)
    assert type(failed) is kind
    assert message in str(failed)
    assert "gave the request up (abort)" in caplog.text
    assert health["ok"], "it may answer the next request"


def test_an_answer_that_is_given_up_before_its_first_token_comes_from_another_engine():
    with listening(spoken(aborts=0)) as url, listening(spoken()) as fine:
        (tokens,), _ = asked(GatewayEngine([url, fine], MATRIX), Sampling(3))
    assert [token.id for token in tokens] == [7, 6, 5]


def test_an_upstreams_password_is_shown_to_nobody(caplog):
    with listening(spoken()) as url:
        engine = GatewayEngine([url.replace("//", "//user:secret@"), "http://user:secret@127.0.0.1:9"], MATRIX)
        _, health = asked(engine)
        faults = asyncio.run(engine.check())
    assert health["upstreams"].keys() == {url, "http://127.0.0.1:9"}
    assert faults.keys() == {"http://127.0.0.1:9"}
    assert "secret" not in caplog.text


def test_tokens_come_back_with_their_log_probabilities():
    app = spoken()
    with listening(app) as url:
        engine = GatewayEngine([url + "/v1"], MATRIX)
        (tokens, ended), health = asked(engine, Sampling(4, logprobs=1), Sampling(9, 0.7, seed=-1, ends=frozenset({6})))
    assert [token.id for token in tokens] == [7, 6, 5, 4]
    assert tokens[0].logprob == -0.1
    assert tokens[0].top == ((7, -0.1),)
    assert [token.id for token in ended] == [7, 6]
    assert health == {"ok": True, "upstreams": {url: "ok"}}
    assert engine.positions == 2048
    body = next(body for body in app.state.asked if body["temperature"] == 0.7)
    assert body["model"] == "somewhere/nano"
    assert body["stop_token_ids"] == [6]
    assert body["seed"] >= 0
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1, 0, 0)


def test_an_engine_that_drops_the_connections_it_has_answered_on_loses_no_request():
    async def run(port):
        async def relay(reader, writer):
            """One request and its answer; the connection is dropped when the next one comes."""
            answers, requests = await asyncio.open_connection("127.0.0.1", port)
            answered = asyncio.Event()

            async def back():
                while data := await answers.read(65_536):
                    writer.write(data)
                    answered.set()
                writer.close()

            returning = asyncio.create_task(back())
            while (data := await reader.read(65_536)) and not answered.is_set():
                requests.write(data)
            writer.transport.abort()
            returning.cancel()
            requests.close()

        async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
            address, between = server.sockets[0].getsockname()
            engine = GatewayEngine([f"http://{address}:{between}"], MATRIX)
            await engine.start()
            try:
                made = []
                for _ in range(4):
                    made.append([token.id async for token in engine.generate(row(), Sampling(3))])
                await engine._look()
                return made, await engine.health()
            finally:
                await engine.stop()

    with listening(spoken()) as url:
        made, health = asyncio.run(run(int(url.rpartition(":")[2])))
    assert made == [[7, 6, 5]] * 4
    assert health["ok"], health


def test_a_view_is_sent_without_what_it_is_a_view_of():
    embeds = torch.zeros(10_000, 64)[5:8]
    assert len(encoded(embeds)) < 10_000
    assert torch.load(io.BytesIO(base64.b64decode(encoded(embeds))), weights_only=True).shape == (3, 64)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("no embeds", "--enable-prompt-embeds"),
        ("other base", "another base"),
        ("no vllm", "lists no model"),
        ("no ids", "does not send token ids"),
        ("no numbers", "does not send token ids"),
    ],
)
@pytest.mark.ci
def test_an_engine_that_does_not_fit_is_refused_in_words(mode, message):
    with listening(spoken(mode)) as url:
        engine = GatewayEngine([url], MATRIX)
        with pytest.raises(ptmoe.PtmoeError, match=message):
            asyncio.run(engine.check())
        (refused,), health = asked(GatewayEngine([url], MATRIX), Sampling(4))
    assert isinstance(refused, UnavailableError)
    assert not health["ok"]
    assert message in health["upstreams"][url]


def test_one_that_is_down_is_passed_over_and_found_when_it_comes(monkeypatch):
    monkeypatch.setattr(gateway, "POLL", 0.05)
    nowhere = "http://127.0.0.1:9"
    assert list(asyncio.run(GatewayEngine([nowhere], MATRIX).check())) == [nowhere]
    with listening(spoken()) as url:
        (tokens,), health = asked(GatewayEngine([nowhere, url], MATRIX), Sampling(3))
        assert [token.id for token in tokens] == [7, 6, 5]
        assert "cannot be reached" in health["upstreams"][nowhere]

        async def later():
            engine = GatewayEngine([nowhere], MATRIX)
            await engine.start()
            assert not (await engine.health())["ok"]
            engine.upstreams[0].url = url
            while not (await engine.health())["ok"]:
                await asyncio.sleep(0.02)
            await engine.stop()

        asyncio.run(asyncio.wait_for(later(), 20))


def test_one_that_hangs_while_it_is_tried_out_keeps_no_other_waiting(monkeypatch):
    monkeypatch.setattr(gateway, "POLL", 0.05)
    monkeypatch.setattr(gateway, "CONNECT", 100)

    async def found(silent, url):
        engine = GatewayEngine(["http://127.0.0.1:9"] * 2, MATRIX)
        await engine.start()
        one, other = engine.upstreams
        one.url = silent
        await asyncio.sleep(0.5)
        other.url = url
        while other.fault is not None:
            await asyncio.sleep(0.02)
        await engine.stop()
        return one.fault

    with bind("127.0.0.1", 0) as silent, listening(spoken()) as url:
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert asyncio.run(asyncio.wait_for(found(address, url), 20)) is not None


@pytest.mark.ci
def test_a_busy_or_silent_one_is_replaced_before_its_first_token_and_not_after():
    with listening(spoken(busy=True)) as busy, listening(spoken()) as fine:
        (tokens,), _ = asked(GatewayEngine([busy, fine], MATRIX), Sampling(3))
        assert [token.id for token in tokens] == [7, 6, 5]
        (refused,), _ = asked(GatewayEngine([busy], MATRIX), Sampling(3))
        assert isinstance(refused, UnavailableError)
    with listening(spoken(pause=1.5)) as slow, listening(spoken()) as fine:
        (tokens,), _ = asked(GatewayEngine([slow, fine], MATRIX, timeout=0.5), Sampling(3))
        assert [token.id for token in tokens] == [7, 6, 5]
    other = spoken()
    with listening(spoken(pause=3, pings=0.1)) as alive, listening(other) as fine:
        (tokens,), _ = asked(GatewayEngine([alive, fine], MATRIX, timeout=0.5), Sampling(3))
        assert [token.id for token in tokens] == [7, 6, 5]
        assert len(other.state.asked) == 3  # the first two tried it out
    with listening(spoken(breaks=2)) as broken, listening(spoken()) as fine:
        (failed,), _ = asked(GatewayEngine([broken, fine], MATRIX), Sampling(4))
        assert isinstance(failed, EngineError)
        _, health = asked(GatewayEngine([broken], MATRIX), Sampling(4))
        assert health["ok"], "it may answer the next request"
        assert "middle" in str(failed)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"busy": True}, "the inference engine refuses the request (503: "), ({"pause": 1.5}, "it takes too long")],
)
def test_a_client_is_told_why_an_engine_that_can_be_reached_does_not_answer(options, reason):
    with listening(spoken(**options)) as url:
        (refused,), health = asked(GatewayEngine([url], MATRIX, timeout=0.5), Sampling(3))
    assert str(refused).startswith(f"no inference engine answers: {reason}")
    assert health["ok"]


@pytest.mark.ci
def test_one_that_is_too_busy_to_be_looked_at_is_used_where_no_other_is(monkeypatch):
    monkeypatch.setattr(gateway, "CONNECT", 0.2)

    async def run(urls):
        engine = GatewayEngine(urls, MATRIX)
        await engine.start()
        await engine._look()
        try:
            tokens = [token.id async for token in engine.generate(row(), Sampling(2))]
            return tokens, await engine.health()
        finally:
            await engine.stop()

    slow, quick = spoken(health=2), spoken()
    with listening(slow) as busy, listening(quick) as free:
        tokens, health = asyncio.run(run([busy]))
        assert (tokens, health) == ([7, 6], {"ok": True, "upstreams": {busy: "slow to answer"}})
        seen = len(slow.state.asked)
        tokens, health = asyncio.run(run([busy, free]))
        assert tokens == [7, 6]
        assert len(slow.state.asked) == seen + 2  # that it was tried out with
        assert health["upstreams"] == {busy: "slow to answer", free: "ok"}


def test_the_matrix_is_the_bases_own_and_nothing_else_is_read(tmp_path):
    base, _ = load_base("nano")
    assert torch.equal(MATRIX.weight, base.get_input_embeddings().weight)
    base.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(read_embedding(str(tmp_path / "sharded")).weight, MATRIX.weight)
    (tmp_path / "sharded" / "config.json").write_text('{"model_type": "falcon_h1"}')
    with pytest.raises(ptmoe.PtmoeError, match=r"falcon_h1.*--engine local"):
        read_embedding(str(tmp_path / "sharded"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ptmoe.PtmoeError, match=r"no model\.safetensors"):
        read_embedding(str(tmp_path / "empty"))


def test_the_whole_server_answers_through_it(tmp_path):
    save(tmp_path)
    app = spoken()
    with listening(app) as url, running(gateway_service(tmp_path / "adapters", [url], model="nano")) as address:
        body = {"model": "routed", "prompt": "the baker", "max_tokens": 3, "ptmoe": True}
        got = httpx.post(f"{address}/v1/completions", json=body).json()
        assert got["usage"]["completion_tokens"] == 3
        assert got["choices"][0]["ptmoe"]["gate"]
        assert httpx.get(f"{address}/health").json()["engine"]["upstreams"] == {url: "ok"}
    embeds = torch.load(io.BytesIO(base64.b64decode(app.state.asked[-1]["prompt_embeds"])), weights_only=True)
    assert len(embeds) == got["usage"]["prompt_tokens"] + 6


@pytest.mark.parametrize("without", [False, True])
def test_an_answer_ends_where_the_base_in_this_process_would_end_it(tmp_path, without):
    base = tiny("llama", vocab_size=512)
    base.config.eos_token_id = [7, 9]
    base.generation_config.eos_token_id = [8]
    base.save_pretrained(tmp_path)
    load_tokenizer("nano")[0].save_pretrained(tmp_path)
    if without:  # as in bases saved long ago
        (tmp_path / "generation_config.json").unlink()
    here, there = (
        local_service(None, model=str(tmp_path), device="cpu"),
        gateway_service(None, ["http://127.0.0.1:9"], model=str(tmp_path)),
    )
    assert there.ends == here.ends >= ({7, 9} if without else {8})


SMALL = """
import sys
from pathlib import Path
from ptmoe.serve.start import gateway_service, local_service
from ptmoe.serve.vllm_request import agree
gateway_service(Path(sys.argv[1]), ["http://127.0.0.1:9"], model="nano")
import ptmoe.serve.app
heavy = ("vllm", "ptmoe.serve.local", "transformers.modeling_utils", "transformers.models.llama", "torch._dynamo")
print([name for name in heavy if name in sys.modules])
"""


@pytest.mark.ci
def test_it_needs_neither_an_engine_nor_a_model_in_its_process(tmp_path):
    save(tmp_path)
    command = [sys.executable, "-c", SMALL, tmp_path / "adapters"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]", made.stderr


@pytest.mark.parametrize(("architecture", "named"), [*((name, True) for name in ARCHITECTURES), ("llama", False)])
def test_the_tokenizer_that_is_loaded_alone_is_the_one_that_comes_with_the_base(architecture, named, tmp_path):
    tiny(architecture, vocab_size=512).save_pretrained(tmp_path)
    load_tokenizer("nano")[0].save_pretrained(tmp_path)
    if not named:  # as in repositories whose tokenizer is the architecture's own
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "tokenizer_class"}))
    base, tokenizer = load_base(str(tmp_path))
    alone, positions = load_tokenizer(str(tmp_path))
    assert positions == max_positions(base.config)
    assert type(alone) is type(tokenizer)
    assert alone.special_tokens_map == tokenizer.special_tokens_map
    for text in ("the baker of the harbor is", "2 and 3 =>", " Ünïcode\n"):
        assert alone(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("own", "ours", "same"),
    [
        ({1: -0.1, 2: -3.0, 3: -4.0}, {1: -0.15, 2: -3.2, 3: -4.0}, True),  # rounding in half precision
        ({1: -0.1, 2: -3.0, 3: -4.0}, {1: -0.6, 2: -2.0, 3: -3.0}, False),
        ({1: -4.40, 2: -4.42, 3: -4.44}, {1: -4.37, 2: -4.39, 3: -4.41}, False),  # almost alike, and yet another input
        ({1: -4.40, 2: -4.42, 3: -4.44}, {1: -4.4001, 3: -4.4399, 2: -4.42}, True),
        ({1: -4.40, 2: -4.42, 3: -4.44}, {1: -4.40, 5: -4.42, 6: -4.44}, False),
    ],
)
def test_embeddings_must_be_answered_as_the_tokens_they_stand_for(own, ours, same):
    said = ([Token(next(iter(top)), top=tuple(top.items()))] for top in (own, ours))
    assert agree(*said) is same
    assert not agree([], [])
