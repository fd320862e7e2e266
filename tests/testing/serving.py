"""A server in this process, on the embedded base."""

import asyncio
import threading
import time
from contextlib import contextmanager
from itertools import islice

import torch

from ptmoe.methods import METHODS
from ptmoe.models.bases import load_base
from ptmoe.models.greedy import GREEDY
from ptmoe.serve.engine import EngineError, Token
from ptmoe.serve.start import local_service
from testing.bases import prompted

ADAPTERS = {
    "routed": METHODS["pt-moe"](num_virtual_tokens=6, num_experts=3, rank=4, recipe="paper"),
    "fixed": METHODS["pt"](num_virtual_tokens=5),
}


def save(folder):
    """A base that talks on and on, in `folder/base`, drawn adapters in `folder/adapters`; the model with them all."""
    base, tokenizer = load_base("nano")
    tokenizer.eos_token = base.config.eos_token_id = base.generation_config.eos_token_id = None
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model, tokenizer = load_base(str(folder / "base"))
    for index, (name, config) in enumerate(ADAPTERS.items()):
        model = prompted(model, config, seed=index, name=name)
        model.save_pretrained(folder / "adapters" / name, name)
    model.folder = folder
    return model.eval()


class Paced:
    """An engine that says these tokens at a pace. Rows of five virtual tokens may have a fault.

    Attributes:
        open: rows that it is answering.
        ended: rows that it has answered to the end.
    """

    name, positions = "paced", None

    def __init__(self, ids, pause=0.0, fault=None):
        self.ids, self.pause, self.fault = ids, pause, fault
        self.open = self.ended = 0

    async def start(self): ...

    async def stop(self): ...

    async def health(self):
        return {"ok": True}

    async def generate(self, row, sampling):
        self.open += 1
        try:
            for index, token in enumerate(islice(self.ids, sampling.max_tokens)):
                await asyncio.sleep(self.pause)
                if self.fault and row.virtual == 5 and index == 3:
                    raise EngineError(self.fault)
                yield Token(token)
            self.ended += 1
        finally:
            self.open -= 1


def service_of(model, **options):
    return local_service(model.folder / "adapters", model=str(model.folder / "base"), device="cpu", **options)


def alone(model, service, name, prompt, new):
    """What `generate` says to a prompt by itself."""
    ids = torch.tensor([service._encode(prompt, None)], device=model.device)
    made = model.generate(ids, adapter_names=[name], max_new_tokens=new, **GREEDY)
    return service._decode(made[0, ids.shape[1] :].tolist())


@contextmanager
def listening(app):
    """The address of an application while it runs."""
    import uvicorn

    from ptmoe.serve.start import bind, configured

    server, bound = uvicorn.Server(configured(app)), bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


def running(service, **options):
    """The address of a server while it runs."""
    from ptmoe.serve.app import create_app

    return listening(create_app(service, **options))


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
