"""The adapter folder: `adapter_config.json` and `adapter_model.safetensors`; no pickle is read or written.

For an adapter that `peft` can represent (LoRA, …) both files are in `peft`'s own format, and the content below goes to
`ptmoe_config.json` beside them.

    {"peft_type": "PT_MOE", "task_type": "CAUSAL_LM", "base_model_name_or_path": "…", "revision": null,
     "hidden_size": 2048, "embedding_fingerprint": {"vocabulary": 128256, "values": [64 numbers]},
     "num_virtual_tokens": 40, "num_experts": 2, …}

The fingerprint's values are entries of the base's input embedding, spread over it: they expose an adapter that was
trained on another base, and stay within rounding when the same base is loaded in another dtype.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptmoe.adapters.identity import BaseIdentity, Envelope
from ptmoe.errors import PtmoeError, near, shown
from ptmoe.files import names_repository, naming, replaced, save_tensors
from ptmoe.methods import METHODS, LoRAConfig, MethodConfig, PromptEncoder, method_named
from ptmoe.methods.base import PreTrainedModel
from ptmoe.methods.shelf import ShelfConfig
from ptmoe.methods.weights import needs_no_base
from ptmoe.settings import OF_PEFT, read_json

CONFIG_FILE = "adapter_config.json"
OWN_CONFIG_FILE = "ptmoe_config.json"  # holds our config where CONFIG_FILE is peft's
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
OF_TRAINERS = {"training_args.bin"}  # which `transformers.Trainer` leaves beside what it saves, and nobody reads here
WITHOUT_EFFECT = (  # fields of peft's config that change nothing in what a loaded adapter computes
    "base_model_name_or_path revision task_type peft_version auto_mapping inference_mode lora_dropout "
    "fan_in_fan_out".split()  # how the base stores its weights, which a quantized GPT-2 does otherwise
)
RANDOM_STARTS = (True, False, "gaussian", "eva")  # LoRA's init_lora_weights that leave the base as it is
PEFT_ALPHA = 8  # peft's lora_alpha where a config has none
LARGEST_HEADER = 10_000_000  # bytes, of a safetensors file: it names some hundred thousand tensors
FLOATING = ("F64", "F32", "F16", "BF16")  # its names of what a tensor is made of
WHOLE = ("I64", "I32", "I16", "U8", "BOOL")  # indices, which some methods of peft save


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

    def encoder_for(self, base: PreTrainedModel) -> PromptEncoder:
        """The saved encoder on a base; a method that changes layers is then in it.

        Raises:
            PtmoeError: keys, shapes or a `peft` config that are not what the method has on this base. That shows on a
                copy of the base without memory, before anything is built or changed, or else the base is restored.
        """
        if self.config.changes_rows:  # needs no copy: the base holds hooks for it, and nothing else
            sketch = outline(self.folder, lambda: self.config.saved_encoder_for(base))
            try:
                self.check(sketch)
            finally:
                sketch.remove()
        elif not needs_no_base(self.config) and not self.config.needs_memory:
            self.check(outline(self.folder, lambda: self.config.saved_encoder_for(_without_memory(base))))
        encoder = self.config.saved_encoder_for(base)
        with encoder.removed_on_failure():
            if self.config.needs_memory:
                self.check(encoder)
            encoder.load_tensors(self.tensors)
        return encoder

    def check(self, encoder: PromptEncoder) -> None:
        """
        Raises:
            PtmoeError: keys or shapes that are not the encoder's, or a `peft` config that contradicts it.
        """
        tensors = encoder.tensors()
        check_shapes(self.folder / WEIGHTS_FILE, tensors, {k: t.shape for k, t in self.tensors.items()})
        for key, value in self.tensors.items():
            if value.is_floating_point() != tensors[key].is_floating_point():
                wanted = tensors[key].dtype
                raise PtmoeError(f"{self.folder / WEIGHTS_FILE}: {key} has dtype {value.dtype}: needs {wanted}")
        expected = encoder.peft_config() or {}
        for key, value in (self.peft_config or {}).items():
            found = sorted(value, key=str) if key == "target_modules" and isinstance(value, list) else value
            if key not in WITHOUT_EFFECT and key in expected and found != expected[key]:
                raise PtmoeError(
                    f"{self.folder / CONFIG_FILE}: {key}={shown(value)} is not what {self.config.method} has "
                    f"({expected[key]!r}): save the adapter again, or load it with peft"
                )


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
    with ExitStack() as files:  # they appear when all are written, the last one first: without it there is no adapter
        for name, written in configs.items():
            files.enter_context(replaced(folder / name)).write_text(json.dumps(written, indent=2) + "\n")
        save_tensors(plain, files.enter_context(replaced(folder / WEIGHTS_FILE)), {"format": "pt"})
        for name in (CONFIG_FILE, OWN_CONFIG_FILE):  # of an adapter that was here before
            (folder / name).unlink(missing_ok=True)


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read and check an adapter folder: its files, keys, shapes and values. Sizes come from the tensors that are there;
    what the config says is only compared with them.

    Raises:
        PtmoeError: a missing or damaged file, a pickle, an unknown key, a missing, misshapen or non-finite tensor.
    """
    folder = Path(folder)
    written = read_config_file(folder)
    own = folder / OWN_CONFIG_FILE
    of_peft = own.is_file()
    if of_peft:
        config, base = _read_config(own, read_json(own))
    elif written.get("peft_type") == "LORA":  # written by plain peft
        config, base = _read_peft_lora(folder / CONFIG_FILE, written)
        of_peft = True
        if written.get("init_lora_weights") in RANDOM_STARTS:
            written["init_lora_weights"] = True
    else:
        config, base = _read_config(folder / CONFIG_FILE, written)
    expected = None
    if needs_no_base(config):  # the shapes of other methods depend on the base
        expected = outline(folder, lambda: config.build(cast(int, base.hidden_size))).tensors()
    tensors = read_tensors(folder / WEIGHTS_FILE, expected, WHOLE if isinstance(config, ShelfConfig) else ())
    return SavedAdapter(folder, config, tensors, base, written if of_peft else None)


