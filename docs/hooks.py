"""What mkdocs does besides rendering Markdown: formulas become MathML, and commands and methods list themselves."""

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
    for mark, listing in (("<!-- commands -->", commands), ("<!-- methods -->", methods)):
        if mark in markdown:
            markdown = markdown.replace(mark, listing())
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Browsers draw MathML natively, so the pages need no script."""
    return FORMULA.sub(formula, content)


def formula(found: re.Match[str]) -> str:
    displayed = found[1] == "div"
    mathml = convert(html.unescape(found[2].strip()), display="block" if displayed else "inline")
    return f'<div class="formula">{mathml}</div>' if displayed else mathml


def commands() -> str:
    """Each command's options, from the same signatures and fields as its `--help`."""
    printed = subprocess.run(
        [sys.executable, "-m", "typer", "ptmoe.cli.main", "utils", "docs", "--name", "ptmoe"],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    sections = printed[printed.index("\n## ") :]  # after a list of the commands with shortened descriptions
    return sections.replace("* `--help`: Show this message and exit.\n", "").replace("**Options**:\n\n\n", "")


def methods() -> str:
    """The configs in `METHODS` that have a file of their own, in its order."""
    import ptmoe.methods

    names = [config.__name__ for config in ptmoe.methods.METHODS.values() if hasattr(ptmoe.methods, config.__name__)]
    options = "    options: {merge_init_into_class: false, show_signature: false}"  # a config takes **values
    return "\n\n".join(f"::: ptmoe.methods.{name}\n{options}" for name in names)
