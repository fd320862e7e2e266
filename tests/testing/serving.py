"""A server in this process, on the embedded base."""

import threading
import time
from contextlib import contextmanager

from ptmoe.methods import METHODS
from ptmoe.models.bases import load_base
from ptmoe.serve.start import local_service
from testing.bases import prompted

ADAPTERS = {
    "routed": METHODS["pt-moe"](num_virtual_tokens=6, num_experts=3, rank=4, recipe="paper"),
    "fixed": METHODS["pt"](num_virtual_tokens=5),
}


def save_adapters(folder, adapters=ADAPTERS, seed=1):
    """Adapter folders with every number drawn; returns the model that holds the last one."""
    base, _ = load_base("nano")
    model = base
    for index, (name, config) in enumerate(adapters.items()):
        model = prompted(model, config, seed=seed + index, name=name)
        model.save_pretrained(folder / name, name)
    return model.eval()


def service_of(folder, **options):
    return local_service(folder, model="nano", device="cpu", **options)


@contextmanager
def listening(app):
    """The address of an application while it runs."""
    import uvicorn

    config = uvicorn.Config(app, port=0, log_level="error", access_log=False)
    server, socket = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        socket.close()
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
