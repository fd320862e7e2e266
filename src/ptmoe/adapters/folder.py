"""The adapter folder: `adapter_config.json` and `adapter_model.safetensors`; no pickle is read or written.

For an adapter that `peft` can represent (LoRA, …) both files are in `peft`'s own format, and the content below goes to
`ptmoe_config.json` beside them.

    {"peft_type": "PT_MOE", "task_type": "CAUSAL_LM", "base_model_name_or_path": "…", "revision": null,
     "hidden_size": 2048, "embedding_fingerprint": {"vocabulary": 128256, "values": [64 numbers]},
     "num_virtual_tokens": 40, "num_experts": 2, …}

The fingerprint's values are entries of the base's input embedding, spread over it: they expose an adapter that was
trained on another base, and stay within rounding when the same base is loaded in another dtype.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptmoe.adapters.identity import BaseIdentity
from ptmoe.errors import PtmoeError, near
from ptmoe.files import replaced
from ptmoe.methods import METHODS, LoRAConfig, MethodConfig, PromptEncoder, VirtualTokensConfig

CONFIG_FILE = "adapter_config.json"
OWN_CONFIG_FILE = "ptmoe_config.json"  # holds our config where CONFIG_FILE is peft's
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
WITHOUT_EFFECT = (  # fields of peft's config that change nothing in what a loaded adapter computes
    "base_model_name_or_path revision task_type peft_version auto_mapping inference_mode lora_dropout "
    "fan_in_fan_out".split()  # how the base stores its weights, which a quantized GPT-2 does otherwise
)
RANDOM_STARTS = (True, False, "gaussian", "eva")  # LoRA's init_lora_weights that leave the base as it is
ENVELOPE = ("peft_type", "task_type", "base_model_name_or_path", "revision", "hidden_size", "embedding_fingerprint")


@dataclass
class SavedAdapter:
    """A folder that has been read and checked.

    Attributes:
        folder: where it was read.
        config: of the method.
        tensors: by key.
        base: the base model that it belongs to.
        peft_config: `peft`'s own config, where the folder has one.
    """

    folder: Path
    config: MethodConfig
    tensors: dict[str, Tensor]
    base: BaseIdentity
    peft_config: dict[str, Any] | None = None

    def fill(self, encoder: PromptEncoder) -> None:
        """Copy the tensors into an encoder.

        Raises:
            PtmoeError: keys or shapes that are not the encoder's, or a `peft` config that contradicts it.
        """
        check_tensors(self.folder / WEIGHTS_FILE, encoder.tensors(), self.tensors)
        expected = encoder.peft_config() or {}
        for key, value in (self.peft_config or {}).items():
            found = sorted(value) if key == "target_modules" and isinstance(value, list) else value
            if key not in WITHOUT_EFFECT and key in expected and found != expected[key]:
                raise PtmoeError(
                    f"{self.folder / CONFIG_FILE}: {key}={value!r} is not what {self.config.method} has "
                    f"({expected[key]!r}): save the adapter again, or load it with peft"
                )
        encoder.load_tensors(self.tensors)


def save_adapter(encoder: PromptEncoder, base: BaseIdentity, folder: str | Path) -> None:
    """Write an adapter folder; each file appears whole or not at all."""
    write_files(folder, config_file(encoder.config, base), encoder.tensors(), encoder.peft_config())


def config_file(config: MethodConfig, base: BaseIdentity) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    envelope = {
        "peft_type": config.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name_or_path,
        "revision": base.revision,
        "hidden_size": base.hidden_size,
        "embedding_fingerprint": base.fingerprint,
    }
    return envelope | config.model_dump()


def write_files(
    folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor], peft_config: dict[str, Any] | None = None
) -> None:
    """The files of an adapter folder, ours or `peft`'s."""
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
        config, base = _read_config(own, _read_json(own))
    elif written.get("peft_type") == "LORA":  # written by plain peft
        config, base = _read_peft_lora(written)
        of_peft = True
        if written.get("init_lora_weights") in RANDOM_STARTS:
            written["init_lora_weights"] = True
    else:
        config, base = _read_config(folder / CONFIG_FILE, written)
    tensors = read_tensors(folder)
    check_values(folder / WEIGHTS_FILE, tensors)
    if isinstance(config, VirtualTokensConfig):  # the shapes of other methods depend on the base
        with torch.device("meta"):
            expected = config.build(cast(int, base.hidden_size)).tensors()
        check_tensors(folder / WEIGHTS_FILE, expected, tensors)
    return SavedAdapter(folder, config, tensors, base, written if of_peft else None)


