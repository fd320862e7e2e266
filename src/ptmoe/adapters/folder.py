"""The adapter folder: `adapter_config.json` and `adapter_model.safetensors`; no pickle is read or written.

Of an adapter that `peft` has a form for (LoRA, …) both are `peft`'s own, and what is below stands beside them in
`ptmoe_config.json`.

    {"peft_type": "PT_MOE", "task_type": "CAUSAL_LM", "base_model_name_or_path": "…", "revision": null,
     "hidden_size": 2048, "embedding_fingerprint": {"vocabulary": 128256, "values": [64 numbers]},
     "num_virtual_tokens": 40, "num_experts": 2, …}

The values are entries of the base's input embedding, spread over it: they tell an adapter trained on another base,
and stay within rounding when the same base is loaded in another dtype.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptmoe.errors import PtmoeError, near
from ptmoe.files import replaced
from ptmoe.methods import METHODS, LoRAConfig, MethodConfig, PromptEncoder, VirtualTokensConfig

if TYPE_CHECKING:
    from ptmoe.models.causal import PromptedCausalLM

CONFIG_FILE = "adapter_config.json"
OWN_CONFIG_FILE = "ptmoe_config.json"  # what CONFIG_FILE holds, where that is peft's
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
FINGERPRINT_SIZE = 64
WITHOUT_EFFECT = (  # in peft's config, on what a loaded adapter computes
    "base_model_name_or_path revision task_type peft_version auto_mapping inference_mode lora_dropout "
    "fan_in_fan_out".split()  # the last says how the base holds its weights, which a quantized GPT-2 does otherwise
)
RANDOM_STARTS = (True, False, "gaussian", "eva")  # of LoRA: those that leave the base as it is
ENVELOPE = ("peft_type", "task_type", "base_model_name_or_path", "revision", "hidden_size", "embedding_fingerprint")


@dataclass
class SavedAdapter:
    """A folder that has been read and checked: its config, its tensors by key, and what it says of its base.

    Attributes:
        peft_config: `peft`'s own config, where it has a form for the adapter.
    """

    folder: Path
    config: MethodConfig
    tensors: dict[str, Tensor]
    envelope: dict[str, Any]
    peft_config: dict[str, Any] | None = None

    def fill(self, encoder: PromptEncoder) -> None:
        """Give an encoder the tensors.

        Raises:
            PtmoeError: keys or shapes that are not its own, or a `peft` config that says something else.
        """
        _check_tensors(self.folder / WEIGHTS_FILE, encoder.tensors(), self.tensors)
        expected = encoder.peft_config() or {}
        for key, value in (self.peft_config or {}).items():
            found = sorted(value) if key == "target_modules" and isinstance(value, list) else value
            if key not in WITHOUT_EFFECT and key in expected and found != expected[key]:
                raise PtmoeError(
                    f"{self.folder / CONFIG_FILE}: {key}={value!r} is not what {self.config.method} has "
                    f"({expected[key]!r}): save the adapter again, or load it with peft"
                )
        encoder.load_tensors(self.tensors)


def fingerprint(embedding: Tensor, vocabulary: int | None = None) -> dict[str, Any]:
    """Entries spread over the first `vocabulary` rows of a `(V, H)` embedding (all of them by default)."""
    vocabulary = vocabulary or embedding.shape[0]
    hidden = embedding.shape[1]
    rows = [i * (vocabulary - 1) // (FINGERPRINT_SIZE - 1) for i in range(FINGERPRINT_SIZE)]
    columns = [(i * 7919) % hidden for i in range(FINGERPRINT_SIZE)]
    values = embedding.detach()[rows, columns].float().cpu()
    return {"vocabulary": vocabulary, "values": [float(f"{value:.6g}") for value in values.tolist()]}


def same_base(embedding: Tensor, saved: dict[str, Any]) -> bool:
    """Whether a fingerprint was taken from this embedding, in whatever dtype. Rows added at its end do not matter."""
    if embedding.shape[0] < saved["vocabulary"]:
        return False
    here = torch.tensor(fingerprint(embedding, saved["vocabulary"])["values"])
    there = torch.tensor(saved["values"])
    # bfloat16 keeps 8 bits: two roundings of the same number are within 2^-7 of each other.
    return here.shape == there.shape and torch.allclose(here, there, rtol=2**-7, atol=1e-6)


def save_adapter(model: PromptedCausalLM, folder: str | Path, name: str | None = None) -> None:
    """Write one adapter of `model`; each file appears whole or not at all."""
    encoder = model.encoder if name is None else model._encoder(name)
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    revision = getattr(model.config, "_commit_hash", None)
    # `ft` has trained the embedding: it is the base's that tells the base.
    of_base = {"hidden_size": embedding.shape[1], "embedding_fingerprint": model.embedding_fingerprint}
    config = _config(encoder.config, of_base, model.name_or_path, revision)
    write_adapter(folder, config, encoder.tensors(), encoder.peft_config())


def _config(config: MethodConfig, of_base: dict[str, Any], base: str | None, revision: str | None) -> dict[str, Any]:
    """What `adapter_config.json` holds."""
    envelope = {
        "peft_type": config.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        **of_base,
    }
    return envelope | config.model_dump()


def write_adapter(
    folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor], peft_config: dict[str, Any] | None = None
) -> None:
    folder = Path(folder)
    if folder.is_file():
        raise PtmoeError(f"{folder} is a file: name a folder for the adapter")
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    configs = {CONFIG_FILE: config} if peft_config is None else {CONFIG_FILE: peft_config, OWN_CONFIG_FILE: config}
    with ExitStack() as files:  # they appear together, when all are written
        save_file(plain, files.enter_context(replaced(folder / WEIGHTS_FILE)), {"format": "pt"})
        for name, written in configs.items():
            files.enter_context(replaced(folder / name)).write_text(json.dumps(written, indent=2) + "\n")


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read and check an adapter folder: its files, keys, shapes and values.

    Raises:
        PtmoeError: a missing or damaged file, a pickle, an unknown key, a missing, misshapen or non-finite tensor.
    """
    folder = Path(folder)
    written = read_config_file(folder)
    own = folder / OWN_CONFIG_FILE
    of_peft = own.is_file()
    if of_peft:
        config, envelope = _read_config(folder, _read_json(own))
    elif written.get("peft_type") == "LORA":  # peft's own folder, from anywhere
        config, envelope = _of_peft_lora(written)
        of_peft = True
        if written.get("init_lora_weights") in RANDOM_STARTS:
            written["init_lora_weights"] = True
    else:
        config, envelope = _read_config(folder, written)
    tensors = _read_tensors(folder)
    _check_values(folder / WEIGHTS_FILE, tensors)
    if isinstance(config, VirtualTokensConfig):  # the others' shapes are told by the base
        with torch.device("meta"):
            expected = config.build(envelope["hidden_size"]).tensors()
        _check_tensors(folder / WEIGHTS_FILE, expected, tensors)
    return SavedAdapter(folder, config, tensors, envelope, written if of_peft else None)


