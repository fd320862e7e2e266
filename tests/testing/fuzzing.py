"""Files as users give them, what reads them, and changes that make them anything else.

`python -m testing.fuzzing NAME -runs=N`, with `atheris` installed, looks for changes by the branches that they reach;
`tests/test_fuzzing.py` draws them by Hypothesis.
"""

import contextlib
import copy
import functools
import io
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml
from hypothesis import strategies as st

import ptmoe
from ptmoe.adapters.folder import read_adapter
from ptmoe.cli.evaluation import score
from ptmoe.compare.plan import read_plan
from ptmoe.compare.run import prepare
from ptmoe.methods import METHODS
from ptmoe.train import recipe
from testing.bases import tiny_llama
from testing.shelf import OF_SHORT

MOST_SECONDS, MOST_BYTES = 5, 1 << 30

SIZES: dict[str, dict[str, Any]] = {
    "pt-moe": {"num_virtual_tokens": 6, "rank": 4, "num_experts": 3},
    "pt-moe-road": {"num_virtual_tokens": 4, "rank": 2, "num_experts": 3},
    "dpt": {"num_virtual_tokens": 4, "rank": 2},
    "prefix-tuning": {"num_virtual_tokens": 3},
    "p-tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
    "hydralora": {"rank": 2, "num_experts": 3},
    "lora-xs": {"rank": 2},
    "svfit": {"rank": 2},
    "soka": {"rank": 2, "energy": 0.9},
    "edora": {"rank": 2},
    "goat": {"num_experts": 3},
    "nora": {"rank": 8},
    "attempt": {"num_virtual_tokens": 4, "num_sources": 3},
    "vera": {"rank": 4},
    "ulpt": {"num_virtual_tokens": 4, "rank": 6},
    "ft": {},
    "ia3": {},
    **OF_SHORT,
}


@dataclass(frozen=True)
class Target:
    """What reads a file.

    Attributes:
        originals: contents of whole files, by their place in a folder.
        read: reads a file of this place and content, as the command does.
    """

    originals: dict[str, bytes]
    read: Callable[[str, bytes], None]

    def survives(self, place: str, content: bytes) -> bool:
        """Whether a file is read, and not refused.

        Raises:
            AssertionError: reading takes more than 5 s of the processor or 1 GB.
            Exception: any but `PtmoeError`.
        """
        started, before, refused = time.process_time(), _peak(), True
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.suppress(ptmoe.PtmoeError):
                self.read(place, content)
                refused = False
        assert time.process_time() - started < MOST_SECONDS
        assert _peak() - before < MOST_BYTES
        return not refused


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@functools.cache
def scratch() -> Path:
    """A folder of this process's own, which goes with it."""
    holder = tempfile.TemporaryDirectory()
    scratch.holder = holder  # type: ignore[attr-defined]
    return Path(holder.name)


# ---- what reads them -------------------------------------------------------------------------------------------------


@functools.cache
def adapters() -> Target:
    """A folder of each method, one of its files changed, put on its base."""
    base, originals = tiny_llama(), {}
    for method, config in METHODS.items():
        if config().needs_batches:
            continue  # saved as lora and pissa are
        folder = scratch() / "adapters" / method
        sizes = SIZES.get(method, {"num_virtual_tokens": 4} if "num_virtual_tokens" in config.model_fields else {})
        ptmoe.attach(copy.deepcopy(base), config(**sizes)).save_pretrained(folder)
    plain = shutil.copytree(scratch() / "adapters" / "lora", scratch() / "adapters" / "lora of plain peft")
    (plain / "ptmoe_config.json").unlink()
    for path in sorted((scratch() / "adapters").glob("*/*")):
        originals[f"{path.parent.name}/{path.name}"] = path.read_bytes()

    def read(place: str, content: bytes) -> None:
        folder = scratch() / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree((scratch() / "adapters" / place).parent, folder)
        (folder / Path(place).name).write_bytes(content)
        saved = read_adapter(folder)
        on = copy.deepcopy(base) if saved.config.trains_base else base
        saved.base.check(on.get_input_embeddings().weight, folder, None)
        encoder = saved.encoder_for(on)
        if on is base:
            encoder.remove()

    return Target(originals, read)


