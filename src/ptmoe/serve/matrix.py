"""A base's input embedding, memory-mapped from its safetensors, and nothing else of the base."""

import json
from pathlib import Path
from typing import cast

from safetensors import safe_open
from torch import nn

from ptmoe.errors import PtmoeError
from ptmoe.models.bases import locate, written_config

# What the matrix is called in the architectures of `transformers`.
ENDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
# They multiply what they look up, and not the embeddings that they are given: `ptmoe.models.input_path` measures by how
# much, on a base that is here.
MULTIPLIED = ("falcon_h1",)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_embedding(name: str, revision: str | None = None) -> nn.Embedding:
    """`(V, H)` of a base, named as for `load_base`, in the dtype as saved; pages are read as they are needed.

    Raises:
        PtmoeError: no safetensors, none of the known names in them, or a base that needs more than its matrix.
    """
    where = locate(name)
    path = _file(where, INDEX, revision)
    if path is not None:
        files: dict[str, str] = json.loads(path.read_text())["weight_map"]
    else:
        path = _file(where, WEIGHTS, revision)
        if path is None:
            raise PtmoeError(f"{name!r} has no {WEIGHTS}: the gateway reads the embedding matrix from it")
        with safe_open(path, "pt") as whole:
            files = dict.fromkeys(whole.keys(), WEIGHTS)
    found = [key for key in files if key.endswith(ENDINGS) and "per_layer" not in key]
    if len(found) != 1:
        raise PtmoeError(
            f"{name!r} has {len(found)} tensors that may be its input embedding ({', '.join(found)}): "
            f"the gateway needs one that ends in {', '.join(ENDINGS)}"
        )
    if (kind := written_config(name, revision=revision).get("model_type")) in MULTIPLIED:
        raise PtmoeError(f"{name!r} is a {kind}, whose embeddings are not its matrix alone: use --engine local")
    path = _file(where, files[found[0]], revision)
    assert path is not None
    with safe_open(path, "pt") as weights:
        matrix = weights.get_tensor(found[0])
    return cast(nn.Embedding, nn.Embedding.from_pretrained(matrix))


def _file(where: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder or of a Hub repository; None where there is none."""
    if Path(where).is_dir():
        path = Path(where, name)
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(where, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise PtmoeError(f"{where}: the Hub does not give {name} ({' '.join(str(error).split()):.160})") from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise PtmoeError(f"{where}: the Hub does not give {name} ({' '.join(str(error).split()):.160})") from None
