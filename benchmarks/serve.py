"""Measure `ptmoe serve` beside what it is compared with, and write RESULTS.md's part on serving.

    python -m benchmarks.serve --vllm vllm/bin/python      # everything
    python -m benchmarks.serve http cold --rounds 5        # two parts

The servers of a measurement are started first, each gets a load that does not count, and then they are measured in
turns, A B A B …, while the others wait. Requests are token ids at random, new ones in every round; all answers have the
same length, as the base that is served has no end token. `--vllm` is the Python of an environment that holds vLLM and
what docs/serving.md adds to it; without it the measurements on vLLM are left out. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.interleave import ROOT
from benchmarks.serving import RESULTS, Goal, Measurement, Rounds

if TYPE_CHECKING:
    from ptmoe.serve.service import Service

PROMPT, NEW = 24, 32  # tokens of a request and of its answer
VIRTUAL, EXPERTS, RANK = 40, 2, 36  # the paper's
ADAPTERS, CLIENTS = 1_000, 32
ENGINES = ("local", "vllm", "gateway")
PAPER_HIDDEN, PAPER_ADAPTERS = 2_048, 10_000
PATIENCE = 600.0  # seconds until a server answers
POSITIONS = 1_024  # of a row in vLLM


@dataclass
class Server:
    """A process that answers OpenAI's API, `seconds` after its start for the first time."""

    url: str
    model: str
    process: subprocess.Popen[str]
    seconds: float


@dataclass
class Bench:
    """What is served, and how often it is measured.

    Attributes:
        base: the folder of a base without an end token.
        adapters: the folder of adapters on it.
        size: bytes of one.
        vocabulary: of the base.
        vllm: the Python that has vLLM.
        requests: of a load.
        only: the engines that are measured.
    """

    base: Path
    adapters: Path
    size: int
    vocabulary: int
    rounds: int
    vllm: str | None
    requests: int
    only: Sequence[str]
    drawn: random.Random = field(default_factory=lambda: random.Random(0))

    def engines(self, stack: ExitStack, *names: str) -> Iterator[tuple[str, Server]]:
        """`ptmoe serve` on these engines, one after the other, as far as there is a vLLM."""
        for name in filter(self.only.__contains__, names):
            if name == "local":
                yield name, stack.enter_context(self.served("local", "--device", "cpu"))
            elif self.vllm and name == "vllm":
                yield name, stack.enter_context(self.in_process())
            elif self.vllm:
                upstream = stack.enter_context(self.stock("--enable-prompt-embeds"))
                yield name, stack.enter_context(self.served(upstream.url))
            stack.close()

    @contextmanager
    def served(self, engine: str, *options: str, python: str = sys.executable) -> Iterator[Server]:
        """`ptmoe serve` on all adapters, once they are in memory."""
        command = [python, "-m", "ptmoe", "serve", str(self.adapters), "--model", str(self.base), "--engine", engine]
        with started([*command, "--no-playground", *options], self.base.name) as server:
            if "--adapter-memory" not in options:
                wait_until_read(server, self.size * ADAPTERS)
            yield server

    @contextmanager
    def in_process(self) -> Iterator[Server]:
        """The same with vLLM in its process."""
        options = ["--engine-option", "enforce_eager=true", "--engine-option", f"max_model_len={POSITIONS}"]
        options += ["--dtype", "float32", "--max-batch", str(CLIENTS)]
        with self.served("vllm", *options, python=str(self.vllm)) as server:
            yield server

    @contextmanager
    def stock(self, *options: str) -> Iterator[Server]:
        """vLLM's own server on the base alone."""
        command = [str(self.vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.base)]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(POSITIONS)]
        with started([*command, "--max-num-seqs", str(CLIENTS), *options], str(self.base)) as server:
            yield server

    def prompts(self, count: int, length: int = PROMPT) -> list[list[int]]:
        return [[self.drawn.randrange(10, self.vocabulary) for _ in range(length)] for _ in range(count)]

    def names(self, popularity: str) -> list[str]:
        """The adapters of a load: `"one"`, `"uniform"`, or `"zipf"`, by 1 / rank."""
        weights = {
            "one": [1.0, *[0.0] * (ADAPTERS - 1)],
            "uniform": [1.0] * ADAPTERS,
            "zipf": [1 / (rank + 1) for rank in range(ADAPTERS)],
        }[popularity]
        return [adapter(index) for index in self.drawn.choices(range(ADAPTERS), weights, k=self.requests)]

    def rate(self, server: Server, popularity: str) -> float:
        """New tokens a second."""
        return self.requests * NEW / load(server, self.names(popularity), self.prompts(self.requests))

    def plain_rate(self, server: Server) -> float:
        """The same of texts that are as long as requests with their virtual tokens."""
        prompts = self.prompts(self.requests, VIRTUAL + PROMPT)
        return self.requests * NEW / load(server, [server.model] * self.requests, prompts)


