"""Every type of the installed `peft`, tried on `nano`: the tables of `docs/peft.md`.

python docs/tabulate_peft.py [--write]     prints the tables, or writes them into docs/peft.md
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from write_tables import command

from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS, method_named, shelf
from ptmoe.methods.base import QUANTIZATIONS, MethodConfig
from ptmoe.models.attach import attach
from ptmoe.models.bases import load_base

PAGE = Path(__file__).parent / "peft.md"
NEEDED: dict[str, dict[str, Any]] = {  # where a type's own defaults do not fit nano, or it has none
    "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": 2},
    "C3A": {"block_size": 64},
    "TRAINABLE_TOKENS": {"token_indices": [5]},
    "VBLORA": {"vector_length": 64},
}


def _count(config: MethodConfig) -> str:
    """The trained numbers of an adapter that has run on nano.

    Raises:
        PtmoeError: it does not fit.
    """
    return f"{attach(load_base('nano')[0], config).num_parameters(only_trainable=True):,}"


def _sizes(fields: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in fields.items())


def row(kind: str) -> str:
    name, fields = f"peft:{kind.lower().replace('_', '-')}", NEEDED.get(kind, {})
    try:
        config = method_named(name)(**fields)
        free, taken = "".join(f"`{one}`" for one in config.free_sizes[:1]), set(QUANTIZATIONS)
        cells = [_count(config), _sizes(fields), free, "works"]
        cells[3] += " on quantized bases, too" if not taken & {*config.unsupported_quantizations} else ""
    except PtmoeError as error:
        reason = str(error).removeprefix(name).removeprefix(" cannot be used: ").strip()
        cells = ["–", _sizes(fields), "", reason]
    return f"| `{name}` | {' | '.join(cells)} |"


def short_row(short: str) -> str:
    entry, config = shelf.SHORT[short], METHODS[short]
    free = "".join(f"`{one}`" for one in config.free_sizes[:1])
    cells = (f"`{short}`", entry.paper, _sizes(entry.defaults), free, f"{entry.learning_rate:g}", _count(config()))
    return f"| {' | '.join(cells)} |"


def tables() -> list[str]:
    """The short forms, and all types."""
    shorts = ["| method | paper | beside `peft`'s defaults | budget sets | learning rate | on `nano` |",
        "|---|---|---|---|---|---|", *map(short_row, shelf.SHORT)]  # fmt: skip
    types = ["| method | trained on `nano` | with | budget sets | |", "|---|---|---|---|---|"]
    return ["\n".join(shorts), "\n".join([*types, *map(row, shelf.peft_types())])]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    command(__doc__, PAGE, tables)
