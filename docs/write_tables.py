"""What the scripts that tabulate have in common: their command."""

import argparse
from collections.abc import Callable
from pathlib import Path


def command(description: str | None, page: Path, tables: Callable[[], list[str]], mark: str = "<!-- table -->") -> None:
    """Print the tables, or with `--write` put each between two marks of the page."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true")
    write, found = parser.parse_args().write, tables()
    if not write:
        print("\n\n".join(found))
        return
    parts = page.read_text().split(mark)  # text, table, text, table, …, text
    parts[1::2] = [f"\n\n{table}\n\n" for table in found]
    page.write_text(mark.join(parts))