def adapter(index: int) -> str:
    return f"adapter{index:05}"


# -- what is measured --------------------------------------------------------------------------------------------------


def http(bench: Bench) -> Iterator[Measurement]:
    """What HTTP adds: an engine that answers at once, asked over a connection and in its process."""
    import torch
    import uvicorn

    from ptmoe.models.adapter_set import AdapterSet
    from ptmoe.models.bases import load_tokenizer
    from ptmoe.serve.engine import Input, Sampling, Token
    from ptmoe.serve.limits import Limits
    from ptmoe.serve.matrix import read_embedding
    from ptmoe.serve.metrics import Metrics
    from ptmoe.serve.registry import Registry
    from ptmoe.serve.service import Service

    class AtOnce:
        name, positions = "at once", None

        async def start(self) -> None: ...

        async def stop(self) -> None: ...

        async def health(self) -> dict[str, Any]:
            return {"ok": True}

        async def generate(self, row: Input, sampling: Sampling) -> AsyncIterator[Token]:
            for token in range(100, 100 + sampling.max_tokens):
                yield Token(token)

    registry = Registry(AdapterSet(read_embedding(str(bench.base))), bench.adapters, base=bench.base.name)
    registry.fill()  # which the server would do meanwhile
    tokenizer, _ = load_tokenizer(str(bench.base))
    torch.set_num_threads(1)  # as a gateway does, which takes little time as well
    service = Service(registry, AtOnce(), tokenizer, frozenset(), Limits(), Metrics(registry))  # type: ignore[arg-type]
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:  # the loop of `ptmoe serve`
        rounds = runner.run(_http_rounds(service, bench))
    goal = Goal("over HTTP", "more by at most", 3.0, "in the process")
    what = (
        f"HTTP: a request and its answer of {NEW} tokens from an engine that takes no time, median of {bench.requests}"
    )
    yield Measurement("http", what, "ms", rounds, [goal])


async def _http_rounds(service: Service, bench: Bench) -> Rounds:
    import uvicorn

    from ptmoe.serve.app import create_app
    from ptmoe.serve.engine import Sampling
    from ptmoe.serve.start import bind, configured

    config = configured(create_app(service), port=0)
    server, listening = uvicorn.Server(config), bind(config)
    serving = asyncio.create_task(server.serve([listening]))
    port = str(listening.getsockname()[1])
    rounds: Rounds = {"in the process": [], "over HTTP": []}
    # The client has a process of its own, or its work would count as the server's.
    pipe = asyncio.subprocess.PIPE
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", _CLIENT, port, stdin=pipe, stdout=pipe)
    assert client.stdin is not None
    assert client.stdout is not None
    for number in range(bench.rounds + 1):
        took = []
        for prompt in bench.prompts(bench.requests):
            begun = time.perf_counter()
            run = await service.run(adapter(0), [prompt], Sampling(0), max_tokens=NEW)
            async for _ in run.pieces():
                pass
            took.append(1_000 * (time.perf_counter() - begun))
        bodies = [body(adapter(0), prompt, NEW) for prompt in bench.prompts(bench.requests)]
        client.stdin.write((json.dumps(bodies) + "\n").encode())
        await client.stdin.drain()
        over = float(await client.stdout.readline())
        if number:
            rounds["in the process"].append(median(took))
            rounds["over HTTP"].append(over)
            print(f"  in the process: {median(took):.3g}, over HTTP: {over:.3g}", flush=True)
    client.stdin.close()
    await client.wait()
    server.should_exit = True
    await serving
    return rounds


