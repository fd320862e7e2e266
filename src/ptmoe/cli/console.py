"""Text of users, of data sets and of models, printed as it is: no markup in it, and no control of the terminal."""

from typing import Any

import rich.console
from rich.text import Text

from ptmoe.files import printable


class Console(rich.console.Console):
    """As `rich` has it, for text that may hold anything."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"markup": False, "emoji": False})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)