TRAIN = (
    {"task": "nano/mixed", "method": "pt", "max_steps": 2, "max_examples": 8},
    {
        "data": "data.jsonl",
        "method": {"name": "pt-moe", "rank": 2, "num_virtual_tokens": 4, "recipe": "paper"},
        "prompt_key": "prompt",
        "completion_key": "completion",
        "learning_rate": 0.01,
        "optim": "adamw_torch",
        "trainer": {"adam_beta2": 0.99},
        "seed": 1,
        "chat": None,
    },
)
PLANS = (
    {"model": "nano", "methods": ["pt", {"name": "lora", "rank": 1}], "tasks": ["nano/mixed"], "seeds": 2},
    {"preset": "ablate-noise", "model": "nano", "warmup_steps": 2, "train": {"weight_decay": 0.1}},
    {
        "methods": [{"name": "pt-moe", "num_experts": 4, "label": "ours", "budget": None}],
        "budget": ["4k"],
        "vary": {"router_noise": [0, 0.1]},
        "tasks": ["nano/words,nano/facts"],
        "eval_tasks": ["nano/mixed"],
        "max_steps": 3,
    },
)
ANSWERS = {f"data-{i}": f"answer {i}" for i in range(1, 4)}


def _in_scratch(read: Callable[[Path], object]) -> Callable[[str, bytes], None]:
    """With the file written into the current folder, which also holds data."""

    def written(place: str, content: bytes) -> None:
        os.chdir(scratch())
        rows = ({"id": f"data-{i}", "prompt": f"{i}?", "completion": f"answer {i}"} for i in range(1, 4))
        Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = Path(place)
        path.write_bytes(content)
        read(path)

    return written


def _stop(*arguments: Any, **options: Any) -> Any:
    raise ptmoe.PtmoeError("all is checked")


@functools.cache
def train() -> Target:
    """`ptmoe train` up to the loading of its base."""

    def read(path: Path) -> None:
        with mock.patch.object(recipe, "load_base", _stop):
            recipe.train(ptmoe.train.TrainOptions.read(path), say=lambda text: None)

    return Target({f"train-{i}.yaml": _yaml(options) for i, options in enumerate(TRAIN)}, _in_scratch(read))


@functools.cache
def plans() -> Target:
    """`ptmoe compare --dry-run`."""

    def read(path: Path) -> None:
        prepare(read_plan(path), say=lambda text: None, data=False)

    return Target({f"plan-{i}.yaml": _yaml(plan) for i, plan in enumerate(PLANS)}, _in_scratch(read))


@functools.cache
def predictions() -> Target:
    """`ptmoe score`."""
    listed = [{"id": name, "completion": text} for name, text in ANSWERS.items()]
    originals = {
        "object.json": json.dumps(ANSWERS),
        "array.json": json.dumps(listed),
        "lines.jsonl": "".join(json.dumps(each) + "\n" for each in listed),
    }

    def read(path: Path) -> None:
        score("data.jsonl", path, missing_as_wrong=True)

    return Target({place: text.encode() for place, text in originals.items()}, _in_scratch(read))


def _yaml(value: object) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode()


TARGETS = {"adapters": adapters, "train": train, "plans": plans, "predictions": predictions}

# ---- changes ---------------------------------------------------------------------------------------------------------