# The standard library's client, which takes 0.2 ms of its own for a request: httpx would take 0.8.
_CLIENT = """
import http.client, json, socket, statistics, sys, time
client = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
client.connect()
client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while line := sys.stdin.readline():
    took = []
    for body in json.loads(line):
        begun = time.perf_counter()
        client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = client.getresponse()
        said = json.loads(answer.read())
        took.append(1000 * (time.perf_counter() - begun))
        assert answer.status == 200, said
    print(statistics.median(took), flush=True)
"""


def cold(bench: Bench) -> Iterator[Measurement]:
    """The first token of an adapter that has to be read, against that of one in memory."""
    requests, turn = 60, iter(range(1, 10**9))

    def first(server: Server, *, reads: bool) -> float:
        took = []
        with httpx.Client(timeout=60) as client:
            for prompt in bench.prompts(requests):
                asked = body(adapter(next(turn) % ADAPTERS if reads else 0), prompt, 1)
                begun = time.perf_counter()
                client.post(f"{server.url}/v1/completions", json=asked).raise_for_status()
                took.append(1_000 * (time.perf_counter() - begun))
        return median(took)

    with bench.served("local", "--device", "cpu", "--adapter-memory", "1") as server:
        systems = {"in memory": partial(first, server, reads=False), "read first": partial(first, server, reads=True)}
        rounds = in_turns(bench.rounds, systems)
    what = f"the first token at `local`, median of {requests}"
    yield Measurement("cold", what, "ms", rounds, [Goal("read first", "more by at most", 20.0, "in memory")])


def memory(bench: Bench) -> Iterator[Measurement]:
    """What 10,000 adapters of the paper's size take in a registry."""
    rounds: Rounds = {"memory": [], "bytes of the adapters": []}
    for _ in range(bench.rounds):
        command = [sys.executable, "-c", "from benchmarks.serve import memory_inside; memory_inside()"]
        told = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        for name, value in zip(rounds, json.loads(told), strict=True):
            rounds[name].append(value / 1e6)
            print(f"  {name}: {value / 1e6:,.0f}", flush=True)
    what = f"{PAPER_ADAPTERS:,} adapters at hidden {PAPER_HIDDEN:,} in a registry"
    yield Measurement("memory", what, "MB", rounds, [Goal("memory", "at most", 1.1, "bytes of the adapters")])


def memory_inside() -> None:
    """Print what a registry grows by, and the adapters' bytes; in a process of its own."""
    import torch

    from ptmoe.adapters.folder import save_adapter
    from ptmoe.adapters.identity import BaseIdentity
    from ptmoe.models.adapter_set import AdapterSet
    from ptmoe.serve.registry import Registry

    embedding = torch.nn.Embedding(64, PAPER_HIDDEN)
    with tempfile.TemporaryDirectory() as folder:
        encoder = pt_moe().build(PAPER_HIDDEN)
        draw(encoder, seed=0)
        save_adapter(encoder, BaseIdentity.of(embedding.weight, "drawn"), Path(folder, "made"))
        for index in range(PAPER_ADAPTERS):
            target = Path(folder, "adapters", adapter(index))
            target.mkdir(parents=True)
            for file in Path(folder, "made").iterdir():
                os.link(file, target / file.name)
        registry = Registry(AdapterSet(embedding), Path(folder, "adapters"), base="drawn")
        registry.add(adapter(0))
        before = resident(os.getpid()), registry.bytes_in_memory
        registry.fill()
        print([resident(os.getpid()) - before[0], registry.bytes_in_memory - before[1]])


def gateway(bench: Bench) -> Iterator[Measurement]:
    """A gateway's start, and its memory."""
    if not bench.vllm:
        return
    seconds, taken = [], []
    with bench.stock("--enable-prompt-embeds") as upstream:
        for _ in range(bench.rounds):
            with bench.served(upstream.url) as server:
                load(server, bench.names("uniform"), bench.prompts(bench.requests), new=4)
                assert "/vllm/" not in Path(f"/proc/{server.process.pid}/maps").read_text()
                held = resident(server.process.pid, without=".safetensors") - bench.size * ADAPTERS
            seconds.append(server.seconds)
            taken.append(held / 1e6)
            print(f"  {seconds[-1]:.2f} s, {taken[-1]:.0f} MB", flush=True)
    rounds = {"start to the first answer, s": seconds, "memory beyond the matrix and the adapters, MB": taken}
    goals = [Goal(name, "at most", bound) for name, bound in zip(rounds, (5.0, 300.0), strict=True)]
    yield Measurement("gateway", f"a gateway with {ADAPTERS:,} adapters", "", rounds, goals)


