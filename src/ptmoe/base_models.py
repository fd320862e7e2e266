"""Base models by name: `nano`, a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ptmoe import nano
from ptmoe.errors import PtmoeError, near

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_base(
    name: str, *, revision: str | None = None, dtype: str = "auto", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, which gets a padding token where it has none.

    Args:
        name: `"nano"`, a folder, or a Hub repository.
        revision: of a Hub repository.
        dtype: `"auto"` as saved, or `"float32"`, `"bfloat16"`, `"float16"`.
        **options: go to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        PtmoeError: no such model, or an unknown dtype.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise PtmoeError(f"unknown dtype {dtype!r}{near(dtype, DTYPES)}")
    with _found(name) as where:
        tokenizer = _tokenizer(where, revision)
        model = AutoModelForCausalLM.from_pretrained(where, revision=revision, dtype=dtype, **options)
    model.name_or_path = name
    model.config.name_or_path = name
    return cast("PreTrainedModel", model), tokenizer


def load_tokenizer(name: str, *, revision: str | None = None) -> tuple[PreTrainedTokenizerBase, int | None]:
    """A base's tokenizer and how many positions it has, without its weights.

    Raises:
        PtmoeError: no such model.
    """
    from transformers import AutoConfig

    with _found(name) as where:
        config = AutoConfig.from_pretrained(where, revision=revision)
        tokenizer = _tokenizer(where, revision)
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None)


def _tokenizer(where: str, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast("PreTrainedTokenizerBase", tokenizer)


@contextmanager
def _found(name: str) -> Iterator[str]:
    """Where a named model is loaded from; what loading raises is said in one message."""
    if name != nano.NAME and (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise PtmoeError(f"no model folder {name!r}: give nano, a folder, or the name of a Hub repository")
    try:
        yield str(nano.FOLDER) if name == nano.NAME else name
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PtmoeError(
            f"unknown model {name!r}: it is not nano, not a folder, and the Hub does not give it ({reason})"
        ) from None


def quiet() -> None:
    """No progress bars or advice from the libraries below; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
