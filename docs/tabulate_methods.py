"""Every method, with its source, its size and what it shares a batch with: the table of `docs/methods.md`.

python docs/tabulate_methods.py [--write]     prints the table, or writes it into docs/methods.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from write_tables import command

from ptmoe.compare.budget import fit_budget, size_text
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS, MethodConfig
from ptmoe.methods.shelf import ShelfConfig
from ptmoe.models.attach import count_parameters
from ptmoe.models.bases import load_config

PAGE = Path(__file__).parent / "methods.md"
BUDGET = 3840
HEAD = f"| method | | parameters | in {BUDGET:,} | rows share a batch |"


def source(config: type[MethodConfig]) -> str:
    """The head of the file that defines it, up to its formula; of a type of `peft`, what it is called there."""
    described = config if issubclass(config, ShelfConfig) else sys.modules[config.__module__]
    text = (described.__doc__ or "").strip().split("\n\n")[0]
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", " ".join(text.split()))


def row(name: str) -> str:
    config, base = METHODS[name], load_config("nano")
    try:
        fitted = fit_budget(base, config, BUDGET)
        within = f"{count_parameters(base, fitted):,} ({size_text(fitted)})"
    except PtmoeError:
        within = "does not fit"
    cells = (
        f"`{name}`",
        source(config),
        f"{count_parameters(base, config()):,}",
        within,
        "yes" if config.shares_batch() else "no",
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table() -> str:
    return "\n".join([HEAD, "|---|---|---:|---:|---|", *map(row, METHODS)])


if __name__ == "__main__":
    command(__doc__, PAGE, lambda: [table()])
