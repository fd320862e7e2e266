"""From the options of `ptmoe serve` to a service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptmoe.adapters.folder import local_folder, read_config_file
from ptmoe.errors import PtmoeError
from ptmoe.models.adapter_set import AdapterSet
from ptmoe.models.bases import load_base, load_tokenizer, locate
from ptmoe.serve.limits import Limits
from ptmoe.serve.metrics import Metrics
from ptmoe.serve.registry import Registry
from ptmoe.serve.service import Service

log = logging.getLogger(__name__)


def base_of(adapters: Path | None, model: str | None, revision: str | None) -> tuple[str, str | None]:
    """The base that was given, and its revision; else those that the first adapter in a folder, or the only one, names.

    Raises:
        PtmoeError: none names one.
    """
    if model is not None:
        return model, revision
    if adapters is None:
        raise PtmoeError("nothing to serve: give a folder of adapters, or --model for the base alone")
    if not adapters.is_dir():
        raise PtmoeError(f"no folder {adapters}: give a folder that holds adapter folders, or one of them")
    for path in (adapters, *sorted(path for path in adapters.iterdir() if path.is_dir())):
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


def gateway_service(
    adapters: Path | None,
    urls: Sequence[str],
    *,
    model: str | None = None,
    revision: str | None = None,
    memory: int | None = None,
    limits: Limits | None = None,
    api_key: str | None = None,
) -> Service:
    """A service in front of inference engines; of the base only the embedding matrix is read.

    Args:
        urls: of the engines.
        api_key: of the engines; the others as of `local_service`.

    Raises:
        PtmoeError: no such folder or base, or an engine that can be reached and does not serve it.
    """
    from transformers import GenerationConfig

    from ptmoe.serve.gateway import GatewayEngine
    from ptmoe.serve.matrix import read_embedding

    model, revision = base_of(adapters, model, revision)
    tokenizer, positions = load_tokenizer(model, revision=revision)
    embedding = read_embedding(model, revision)
    try:
        ends = GenerationConfig.from_pretrained(locate(model), revision=revision).eos_token_id
    except OSError:  # not every base has one
        ends = None
    engine = GatewayEngine(urls, embedding, positions=positions, api_key=api_key)
    for url, fault in asyncio.run(engine.check()).items():
        log.warning("%s: %s; /health follows it", url, fault)
    registry = Registry(AdapterSet(embedding), adapters, base=public_name(model), memory=memory)
    all_ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return Service(registry, engine, tokenizer, frozenset(all_ends), limits or Limits(), Metrics(registry))
