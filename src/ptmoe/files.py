"""Files that are there whole or not at all, whenever the process is killed, and where kept ones lie."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; it takes the place of `path` when the block ends without an error.

    Two processes may write the same `path` at the same time: the last one's stays.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: it is there as it was, or as it is to be."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


def cache_folder() -> Path:
    """Where what can be made or downloaded again is kept: `$PTMOE_CACHE`, by default `~/.cache/ptmoe`."""
    root = os.environ.get("PTMOE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ptmoe"
    return Path(root).expanduser()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