def _of_peft_lora(written: dict[str, Any]) -> tuple[MethodConfig, dict[str, Any]]:
    """A LoRA that plain `peft` has saved: nothing in its folder tells the base. What it has beyond `LoRAConfig` is
    refused when it is loaded (`SavedAdapter.fill`)."""
    theirs = {"rank": "r", "alpha": "lora_alpha", "target_modules": "target_modules"}
    fields: dict[str, Any] = {name: written.get(key) for name, key in theirs.items()}
    return LoRAConfig(**fields), {key: written.get(key) for key in ENVELOPE}


def read_config_file(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a whole adapter folder, ours or `peft`'s, its keys not yet checked.

    Raises:
        PtmoeError: a missing file, a pickle, or a config that is not a JSON object.
    """
    _check_files(folder)
    return _read_json(folder / CONFIG_FILE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PtmoeError(f"{path} is not JSON ({error}): save the adapter again") from None
    if not isinstance(written, dict):
        raise PtmoeError(f"{path} holds {type(written).__name__}: needs an object")
    return written


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return cast(dict[str, Tensor], load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, OSError, ValueError) as error:
        raise PtmoeError(f"{folder / WEIGHTS_FILE} is damaged ({error}): save or copy it again") from None


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise PtmoeError(f"no adapter folder {folder}: give a folder that save_pretrained or ptmoe train wrote")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise PtmoeError(f"{folder} holds {', '.join(pickles)}: pickles can run code and are not read; delete them")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise PtmoeError(f"{folder} has no {name}: it is not a whole adapter folder")


def _read_config(folder: Path, written: dict[str, Any]) -> tuple[MethodConfig, dict[str, Any]]:
    by_type = {method.upper().replace("-", "_"): config for method, config in METHODS.items()}
    peft_type = written.get("peft_type")
    if peft_type == "PROMPT_TUNING":
        raise PtmoeError(f"{folder} is a peft PROMPT_TUNING adapter: convert it first, `ptmoe convert {folder} OUTPUT`")
    if "peft_version" in written:
        raise PtmoeError(
            f"{folder} is a {peft_type} adapter that peft has saved, without {OWN_CONFIG_FILE}: of those LORA loads as "
            "it is and PROMPT_TUNING converts; use the others with peft"
        )
    if peft_type not in by_type:
        raise PtmoeError(f"{folder / CONFIG_FILE}: peft_type={peft_type!r}{near(str(peft_type), by_type)}")
    method = by_type[peft_type]
    unknown = [key for key in written if key not in (*ENVELOPE, *method.model_fields, *method.retired)]
    if unknown:
        known = (*ENVELOPE, *method.model_fields)
        raise PtmoeError(f"{folder / CONFIG_FILE}: unknown key {unknown[0]!r}{near(unknown[0], known)}")
    missing = [key for key in ("hidden_size", "embedding_fingerprint") if key not in written]
    if missing:
        raise PtmoeError(f"{folder / CONFIG_FILE} lacks {', '.join(missing)}: save the adapter again")
    envelope = {key: written.get(key) for key in ENVELOPE}
    hidden, mark = envelope["hidden_size"], envelope["embedding_fingerprint"]
    if not (
        isinstance(hidden, int) and hidden > 0 and isinstance(mark, dict) and {"vocabulary", "values"} <= set(mark)
    ):
        raise PtmoeError(f"{folder / CONFIG_FILE}: hidden_size={hidden!r} or its fingerprint is unfit: save it again")
    return method(**{key: value for key, value in written.items() if key not in ENVELOPE}), envelope


def _check_tensors(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise PtmoeError(f"{path} lacks the tensor {', '.join(missing)}: it is not a whole adapter")
    if unknown:
        raise PtmoeError(f"{path} holds an unknown tensor {unknown[0]!r}{near(unknown[0], expected)}")
    for key, value in found.items():
        if value.shape != expected[key].shape:
            raise PtmoeError(
                f"{path}: {key} has shape {tuple(value.shape)}, its config says {tuple(expected[key].shape)}"
            )


def _check_values(path: Path, found: dict[str, Tensor]) -> None:
    for key, value in found.items():
        if not value.is_floating_point():
            raise PtmoeError(f"{path}: {key} has dtype {value.dtype}: needs floating point")
        if not value.isfinite().all():
            raise PtmoeError(
                f"{path}: {key} holds NaN or infinite values: the training diverged; use an earlier checkpoint"
            )


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """The adapter folder that a path, a run folder or a Hub repository means; the last is downloaded."""
    folder = Path(path)
    if folder.is_dir():
        inner = folder / "adapter"
        return inner if not (folder / CONFIG_FILE).exists() and inner.is_dir() else folder
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise PtmoeError(f"no adapter folder {path}: give a folder that save_pretrained or ptmoe train wrote")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = [CONFIG_FILE, OWN_CONFIG_FILE, WEIGHTS_FILE]
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PtmoeError(f"no adapter folder {path}, and the Hub does not give it: {error}") from None
