"""`peft`'s PROMPT_TUNING folder, to and from a `pt` adapter folder: the same prompt, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe.adapters.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_file,
    envelope,
    outline,
    read_adapter,
    read_config_file,
    read_tensors,
    write_files,
)
from ptmoe.adapters.identity import BaseIdentity
from ptmoe.errors import PtmoeError, shown
from ptmoe.methods import PTConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_peft(source: str | Path, target: str | Path) -> None:
    """Write a `pt` adapter folder as `peft`'s PROMPT_TUNING folder: the same prompt, the same logits.

    Raises:
        PtmoeError: an adapter of another method, which `peft` has no form for.
    """
    saved = read_adapter(source)
    if saved.peft_config is not None:
        raise PtmoeError(
            f"{source} is a {saved.config.method} adapter: its folder is peft's own already, load it with "
            "peft.PeftModel.from_pretrained"
        )
    if not isinstance(saved.config, PTConfig):
        raise PtmoeError(f"{source} is a {saved.config.method} adapter: peft has a form for pt only")
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": saved.base.name_or_path,
        "revision": saved.base.revision,
        "inference_mode": True,
        "num_virtual_tokens": saved.config.num_virtual_tokens,
        "token_dim": saved.base.hidden_size,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    write_files(target, config, {"prompt_embeddings": saved.tensors["prompt"]})


def from_peft(source: str | Path, target: str | Path, base: PreTrainedModel) -> None:
    """Write `peft`'s PROMPT_TUNING folder as a `pt` adapter folder for `base`.

    Raises:
        PtmoeError: another kind of folder, a damaged one, or one that does not fit the base.
    """
    source = Path(source)
    written = read_config_file(source)
    if written.get("peft_type") != "PROMPT_TUNING":
        raise PtmoeError(f"{source}: peft_type={shown(written.get('peft_type'))}: only PROMPT_TUNING converts")
    embedding = base.get_input_embeddings().weight
    size: Any = written.get("num_virtual_tokens")  # PTConfig checks it
    config = PTConfig(num_virtual_tokens=size, init="random")
    prompt = outline(source, lambda: config.build(embedding.shape[1])).tensors()["prompt"]
    tensors = read_tensors(source / WEIGHTS_FILE, {"prompt_embeddings": prompt})
    named = envelope(source / CONFIG_FILE, written)
    identity = BaseIdentity.of(embedding, named.base_model_name_or_path, named.revision)
    write_files(target, config_file(config, identity), {"prompt": tensors["prompt_embeddings"].float()})
