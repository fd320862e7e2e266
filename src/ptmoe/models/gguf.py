"""Base models in GGUF files, as llama.cpp has them: dequantized once, by `transformers`, into a folder of the cache.

What comes out is an ordinary model folder: it trains, saves and loads like any other base, in seconds instead of the
minute that dequantizing takes. Its weights are float32, four bytes each, whatever the file's type is.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe.errors import PtmoeError
from ptmoe.files import cache_folder, sha256
from ptmoe.settings import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROTARY_FACTORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
READ_WITH_SCALING = ("gpt-oss",)  # architectures
MANIFEST = "sha256.json"  # what a folder's files have to be


def gguf_of(name: str) -> Path | None:
    """The GGUF file that a base's name stands for: the file itself, or the only one in a folder without `config.json`.

    Raises:
        PtmoeError: there is no such file, or a folder holds several.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise PtmoeError(f"no GGUF file {name!r}")
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise PtmoeError(f"{name!r} holds {len(files)} GGUF files: name one of them, like {str(files[0])!r}")
    return files[0] if files else None


def gguf_in_package(distribution: str) -> Path | None:
    """The GGUF file that an installed package carries; None where the package is not installed."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


@functools.cache
def dequantized(file: Path) -> Path:
    """The model folder made of a GGUF file: in the cache by the file's SHA-256, its own files checked by theirs.

    Raises:
        PtmoeError: `gguf` is not installed, or the file is cut short, lacks a tokenizer, or is of an architecture or a
            type of quantization that `transformers` does not read.
    """
    import transformers
    from filelock import FileLock

    folder = cache_folder("gguf", create=True) / f"{sha256(file)}-{transformers.__version__}"
    with FileLock(f"{folder}.lock"):
        if folder.exists() and not _is_whole(folder):
            warnings.warn(f"{folder} is damaged: {file} is dequantized again", stacklevel=2)
            shutil.rmtree(folder)
        if not folder.exists():
            print(
                f"dequantizing {file} ({file.stat().st_size >> 20} MB), once for all: this takes a while",
                file=sys.stderr,
            )
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                made = Path(temporary) / folder.name
                _dequantize(file, made)
                digests = {path.name: sha256(path) for path in sorted(made.iterdir())}
                (made / MANIFEST).write_text(json.dumps(digests, indent=1))
                made.rename(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        digests = {path.name: sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
        return read_json(folder / MANIFEST) == digests
    except (OSError, PtmoeError):
        return False


def _dequantize(file: Path, folder: Path) -> None:
    held = _check(file)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model, found = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype="float32",
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except Exception as error:  # parsers of a foreign format end in whatever they end in
        raise PtmoeError(f"transformers cannot read {file}: {' '.join(str(error).split())[:300]}") from None
    check_whole(str(file), model, found)
    if (surplus := held - sum(parameter.numel() for parameter in model.parameters())) > 0:
        warnings.warn(
            f"{file} holds {surplus:,} weights that transformers has no place for in a {type(model).__name__}, and "
            "does without: its answers may not be the file's",
            stacklevel=2,
        )
    model.config.name_or_path = file.stem
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_whole(name: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """
    Raises:
        PtmoeError: `from_pretrained` has found, as it says, not all of a model's weights, and made up the others.
    """
    inside = (f"{model.base_model_prefix}.", "lm_head.")
    if unread := sorted(key for key in found["unexpected_keys"] if key.startswith(inside)):
        warnings.warn(
            f"{name!r} holds weights that a {type(model).__name__} with its config.json has no place for, and does "
            f"without: {unread[0]}, {len(unread)} in all",
            stacklevel=2,
        )
    if missing := sorted(found["missing_keys"]):
        raise PtmoeError(
            f"{name!r} lacks weights of a {type(model).__name__}, which would be random: {missing[0]}, {len(missing)} "
            "in all; give a whole causal language model"
        )


def _check(file: Path) -> int:
    """The number of weights that the file holds.

    Raises:
        PtmoeError: a fault that can be told from the file's header, in words that `transformers` does not find.
    """
    try:
        import gguf
    except ImportError:
        raise PtmoeError(f"{file} needs the package gguf: pip install 'ptmoe[gguf]'") from None
    if file.open("rb").read(4) != b"GGUF":
        raise PtmoeError(f"{file} is not a GGUF file")
    try:
        reader = gguf.GGUFReader(file)
        ends = [int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors]
    except Exception as error:  # past the end of a mapped file: IndexError, ValueError and others
        raise PtmoeError(f"{file} is cut short or damaged: {' '.join(str(error).split())[:200]}") from None
    if max(ends, default=0) > file.stat().st_size:
        raise PtmoeError(f"{file} is cut short: it has {file.stat().st_size:,} bytes of {max(ends):,}")
    if "tokenizer.ggml.model" not in reader.fields:
        raise PtmoeError(f"{file} holds no tokenizer: give the model's folder in transformers' own format instead")
    architecture = str(reader.fields["general.architecture"].contents())
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    factors = {tensor.name for tensor in reader.tensors} & ROTARY_FACTORS
    if factors or (scaling is not None and scaling.contents() != "none" and architecture not in READ_WITH_SCALING):
        raise PtmoeError(
            f"{file} scales its rotary positions, which transformers does not read from a GGUF file: give the model's "
            "folder in transformers' own format instead"
        )
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise PtmoeError(f"{file} is one of {parts.contents()} parts: join them with llama.cpp's gguf-split --merge")
    return sum(int(tensor.n_elements) for tensor in reader.tensors)