# Texts in place of a value.
RAW = ["9" * 5000, "0x" + "f" * 5000, "1e999", "NaN", "-Infinity", "1:30", "~", "yes", "2026-11-26", "!!timestamp x"]
RAW += ["[" * 3000, "[" * 90 + "]" * 90, "{", "&a [*a]", "!!python/object:os.system x", '"\\ud800"', "? [a]\n: b"]
SIMPLE = st.one_of(
    st.sampled_from([None, True, False, "", "x", [], {}, [[]], [{}], {"name": ["pt"]}, {"": 1}, "\x1b[1m", "[/b]"]),
    st.sampled_from([0, 1, -1, 2, 3, 1000, 300_000, 2**31, 2**63, 10**18, 10**30, 0.5, -0.5, 1e308, "a" * 500]),
    st.sampled_from(["nano/mixed", "pt", "pt-moe:rank=8", "pt:rank", "a=b", "0,3", "1e9", ",", "F8_E4M3", "I64"]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)
VALUES = SIMPLE | st.lists(SIMPLE, max_size=3) | st.dictionaries(st.text(max_size=3), SIMPLE, max_size=2)
VALUES = VALUES.map(copy.deepcopy)  # some of them are changed further


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, part in inner for path in _places(part, (*here, key)))]


@st.composite
def changed_text(draw: st.DrawFn, value: Any) -> str:
    """JSON of a value with some of its parts replaced, removed, renamed or joined by others."""
    value, raw = copy.deepcopy(value), []
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(_places(value)[1:] or [(None,)]))
        owner = functools.reduce(lambda part, key: part[key], path, value)
        if last is None or not isinstance(owner, dict | list):
            return json.dumps(draw(VALUES))
        match draw(st.sampled_from(["replace", "replace", "raw", "remove", "rename", "add"])):
            case "replace":
                owner[last] = draw(VALUES)
            case "raw":
                owner[last] = f"@{len(raw)}@"
                raw.append(draw(st.sampled_from(RAW)))
            case "remove":
                owner.pop(last)
            case "rename" if isinstance(owner, dict):
                owner[draw(st.text(max_size=12))] = owner.pop(last)
            case _:
                others = [inner for place in _places(value) for inner in place if isinstance(inner, str)]
                if isinstance(owner, dict):
                    owner[draw(st.text(max_size=12) | st.sampled_from(others or [""]))] = draw(VALUES)
                else:
                    owner.append(draw(VALUES))
    return re.sub(r'"@(\d)@"', lambda found: raw[int(found[1])], json.dumps(value))


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes set, removed, repeated or put in, at one to four places."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 16)))
        match draw(st.sampled_from(["set", "remove", "repeat", "cut"])):
            case "set":
                content = content[:start] + draw(st.binary(max_size=8)) + content[end:]
            case "remove":
                content = content[:start] + content[end:]
            case "repeat":
                content = content[:end] + content[start:end] * draw(st.integers(1, 50)) + content[end:]
            case "cut":
                content = content[:start]
    return content


@st.composite
def changed(draw: st.DrawFn, place: str, content: bytes) -> bytes:
    """Another file in place of this one."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(content))
    if place.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        header = draw(changed_text(json.loads(content[8 : 8 + size]))).encode()
        length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
        return length.to_bytes(8, "little") + header + content[8 + size :]
    if place.endswith(".jsonl"):
        lines = [draw(changed_text(json.loads(line))) for line in content.splitlines()]
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    value = yaml.safe_load(content) if place.endswith(".yaml") else json.loads(content)
    return draw(changed_text(value)).encode("utf-8", "surrogatepass")


def main(name: str, *options: str) -> None:
    """Fuzz one target with atheris; the first byte chooses the file."""
    import atheris

    target = TARGETS[name]()
    places = sorted(target.originals)
    corpus = scratch() / "corpus"
    corpus.mkdir()
    for index, place in enumerate(places):
        (corpus / str(index)).write_bytes(bytes([index]) + target.originals[place])

    def once(data: bytes) -> None:
        if data:
            target.survives(places[data[0] % len(places)], data[1:])

    for module in [module for name, module in sys.modules.items() if name.startswith("ptmoe.")]:
        for function in vars(module).values():
            if callable(function) and getattr(function, "__module__", None) == module.__name__:
                with contextlib.suppress(Exception):
                    atheris.instrument_func(function)
    atheris.Setup([name, str(corpus), *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
