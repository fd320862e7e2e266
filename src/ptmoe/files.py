"""Files that are there whole or not at all, whenever the process is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; it takes the place of `path` when the block ends without an error."""
    part = path.with_name(f".{path.name}.part")
    yield part
    os.replace(part, path)


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: it is there as it was, or as it is to be."""
    with replaced(path) as part:
        part.write_text(text)
