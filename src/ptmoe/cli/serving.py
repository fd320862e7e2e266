"""`ptmoe serve` and `chat`."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptmoe.cli.options import Adapter, AdapterBase, Device, given
from ptmoe.errors import PtmoeError
from ptmoe.files import check_adapters, printable

if TYPE_CHECKING:
    from ptmoe.serve.registry import Composed
    from ptmoe.serve.service import Service

DAY = 86_400.0  # seconds
Dtype = Annotated[str | None, typer.Option(help="of the base: float32, bfloat16, float16; by default as saved")]
Quantization = Annotated[str | None, typer.Option(help="of the base: 8bit or 4bit")]
Revision = Annotated[str | None, typer.Option(help="of the base on the Hub")]


def serve(
    context: typer.Context,
    adapters: Annotated[
        Path | None, typer.Argument(help="folder of adapter or run folders, or one of them; none serves the base alone")
    ] = None,
    model: Annotated[str | None, typer.Option(help="the base; by default the one that the first adapter names")] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="local, vllm (in this process), or URL,… of servers that run `vllm serve --enable-prompt-embeds`"
        ),
    ] = "local",
    engine_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="of vllm: tensor_parallel_size=2, max_model_len=4096, …; repeatable"),
    ] = None,
    engine_key: Annotated[
        str | None, typer.Option(help="API key of those servers", envvar="PTMOE_ENGINE_KEY", show_envvar=True)
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="a client's key; repeatable, in the variable separated by spaces",
            envvar="PTMOE_API_KEY",
            show_envvar=True,
        ),
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(help="opens /v1/adapters", envvar="PTMOE_ADMIN_KEY", show_envvar=True)
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="origin of a page that may call this server; repeatable")
    ] = None,
    adapter_memory: Annotated[
        int | None, typer.Option(min=1, help="MB of adapters in memory; the least recently used make room")
    ] = None,
    playground: Annotated[bool, typer.Option(help="a page at / to try adapters in a browser")] = True,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    revision: Revision = None,
) -> None:
    """Serve adapters on their base, with OpenAI's API."""
    check_adapters(adapters)  # before any package is asked for
    _require_extra()
    from ptmoe.models.bases import quiet
    from ptmoe.serve.limits import Limits

    limits = Limits(**context.obj)
    for variable in ("PTMOE_API_KEY", "PTMOE_ADMIN_KEY", "PTMOE_ENGINE_KEY"):
        if not os.environ.get(variable, "set").strip():  # which the command line reads as none
            raise PtmoeError(f"{variable} is set and empty: give it a long random key, or unset it")
    if any(not key.strip() for key in (*(api_key or ()), *(() if admin_key is None else (admin_key,)))):
        raise PtmoeError("an API key is empty: it would let everyone in; give a long random one, or leave it out")
    for origin in cors_origin or ():  # which is compared with what browsers send, letter by letter
        if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\sA-Z/?#]+", origin):
            raise PtmoeError(f"--cors-origin {origin!r}: needs https://HOST or https://HOST:PORT, in small letters")
    quiet()
    from ptmoe.serve.app import create_app
    from ptmoe.serve.start import bind, gateway_service, local_service, vllm_service
    from ptmoe.serve.start import serve as serve_on

    memory = None if adapter_memory is None else adapter_memory * 10**6
    ours: dict[str, Any] = {"model": model, "memory": memory, "limits": limits, "revision": revision}
    of_base = given(device=device, dtype=dtype, quantization=quantization)
    if engine_option and engine != "vllm":
        raise PtmoeError("--engine-option is for --engine vllm")
    listening = bind(host, port)
    if engine == "local":
        service = local_service(adapters, **ours, **{"device": None, **of_base})
    elif engine == "vllm":
        if refused := of_base.keys() - {"dtype"}:
            raise PtmoeError(
                f"--{', --'.join(sorted(refused))}: vLLM has its own ways: CUDA_VISIBLE_DEVICES chooses the GPU, "
                "--engine-option quantization=… what it does with the weights"
            )
        service = vllm_service(adapters, options=engine_option or (), **of_base, **ours)
    elif engine.startswith(("http://", "https://")):
        if of_base:
            raise PtmoeError(
                f"--{', --'.join(of_base)}: the base runs in the engine; these are options of `vllm serve`"
            )
        service = gateway_service(adapters, engine.split(","), api_key=engine_key, **ours)
    else:
        raise PtmoeError(f"unknown engine {engine!r}: needs 'local', 'vllm', or http://HOST:PORT of a vLLM server")
    app = create_app(
        service,
        api_keys=api_key or (),
        admin_key=admin_key,
        origins=cors_origin or (),
        with_playground=playground,
    )
    serve_on(service, app, listening)


def chat(
    adapter: Adapter,
    model: AdapterBase = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    revision: Revision = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy")] = 0.0,
) -> None:
    """Talk to an adapter: a line is a message, and each answer is followed by the expert that it was given.

    An adapter that was trained on plain prompts gets each line by itself. An empty line ends.
    """
    check_adapters(adapter)
    _require_extra()
    from ptmoe.models.bases import quiet

    quiet()
    from ptmoe.serve.limits import Limits
    from ptmoe.serve.start import local_service

    # A server's own limits are not for somebody who watches the answer: a slow one would end the conversation.
    limits = Limits(max_tokens=max_new_tokens, deadline=DAY)
    options = given(dtype=dtype, quantization=quantization, revision=revision)
    service = local_service(adapter, model=model, device=device, limits=limits, **options)
    _talk(service, adapter.resolve().name, max_new_tokens, temperature)


def _talk(service: Service, name: str, max_new_tokens: int, temperature: float) -> None:
    from ptmoe.serve.engine import EngineError

    messages: list[dict[str, str]] = []
    adapter = service.registry.ready(name)
    if adapter is None:
        raise PtmoeError(f"{name!r} is the name of the base as well, which would answer: rename the adapter's folder")
    keeps = service.tokenizer.chat_template and adapter.chat is not False
    while line := _line():  # outside of the event loop, in which Ctrl+C would wait for the line
        messages = [*(messages if keeps else []), {"role": "user", "content": line}]
        try:
            said, row = asyncio.run(_answer(service, name, messages, max_new_tokens, temperature))
        except (PtmoeError, EngineError) as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            messages.pop()
            if messages and isinstance(error, PtmoeError):  # they leave no room, and never would
                messages = []
                print("the conversation starts again", file=sys.stderr)
            continue
        print(flush=True)
        messages.append({"role": "assistant", "content": said})
        if row.gate is not None:
            shown = ", ".join(f"{value:.3f}" for value in row.gate)
            print(f"expert {row.expert}, gate [{shown}]", file=sys.stderr, flush=True)


async def _answer(
    service: Service, name: str, messages: list[dict[str, str]], max_new_tokens: int, temperature: float
) -> tuple[str, Composed]:
    """Print an answer as it comes; the whole of it, and the row that it was given to."""
    from ptmoe.serve.engine import Sampling

    said = ""
    await service.engine.start()
    try:
        run = await service.run(name, [messages], Sampling(0, temperature), max_tokens=max_new_tokens)
        async for _, piece in run.pieces():
            said += piece.text
            print(printable(piece.text), end="", flush=True)
    finally:
        await service.engine.stop()
    return said, run.rows[0]


def _line() -> str:
    """The next message; `""` at the end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _require_extra() -> None:
    """
    Raises:
        PtmoeError: what a server needs is not installed.
    """
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise PtmoeError(f"serving needs {', '.join(missing)}: pip install 'ptmoe[serve]'")
