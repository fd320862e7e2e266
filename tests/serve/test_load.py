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

from ptmoe.models.adapter_set import BASE
from testing.serving import alone, save, service_of

CLIENTS = 64
NEW = 24
PROMPTS = [f"the {word} of the harbor is" for word in ("baker", "king", "old ship", "wall", "very last of the guards")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters, and `answers.json`: what each says to each prompt alone."""
    model = save(tmp_path_factory.mktemp("load"))
    service = service_of(model)
    answers = {
        f"{name}\n{prompt}": alone(model, service, BASE if name == "base" else name, prompt, NEW)
        for name in ("routed", "fixed", "base")
        for prompt in PROMPTS
    }
    assert len({*answers.values()}) > len(PROMPTS)
    (model.folder / "answers.json").write_text(json.dumps(answers))
    return model.folder


def started(folder):
    """The command in a process of its own, and its address."""
    command = [sys.executable, "-m", "ptmoe", "serve", folder / "adapters", "--model", folder / "base"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment
    )
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
            asked = f"{name}-copy" if name != "base" and chance.random() < 0.2 else name
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


@pytest.mark.ci
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
        while counts["right"] <= 5 * seconds:  # on a busy machine it takes longer
            await asyncio.sleep(0.1)
        stop.set()
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*clients)
        mover.cancel()

    try:
        asyncio.run(asyncio.wait_for(everyone(), seconds + 120))
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
    assert counts["left"]
