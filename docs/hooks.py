"""What mkdocs does beside rendering Markdown: formulas become MathML, and the commands describe themselves."""

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    for mark, make in (("<!-- commands -->", commands), ("<!-- methods -->", methods)):
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Browsers draw MathML by themselves, so reading needs no script."""
    return FORMULA.sub(formula, content)


def formula(found: re.Match[str]) -> str:
    displayed = found[1] == "div"
    made = convert(html.unescape(found[2].strip()), display="block" if displayed else "inline")
    return f'<div class="formula">{made}</div>' if displayed else made


def commands() -> str:
    """Each command's options, from the same signatures as its `--help`."""
    made = subprocess.run(
        [sys.executable, "-m", "typer", "ptmoe.cli.main", "utils", "docs", "--name", "ptmoe"],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    each = made[made.index("\n## ") :]  # before them stands a list of the same, cut short
    return each.replace("* `--help`: Show this message and exit.\n", "").replace("**Options**:\n\n\n", "")


def methods() -> str:
    """The configs in `METHODS`, in its order."""
    from ptmoe.methods import METHODS

    names = [config.__name__ for config in METHODS.values()]
    options = "    options: {merge_init_into_class: false, show_signature: false}"  # a config takes **values
    return "\n\n".join(f"::: ptmoe.methods.{name}\n{options}" for name in names)