def read_config_file(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a whole adapter folder, ours or `peft`'s, its keys not yet checked.

    Raises:
        PtmoeError: a missing file, a pickle, or a config that is not a JSON object.
    """
    _check_files(folder)
    return _read_json(folder / CONFIG_FILE)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, unchecked.

    Raises:
        PtmoeError: a damaged file.
    """
    try:
        return cast(dict[str, Tensor], load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, OSError, ValueError) as error:
        raise PtmoeError(f"{folder / WEIGHTS_FILE} is damaged ({error}): save or copy it again") from None


def check_tensors(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """
    Raises:
        PtmoeError: a missing or unknown key, or another shape than expected.
    """
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


def check_values(path: Path, found: dict[str, Tensor]) -> None:
    """
    Raises:
        PtmoeError: numbers that are not floating point, or not finite.
    """
    for key, value in found.items():
        if not value.is_floating_point():
            raise PtmoeError(f"{path}: {key} has dtype {value.dtype}: needs floating point")
        if not value.isfinite().all():
            raise PtmoeError(
                f"{path}: {key} holds NaN or infinite values: the training diverged; use an earlier checkpoint"
            )


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """The adapter folder at a path, in a run folder or in a Hub repository, which is downloaded.

    Raises:
        PtmoeError: there is none.
    """
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


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise PtmoeError(f"no adapter folder {folder}: give a folder that save_pretrained or ptmoe train wrote")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise PtmoeError(f"{folder} holds {', '.join(pickles)}: pickles can run code and are not read; delete them")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise PtmoeError(f"{folder} has no {name}: it is not a whole adapter folder")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PtmoeError(f"{path} is not JSON ({error}): save the adapter again") from None
    if not isinstance(written, dict):
        raise PtmoeError(f"{path} holds {type(written).__name__}: needs an object")
    return written


def _read_peft_lora(written: dict[str, Any]) -> tuple[MethodConfig, BaseIdentity]:
    """A LoRA that plain `peft` has saved: its folder does not identify the base. What it has beyond `LoRAConfig` is
    refused when it is loaded (`SavedAdapter.fill`)."""
    peft_names = {"rank": "r", "alpha": "lora_alpha", "target_modules": "target_modules"}
    fields: dict[str, Any] = {name: written.get(key) for name, key in peft_names.items()}
    return LoRAConfig(**fields), BaseIdentity(written.get("base_model_name_or_path"), written.get("revision"))


def _read_config(path: Path, written: dict[str, Any]) -> tuple[MethodConfig, BaseIdentity]:
    by_type = {method.upper().replace("-", "_"): config for method, config in METHODS.items()}
    peft_type = written.get("peft_type")
    if peft_type == "PROMPT_TUNING":
        raise PtmoeError(
            f"{path.parent} is a peft PROMPT_TUNING adapter: convert it first, `ptmoe convert {path.parent} OUTPUT`"
        )
    if "peft_version" in written:
        raise PtmoeError(
            f"{path.parent} is a {peft_type} adapter that peft has saved, without {OWN_CONFIG_FILE}: of those LORA "
            "loads as it is and PROMPT_TUNING converts; use the others with peft"
        )
    if peft_type not in by_type:
        raise PtmoeError(f"{path}: peft_type={peft_type!r}{near(str(peft_type), by_type)}")
    method = by_type[peft_type]
    fields = {key: value for key, value in written.items() if key not in ENVELOPE}
    try:
        config = method(**fields)
    except PtmoeError as error:
        raise PtmoeError(f"{path}: {error}") from None
    missing = [key for key in ("hidden_size", "embedding_fingerprint") if key not in written]
    if missing:
        raise PtmoeError(f"{path} lacks {', '.join(missing)}: save the adapter again")
    hidden, mark = written["hidden_size"], written["embedding_fingerprint"]
    if not (
        isinstance(hidden, int) and hidden > 0 and isinstance(mark, dict) and {"vocabulary", "values"} <= set(mark)
    ):
        raise PtmoeError(f"{path}: hidden_size={hidden!r} or its fingerprint is unfit: save the adapter again")
    return config, BaseIdentity(written.get("base_model_name_or_path"), written.get("revision"), hidden, mark)