def outline(folder: Path, build: Callable[[], PromptEncoder]) -> PromptEncoder:
    """An encoder on the meta device, which takes no memory whatever its sizes.

    Raises:
        PtmoeError: there is no encoder of such sizes.
    """
    try:
        with torch.device("meta"):
            return build()
    except PtmoeError:
        raise
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PtmoeError(f"{folder}: no adapter has the sizes that its config says ({reason})") from None


def _without_memory(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, its tensors on the meta device."""
    copies: dict[int, Any] = {}
    for tensor in chain(base.parameters(), base.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        copies[id(tensor)] = torch.Tensor._make_subclass(type(tensor), empty, tensor.requires_grad)
        vars(copies[id(tensor)]).update(vars(tensor))  # how a quantized weight is quantized
    return copy.deepcopy(base, copies)


def read_config_file(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a whole adapter folder, ours or `peft`'s, its keys not yet checked.

    Raises:
        PtmoeError: a missing file, a pickle, or a config that is not a JSON object.
    """
    _check_files(folder)
    return read_json(folder / CONFIG_FILE)


def read_tensors(path: Path, expected: Mapping[str, Tensor] | None, others: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory. The file's header is checked before any is made.

    Args:
        path: of the file.
        expected: tensors of the shapes that it has to hold; None where that is not known yet.
        others: what the tensors may be made of beside floating point numbers.

    Raises:
        PtmoeError: a damaged file, other keys or shapes than expected, or numbers that are not floating point or not
            finite; or, because of an `OSError`, one that the system does not let be read.
    """
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LARGEST_HEADER:
            raise ValueError(f"a header of {header:,} bytes")
        with naming(path), safe_open(path, "pt") as opened:
            parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            for key, part in parts.items():
                if part.get_dtype() not in (*FLOATING, *others):
                    raise PtmoeError(f"{path}: {key} has dtype {part.get_dtype()}: needs one of {', '.join(FLOATING)}")
            if expected is not None:
                check_shapes(path, expected, {key: part.get_shape() for key, part in parts.items()})
            tensors = {key: opened.get_tensor(key) for key in parts}
    except PtmoeError:
        raise
    except OSError as error:
        raise PtmoeError(f"{path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise PtmoeError(f"{path} is damaged ({str(error)[:200]}): save or copy it again") from None
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise PtmoeError(
                f"{path}: {key} holds NaN or infinite values: the training diverged; use an earlier checkpoint"
            )
    return tensors


def check_shapes(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Sequence[int]]) -> None:
    """
    Raises:
        PtmoeError: a missing or unknown key, or another shape than expected.
    """
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise PtmoeError(f"{path} lacks the tensor {', '.join(missing)}: it is not a whole adapter")
    if unknown:
        raise PtmoeError(f"{path} holds an unknown tensor {shown(unknown[0])}{near(unknown[0], expected)}")
    for key, shape in found.items():
        if tuple(shape) != expected[key].shape:
            raise PtmoeError(f"{path}: {key} has shape {tuple(shape)}, its config says {tuple(expected[key].shape)}")


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """The adapter folder at a path, in a run folder or in a Hub repository, which is downloaded.

    Raises:
        PtmoeError: there is none.
    """
    folder = Path(path)
    if folder.is_dir():
        inner = folder / "adapter"
        return inner if not (folder / CONFIG_FILE).exists() and inner.is_dir() else folder
    if folder.exists() or "/" not in str(path) or not names_repository(str(path)):
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
    if not (folder / CONFIG_FILE).is_file() and (state := folder / "model.safetensors").is_file():
        raise PtmoeError(
            f"{folder} holds what transformers' Trainer saves of a model in training, and no adapter: attach the same "
            f"config, model.load_state_dict(safetensors.torch.load_file({str(state)!r})) and "
            "model.save_pretrained(FOLDER) make one of it; ptmoe.train.PromptTrainer saves adapters"
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES and path.name not in OF_TRAINERS)
    if pickles:
        raise PtmoeError(f"{folder} holds {', '.join(pickles)}: pickles can run code and are not read; delete them")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            if (folder / "metrics.jsonl").is_file():
                raise PtmoeError(
                    f"{folder} is a run whose training has not ended: if it was stopped, go on with `ptmoe train "
                    f"--resume --output-dir {folder}`"
                )
            raise PtmoeError(f"{folder} has no {name}: it is not a whole adapter folder")


def _read_peft_lora(path: Path, written: dict[str, Any]) -> tuple[MethodConfig, BaseIdentity]:
    """A LoRA that plain `peft` has saved: its folder does not identify the base. What it has beyond `LoRAConfig` is
    refused when it is loaded (`SavedAdapter.check`)."""
    names = {"rank": "r", "alpha": "lora_alpha", "target_modules": "target_modules"}
    base = envelope(path, {key: written.get(key) for key in ("peft_type", "base_model_name_or_path", "revision")}).base
    fields: dict[str, Any] = {name: written.get(key) for name, key in names.items()}
    fields["alpha"] = written.get("lora_alpha", PEFT_ALPHA)
    return LoRAConfig(**fields), base


def envelope(path: Path, written: dict[str, Any]) -> Envelope:
    try:
        return Envelope(**{key: value for key, value in written.items() if key in Envelope.model_fields})
    except PtmoeError as error:
        raise PtmoeError(f"{path}: {error}: save the adapter again") from None


def _read_config(path: Path, written: dict[str, Any]) -> tuple[MethodConfig, BaseIdentity]:
    by_type = {method.upper().replace("-", "_"): method for method in METHODS}
    peft_type = written.get("peft_type")
    if peft_type == "PROMPT_TUNING":
        raise PtmoeError(
            f"{path.parent} is a peft PROMPT_TUNING adapter: convert it first, `ptmoe convert {path.parent} OUTPUT`"
        )
    if "peft_version" in written:
        raise PtmoeError(
            f"{path.parent} is a {str(peft_type)[:50]} adapter that peft has saved, without {OWN_CONFIG_FILE}: of "
            "those LORA loads as it is and PROMPT_TUNING converts; use the others with peft"
        )
    if not isinstance(peft_type, str) or not (peft_type in by_type or peft_type.lower().startswith(OF_PEFT)):
        raise PtmoeError(f"{path}: peft_type={shown(peft_type)}{near(str(peft_type), by_type)}")
    try:
        fields = {key: value for key, value in written.items() if key not in Envelope.model_fields}
        config = method_named(by_type.get(peft_type, peft_type))(**fields)
    except PtmoeError as error:
        raise PtmoeError(f"{path}: {error}") from None
    missing = [key for key in ("hidden_size", "embedding_fingerprint") if written.get(key) is None]
    if missing:
        raise PtmoeError(f"{path} lacks {', '.join(missing)}: save the adapter again")
    return config, envelope(path, written).base