def plain(bench: Bench) -> Iterator[Measurement]:
    """Adapters on vLLM against texts of the same length on vLLM's own server."""
    if not bench.vllm:
        return
    with ExitStack() as stack:
        off = stack.enter_context(bench.stock())
        on = stack.enter_context(bench.stock("--enable-prompt-embeds"))
        inside = stack.enter_context(bench.in_process())
        front = stack.enter_context(bench.served(on.url))
        texts = {"vLLM, texts, flag off": off, "vLLM, texts, flag on": on}
        ours = {"ptmoe, `vllm`": inside, "ptmoe, gateway": front}
        systems: dict[str, Callable[[], float]] = {
            **{name: partial(bench.plain_rate, server) for name, server in texts.items()},
            **{name: partial(bench.rate, server, "uniform") for name, server in ours.items()},
        }
        rounds = in_turns(bench.rounds, systems)
    goals = [Goal("ptmoe, `vllm`", "at least", bound, name) for name, bound in zip(texts, (0.90, 0.95), strict=True)]
    what = f"{PROMPT} tokens behind {VIRTUAL} virtual ones against texts of {PROMPT + VIRTUAL}"
    yield Measurement("plain", what, "tokens/s", rounds, goals)


def adapters(bench: Bench) -> Iterator[Measurement]:
    """1,000 adapters against one."""
    for engine, server in bench.engines(ExitStack(), *ENGINES):
        systems = {name: partial(bench.rate, server, name) for name in ("one", "uniform", "zipf")}
        rounds = in_turns(bench.rounds, systems)
        goals = [Goal(name, "at least", 0.97, "one") for name in ("uniform", "zipf")]
        yield Measurement("adapters", f"`{engine}`: {ADAPTERS:,} adapters against one", "tokens/s", rounds, goals)


def batching(bench: Bench) -> Iterator[Measurement]:
    """Clients at a server against one `generate` after the other."""
    import torch

    from ptmoe.models.attach import load_adapter
    from ptmoe.models.bases import load_base

    model = load_adapter(load_base(str(bench.base))[0], bench.adapters / adapter(0)).eval()

    def one_by_one() -> float:
        prompts = bench.prompts(8)
        begun = time.perf_counter()
        for prompt in prompts:
            made = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
            assert made.shape[1] == PROMPT + NEW
        return len(prompts) * NEW / (time.perf_counter() - begun)

    for engine, server in bench.engines(ExitStack(), "local", "vllm"):
        ours = f"{CLIENTS} clients"
        systems = {ours: partial(bench.rate, server, "uniform"), "`model.generate`": one_by_one}
        rounds = in_turns(bench.rounds, systems)
        goal = Goal(ours, "at least", {"local": 3.0, "vllm": 6.0}[engine], "`model.generate`")
        what = f"`{engine}` at {CLIENTS} clients against one `generate` at a time"
        yield Measurement("batching", what, "tokens/s", rounds, [goal])


PARTS = {part.__name__: part for part in (http, cold, memory, gateway, plain, adapters, batching)}


# -- how it is measured ------------------------------------------------------------------------------------------------


@contextmanager
def started(command: Sequence[str], model: str) -> Iterator[Server]:
    """A server on a free port, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, text=True, env=environment)
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                try:
                    first = httpx.post(f"{url}/v1/completions", json=body(model, [11, 12], 1), timeout=PATIENCE)
                    first.raise_for_status()
                    break
                except httpx.HTTPError as error:
                    if process.poll() is not None or time.perf_counter() - begun > PATIENCE:
                        log.seek(0)
                        raise SystemExit(f"{' '.join(command)}\n{log.read()[-3_000:]}\n{error}") from None
                    time.sleep(0.02)
            yield Server(url, model, process, time.perf_counter() - begun)
        finally:
            process.terminate()
            process.wait(60)


def wait_until_read(server: Server, size: int) -> None:
    """Until adapters of so many bytes are in memory, as the server's metrics say."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < PATIENCE:
        told = httpx.get(f"{server.url}/metrics", timeout=60).text
        found = re.search(r"^ptmoe_adapter_bytes (\S+)", told, re.MULTILINE)
        if found and float(found[1]) >= size:
            return
        time.sleep(0.5)
    raise SystemExit(f"the adapters were not read within {PATIENCE:g} s")


