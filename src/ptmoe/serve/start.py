"""From the options of `ptmoe serve` to a service."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ptmoe.adapters.folder import local_folder, read_config_file
from ptmoe.errors import PtmoeError
from ptmoe.files import check_adapters
from ptmoe.models.adapter_set import AdapterSet
from ptmoe.models.bases import load_base, load_config, load_tokenizer, locate
from ptmoe.serve.engine import Engine
from ptmoe.serve.limits import Limits
from ptmoe.serve.metrics import Metrics
from ptmoe.serve.registry import Registry, hidden
from ptmoe.serve.service import Service

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

KEEP_ALIVE = 75  # seconds

log = logging.getLogger(__name__)


def base_of(adapters: Path | None, model: str | None, revision: str | None) -> tuple[str, str | None]:
    """The base that was given, and its revision; else those that the first adapter in a folder, or the only one, names.

    Raises:
        PtmoeError: none names one, or there is no such folder.
    """
    check_adapters(adapters)
    if model is not None:
        return model, revision
    if adapters is None:
        raise PtmoeError("nothing to serve: give a folder of adapters, or --model for the base alone")
    for path in (adapters, *sorted(path for path in adapters.iterdir() if path.is_dir() and not hidden(path))):
        try:
            written = read_config_file(local_folder(path))
        except (PtmoeError, OSError):
            continue
        if isinstance(name := written.get("base_model_name_or_path"), str) and name:
            return name, revision or written.get("revision")
    raise PtmoeError(f"no adapter in {adapters} names its base: give --model")


def public_name(model: str) -> str:
    """What clients call the base: of a folder its name, as its path is not their business."""
    return Path(model).resolve().name if Path(model).exists() else model


def local_service(
    adapters: Path | None,
    *,
    model: str | None = None,
    revision: str | None = None,
    memory: int | None = None,
    limits: Limits | None = None,
    **options: Any,
) -> Service:
    """A service on the `local` engine.

    Args:
        adapters: a folder of adapters, or one adapter or run folder; None serves the base alone.
        model: the base; by default the one that the first adapter names.
        revision: of the base.
        memory: bytes of adapters in memory at most.
        limits: of requests.
        **options: of `load_base`.

    Raises:
        PtmoeError: no such folder or base, or a base that cannot be batched.
    """
    from ptmoe.evaluate.generation import end_tokens
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.serve.local import LocalEngine

    limits = limits or Limits()
    model, revision = base_of(adapters, model, revision)
    base, tokenizer = load_base(model, revision=revision, **options)
    prompted = PromptedCausalLM(base.eval()).eval()
    engine = LocalEngine(prompted, max_batch=limits.max_batch)
    registry = Registry(prompted.adapters, adapters, base=public_name(model), memory=memory)
    metrics = Metrics(registry)
    engine.on_step = metrics.batch.observe
    return Service(registry, engine, tokenizer, frozenset(end_tokens(prompted, tokenizer)), limits, metrics)


def gateway_service(adapters: Path | None, urls: Sequence[str], *, api_key: str | None = None, **ours: Any) -> Service:
    """A service in front of inference engines; of the base only the embedding matrix is read.

    Args:
        adapters: as of `local_service`.
        urls, api_key: of the engines.
        **ours: `model`, `revision`, `memory` and `limits`, as of `local_service`.

    Raises:
        PtmoeError: no such folder or base, or an engine that can be reached and does not serve it.
    """
    from ptmoe.serve.gateway import GatewayEngine

    torch.set_num_threads(1)  # a prompt is a small product: others would wait longer than they work, and busily

    def engine(base: Base) -> GatewayEngine:
        made = GatewayEngine(urls, base.embedding, positions=base.positions, api_key=api_key)
        for url, fault in asyncio.run(made.check()).items():
            log.warning("%s: %s; /health follows it", url, fault)
        return made

    return _service(adapters, engine, **ours)


def vllm_service(
    adapters: Path | None, *, dtype: str | None = None, options: Sequence[str] = (), **ours: Any
) -> Service:
    """A service on vLLM in this process; of the base this side reads the embedding matrix alone.

    Args:
        adapters: as of `local_service`.
        dtype: of the base; None is as its embedding matrix is saved.
        options: `KEY=VALUE`, vLLM's own.
        **ours: `model`, `revision`, `memory` and `limits`, as of `local_service`.

    Raises:
        PtmoeError: no such folder or base, no vLLM, or one that refuses an option or the base.
    """
    from ptmoe.serve.vllm_engine import VllmEngine, engine_arguments

    def engine(base: Base) -> VllmEngine:
        matrix = cast(Tensor, base.embedding.weight)
        arguments = engine_arguments(
            options,
            model=locate(base.name),
            revision=base.revision,
            dtype=dtype if dtype not in (None, "auto") else str(matrix.dtype).removeprefix("torch."),
            max_num_seqs=base.limits.max_batch,
        )
        return VllmEngine(arguments, base.embedding)

    service = _service(adapters, engine, **ours)
    cast(VllmEngine, service.engine).on_step = service.metrics.batch.observe
    return service


@dataclass(frozen=True)
class Base:
    """What is known of a base that runs elsewhere."""

    name: str  # as `load_base` takes it
    revision: str | None  # of a Hub repository
    embedding: nn.Module  # `(B, L)` ids to `(B, L, H)`
    positions: int | None  # how many its config gives it
    limits: Limits  # of requests to it


def _service(
    adapters: Path | None,
    engine: Callable[[Base], Engine],
    *,
    model: str | None = None,
    revision: str | None = None,
    memory: int | None = None,
    limits: Limits | None = None,
) -> Service:
    """A service on an engine that loads the base itself."""
    from transformers import GenerationConfig

    from ptmoe.serve.matrix import read_embedding

    limits = limits or Limits()
    model, revision = base_of(adapters, model, revision)
    tokenizer, positions = load_tokenizer(model, revision=revision)
    embedding = read_embedding(model, revision)
    try:
        generation = GenerationConfig.from_pretrained(locate(model), revision=revision)
    except OSError:  # not every base has one; `transformers` then makes it of the base's own config, as here
        generation = GenerationConfig.from_model_config(load_config(model, revision=revision))
    ends = generation.eos_token_id
    all_ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    made = engine(Base(model, revision, embedding, positions, limits))
    registry = Registry(AdapterSet(embedding), adapters, base=public_name(model), memory=memory)
    return Service(registry, made, tokenizer, frozenset(all_ends), limits, Metrics(registry))


def serve(service: Service, app: FastAPI, listening: socket.socket) -> None:
    """Serve until a signal comes, then finish what has been accepted; `listening` is from `bind`.

    Raises:
        PtmoeError: the engine cannot serve this base.
    """
    import uvicorn

    host, port = listening.getsockname()[:2]

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await service.start()  # here, because from the application's own start an error comes as a traceback
            _return_memory()
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection of an earlier server may be
            await super().startup(sockets)
            count = len(service.registry.names()) - 1
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(f"{service.registry.base} and {count:,} adapters at {address}", flush=True)

    config = configured(app, timeout_graceful_shutdown=int(service.limits.deadline) + 1)
    Server(config).run(sockets=[listening])


def configured(app: Any, **options: Any) -> uvicorn.Config:
    """How uvicorn serves here. A client's connection stays open for longer than clients keep it, where uvicorn's own 5
    seconds are httpx's as well: the server would close it just as it is used again."""
    import uvicorn

    return uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE, **options)


def bind(host: str, port: int) -> socket.socket:
    """The socket to serve from: the port is ours, and refuses connections, while a base is loaded.

    `asyncio` turns Nagle's algorithm off only where a socket's protocol is named, else each answer would wait 40 ms for
    the client to acknowledge its headers. Accepted connections inherit the option.

    Raises:
        PtmoeError: there is no such host here, or another program has the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        (_, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # nobody else's as long as it is ours
    except (OSError, UnicodeError) as error:  # the latter of what cannot be the name of a host
        reason = getattr(error, "strerror", None) or error
        raise PtmoeError(f"cannot listen on {host}, port {port}: {reason}: give another --host or --port") from None
    return listening


def _return_memory() -> None:
    """Give back to the system what starting up needed and the C library keeps: some 30 MB for a tokenizer."""
    with suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
