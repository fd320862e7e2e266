"""A base model and an adapter, fresh or saved, as one model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptmoe.adapters.folder import local_folder, read_adapter
from ptmoe.errors import PtmoeError
from ptmoe.methods.base import Batches, InitialEmbeddings, MethodConfig, PromptEncoder
from ptmoe.methods.injected import model_inputs
from ptmoe.methods.weights import needs_no_base
from ptmoe.models.bases import check_quantization, load_base
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.models.checks import check_adapter
from ptmoe.runs.folders import trained_with_chat


def attach(
    base: PreTrainedModel,
    config: MethodConfig,
    *,
    seed: int = 0,
    adapter_name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    batches: Batches | None = None,
    check: bool = True,
) -> PromptedCausalLM:
    """Freeze `base` and put a fresh adapter in front of it, or, with a weight-side method, into it.

    Args:
        base: any causal language model of `transformers` that takes `inputs_embeds`, or a `PromptedCausalLM`, which
            then gets one adapter more.
        config: of any method.
        seed: decides every initial value; the global random state is left alone.
        adapter_name: its name, for `set_adapter` and `adapter_names`.
        tokenizer: the base's, for `init="text"`; by default loaded from where the base came from.
        batches: some of the training data, `input_ids`, `attention_mask` and `labels (B, L)`, for `init="examples"`,
            and for `eva` and `corda`, which start from the activations that it gives.
        check: try out first whether the base gives the same logits from embeddings as from token ids
            (`ptmoe.models.checks`).

    Raises:
        PtmoeError: a base that is no causal language model or does not work from embeddings, what is no method's
            config, a size that does not fit the base, a base without the modules that the method changes, a text
            without tokens, or a method that needs `batches` and has none.
    """
    if not isinstance(config, MethodConfig):
        raise PtmoeError(f"{config!r:.80} is not a method's config: give one, as in attach(base, ptmoe.PTMoEConfig())")
    if config.needs_batches and batches is None:
        raise PtmoeError(
            f"this {config.method} starts from training data: train it with `ptmoe train --method {config.method}`, or "
            "pass attach(…, batches=…)"
        )
    if config.needs_batches and batches is not None:
        batches = list(batches)
        if not any(model_inputs(batch)["attention_mask"].any() for batch in batches):
            raise PtmoeError(f"this {config.method} starts from training data, of which there is none: give some")
    model = base if isinstance(base, PromptedCausalLM) else PromptedCausalLM(base, check=check)

    def tokenize(text: str) -> list[int]:
        nonlocal tokenizer
        if tokenizer is None:
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
            except (OSError, ValueError) as error:
                raise PtmoeError(
                    f"init='text' needs the base's tokenizer, and {model.name_or_path!r} has none that can be loaded "
                    f"({str(error).splitlines()[0]}): attach(base, config, tokenizer=…)"
                ) from None
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])

    def make(base: PreTrainedModel) -> PromptEncoder:
        with seeded(seed):
            encoder = config.encoder_for(base, batches)
            generator = torch.Generator().manual_seed(seed)
            read = partial(read_prompt, embedding=base.get_input_embeddings().weight)
            with encoder.removed_on_failure():
                encoder.initialise(InitialEmbeddings(model.adapters.embedding, generator, tokenize, read, batches))
        return encoder

    before = model.active_adapter
    model.add_adapter(adapter_name, config, make)
    if check:
        check_adapter(model, adapter_name, before)
    return model


def read_prompt(folder: str, embedding: Tensor) -> Tensor:
    """The prompt `(T, H)` of a saved `pt` or `fwd-prompt` adapter.

    Args:
        folder: of the adapter, or of the run that holds it.
        embedding: `(V, H)`, of the base that the prompt is for.

    Raises:
        PtmoeError: a folder that is not a whole adapter, or one of another method or base.
    """
    saved = read_adapter(local_folder(folder))
    saved.base.check(embedding, folder, None)
    if saved.tensors.keys() != {"prompt"}:
        raise PtmoeError(f"source prompt {folder}: needs a pt adapter, is a {saved.config.method} adapter")
    return saved.tensors["prompt"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it the global random state starts from `seed`; afterwards it is what it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def count_parameters(base_config: Any, config: MethodConfig) -> int:
    """Trainable parameters of a method on a base, from the base's config alone: nothing is allocated.

    Args:
        base_config: a `transformers` config.
        config: of any method.

    Raises:
        PtmoeError: a method or size that does not fit the base.
    """
    with torch.device("meta"):
        if needs_no_base(config):
            text = base_config.get_text_config()
            # OPT's smallest models embed narrower than they compute.
            encoder = config.build(getattr(text, "word_embed_proj_dim", text.hidden_size))
        else:
            from transformers import AutoModelForCausalLM

            base = AutoModelForCausalLM.from_config(base_config)
            if not config.needs_memory:
                encoder = config.encoder_for(base)
    if config.needs_memory:
        encoder = config.encoder_for(base._apply(_zeros))
    return sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)


def _zeros(outline: Tensor) -> Tensor:
    """Zeros that take memory only where they are read: the system maps pages then."""
    zeros = torch.from_numpy(np.zeros(outline.nbytes, np.uint8))
    return zeros.view(outline.dtype).view(outline.shape)


def load_adapter(
    base: PreTrainedModel | PromptedCausalLM,
    path: str | Path,
    *,
    name: str = "default",
    revision: str | None = None,
    check: bool = True,
) -> PromptedCausalLM:
    """Put a saved adapter in front of its base, or, of a weight-side method, into it.

    Args:
        base: the model that the adapter was trained on, or a `PromptedCausalLM` on it, which gets one adapter more;
            as in `peft`, that does not become the active one.
        path: an adapter folder, a run folder that holds one, or the name of a Hub repository.
        name: the adapter's name on the model, for `set_adapter` and `adapter_names`.
        revision: of the Hub repository.
        check: as in `attach`.

    Raises:
        PtmoeError: a folder that is not a whole adapter, or one of another base; a base as in `attach`.
    """
    saved = read_adapter(local_folder(path, revision))
    model = base if isinstance(base, PromptedCausalLM) else PromptedCausalLM(base, check=check)
    inner = model.base_model
    saved.base.check(inner.get_input_embeddings().weight, saved.folder, inner.name_or_path)

    def make(base: PreTrainedModel) -> PromptEncoder:
        with seeded(0):
            return saved.encoder_for(base)

    before = model.active_adapter
    model.add_adapter(name, saved.config, make, activate=False)
    if check:
        check_adapter(model, name, before)
    return model


@dataclass(frozen=True)
class LoadedRun:
    """An adapter on its base, ready to answer.

    Attributes:
        model: in evaluation mode.
        tokenizer: the base's.
        chat: whether the run was trained on prompts in the chat template; None where its folder does not say.
    """

    model: PromptedCausalLM
    tokenizer: PreTrainedTokenizerBase
    chat: bool | None


def load_run(
    path: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    device: str | torch.device | None = None,
    check: bool = True,
    **options: Any,
) -> LoadedRun:
    """An adapter and the base it names, from a run folder, an adapter folder or a Hub repository.

    Args:
        path: of the run or adapter.
        model: another base than the one that the adapter names, as in `load_base`.
        revision: of the base; by default the adapter's, where it is the adapter's base.
        dtype: of the base, as in `load_base`.
        quantization: of the base, as in `load_base`.
        device: as in `place`; by default the accelerator, where there is one.
        check: as in `attach`.
        **options: go to the base's `from_pretrained`, as in `load_base`.

    Raises:
        PtmoeError: no such adapter or base, an adapter that names no base or belongs to another, or an unusable option.
    """
    check_quantization(quantization)
    saved = read_adapter(local_folder(path)).base
    if model is None:
        model, revision = saved.name_or_path, revision or saved.revision
    if not model:
        raise PtmoeError(f"{path} names no base: give the model that it was trained on")
    base, tokenizer = load_base(
        model, revision=revision, dtype=dtype, quantization=quantization, device=device, **options
    )
    return LoadedRun(load_adapter(base, path, check=check).eval(), tokenizer, trained_with_chat(Path(path)))