def body(model: str, prompt: list[int], new: int) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0}


def load(server: Server, names: Sequence[str], prompts: Sequence[list[int]], new: int = NEW) -> float:
    """Seconds that `CLIENTS` clients need for these requests together."""

    async def everyone() -> float:
        async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=CLIENTS)) as client:
            waiting = iter([body(name, prompt, new) for name, prompt in zip(names, prompts, strict=True)])

            async def ask() -> None:
                for asked in waiting:
                    answer = (await client.post(f"{server.url}/v1/completions", json=asked)).raise_for_status()
                    assert answer.json()["usage"]["completion_tokens"] == new, answer.text

            begun = time.perf_counter()
            await asyncio.gather(*(ask() for _ in range(CLIENTS)))
            return time.perf_counter() - begun

    return asyncio.run(everyone())


def in_turns(count: int, systems: dict[str, Callable[[], float]]) -> Rounds:
    """Each system's figure in each round, after a round that does not count."""
    rounds: Rounds = {name: [] for name in systems}
    for number in range(count + 1):
        for name, measured in systems.items():
            figure = measured()
            if number:
                rounds[name].append(figure)
                print(f"  {name}: {figure:.4g}", flush=True)
    return rounds


def resident(process: int, without: str | None = None) -> int:
    """Bytes that a process holds in memory, but for the pages of files whose names end so."""
    total, name = 0, ""
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) > 5 else ""
        elif line.startswith("Rss:") and not (without and name.endswith(without)):
            total += int(line.split()[1]) * 1_024
    return total


# -- what is served ----------------------------------------------------------------------------------------------------


def pt_moe() -> Any:
    from ptmoe.methods import METHODS

    return METHODS["pt-moe"](num_virtual_tokens=VIRTUAL, num_experts=EXPERTS, rank=RANK)


def draw(encoder: Any, seed: int) -> None:
    import torch

    random_numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.1, generator=random_numbers)


def prepare(model: str, folder: Path, **options: Any) -> Bench:
    """Write what is served."""
    from ptmoe.models.attach import attach
    from ptmoe.models.bases import load_base, quiet

    quiet()
    base, tokenizer = load_base(model, dtype="float32")
    tokenizer.eos_token = base.config.eos_token_id = base.generation_config.eos_token_id = None
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base.name_or_path = base.config.name_or_path = str(folder / "base")
    prompted = attach(base, pt_moe())
    encoder = prompted.adapters[prompted.active_adapter]
    for index in range(ADAPTERS):
        draw(encoder, index)
        prompted.save_pretrained(folder / "adapters" / adapter(index))
    size = sum(tensor.numel() * tensor.element_size() for tensor in encoder.tensors().values())
    vocabulary = base.get_input_embeddings().weight.shape[0]
    return Bench(folder / "base", folder / "adapters", size, vocabulary, **options)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--model", default="smollm2", help="the base")
    parser.add_argument("--vllm", help="the Python of an environment that holds vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96, help="of a load")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=ENGINES, help="by default each")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    described = [sys.executable, "-m", "benchmarks.machine"]
    machine = json.loads(subprocess.run(described, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    hardware = machine["hardware"]
    about = {
        "on": f"{chosen.model}, {hardware['accelerator'] or hardware['processor']}, {hardware['cores']} cores",
        "date": date.today().isoformat(),
        "commit": machine["commit"],
        "command": " ".join(
            ["python -m benchmarks.serve", *("PYTHON" if word == chosen.vllm else word for word in sys.argv[1:])]
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        options = {"vllm": chosen.vllm, "requests": chosen.requests, "only": chosen.engine}
        bench = prepare(chosen.model, Path(folder), rounds=chosen.rounds, **options)
        for part in chosen.parts or PARTS:
            print(part, flush=True)
            for measurement in PARTS[part](bench):
                with RESULTS.open("a") as opened:
                    opened.write(json.dumps(measurement.line() | about) + "\n")
    subprocess.run([sys.executable, "-m", "benchmarks", "--render"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
