"""Many clients, some of whom leave, while adapters come and go: every finished answer is right."""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest
import torch

from ptmoe.models.adapter_set import BASE
from ptmoe.models.greedy import GREEDY
from testing.serving import save_adapters, service_of

CLIENTS = 64
NEW = 24
PROMPTS = [f"the {word} of the harbor is" for word in ("baker", "king", "old ship", "wall", "very last of the guards")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters, and `answers.json`: what each says to each prompt alone."""
    folder = tmp_path_factory.mktemp("load")
    model = save_adapters(folder / "adapters")
    service, answers = service_of(folder / "adapters"), {}
    for name in ("routed", "fixed", BASE):
        for prompt in PROMPTS:
            ids = torch.tensor([service._encode(prompt, None)])
            options = {"max_new_tokens": NEW, "eos_token_id": sorted(service.ends), **GREEDY}
            made = model.generate(ids, adapter_names=[name], **options)
            answers[f"{service.registry.base if name == BASE else name}\n{prompt}"] = service._decode(
                made[0, ids.shape[1] :].tolist()
            )
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder


def started(folder):
    """The command in a process of its own, and its address."""
    command = [sys.executable, "-m", "ptmoe", "serve", folder / "adapters", "--model", "nano", "--device", "cpu"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment)
    address = process.stdout.readline().split()[-1]
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            httpx.get(f"{address}/health").raise_for_status()
            return process, address
        except httpx.HTTPError:
            time.sleep(0.05)
    raise AssertionError("the server did not start")


async def client(number, address, answers, stop, counts, begun):
    """Ask until told to stop; leave in the middle now and then."""
    chance = random.Random(number)
    async with httpx.AsyncClient(timeout=120) as http:
        while not stop.is_set():
            name, prompt = chance.choice(list(answers)).split("\n")
            asked = f"{name}-copy" if name != "nano" and chance.random() < 0.2 else name
            body = {"model": asked, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True}
            leaves, text, whole = chance.random() < 0.2, "", False
            mark = (number, chance.random())
            try:
                async with http.stream("POST", f"{address}/v1/completions", json=body) as got:
                    if got.status_code != 200:
                        assert got.status_code in (404, 429), await got.aread()
                        assert got.status_code == 429 or asked != name
                        counts["refused"] += 1
                        await asyncio.sleep(0.05)
                        continue
                    begun.add(mark)
                    async for line in got.aiter_lines():
                        if line == "data: [DONE]":
                            whole = True
                        elif line.startswith("data: "):
                            event = json.loads(line.removeprefix("data: "))
                            assert "error" not in event, event
                            text += event["choices"][0]["text"]
                        if leaves and len(text) > 5:
                            break
            except httpx.TransportError:
                assert stop.is_set()  # not accepted any more
                assert mark not in begun
                return
            if leaves and not whole:
                counts["left"] += 1
                continue
            assert whole
            assert text == answers[f"{name}\n{prompt}"]
            counts["right"] += 1


async def come_and_go(folder, stop):
    while not stop.is_set():
        for name in ("routed", "fixed"):
            copy = folder / "adapters" / f"{name}-copy"
            shutil.rmtree(copy) if copy.exists() else shutil.copytree(folder / "adapters" / name, copy)
            await asyncio.sleep(3)


@pytest.mark.parametrize("seconds", [4, pytest.param(300, marks=pytest.mark.slow)])
def test_no_answer_is_lost_wrong_or_for_another_client(folder, seconds):
    answers = json.loads((folder / "answers.json").read_text())
    process, address = started(folder)
    counts, begun = {"right": 0, "left": 0, "refused": 0}, set()

    async def everyone():
        stop = asyncio.Event()
        clients = [
            asyncio.create_task(client(number, address, answers, stop, counts, begun)) for number in range(CLIENTS)
        ]
        mover = asyncio.create_task(come_and_go(folder, stop))
        await asyncio.sleep(seconds)
        stop.set()
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*clients)
        mover.cancel()

    try:
        asyncio.run(asyncio.wait_for(everyone(), seconds + 120))
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
    assert counts["right"] > CLIENTS
    assert counts["left"]
