"""Files that are there whole or not at all, whenever the process is killed, and where kept ones lie."""

import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LONGEST_NAME = 255  # bytes of a file's or folder's name, on nearly all file systems


def printable(text: str) -> str:
    """The text with control characters written out, all but tabs and line breaks."""
    return CONTROL.sub(lambda match: match[0] if match[0] in "\t\n" else f"\\x{ord(match[0]):02x}", text)


def check_name(path: Path) -> None:
    """
    Raises:
        PtmoeError: a part of it cannot name a file or a folder.
    """
    for name in path.parts:
        if CONTROL.search(name):
            raise PtmoeError(f"{name!r} cannot name a file or folder: it holds a control character, choose another")
        if (size := len(os.fsencode(name))) > LONGEST_NAME:
            raise PtmoeError(f"{name[:30]!r}… has {size} bytes, a file's or folder's name at most {LONGEST_NAME}")


def check_adapters(folder: Path | None) -> None:
    """
    Raises:
        PtmoeError: there is no such folder of adapters.
    """
    if folder is not None and not folder.is_dir():
        raise PtmoeError(f"no folder {folder}: give a folder that holds adapter folders, or one of them")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, what the system refuses to write is an `OSError` that names `path`. Python names no file where a
    `write` fails, and libraries in Rust raise errors of their own."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, error.filename2):
            error.filename = str(path)
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; it takes the place of `path` when the block ends without an error.

    Two processes may write the same `path` at the same time: the last one's stays.
    """
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with naming(path):
            yield part
            part.replace(path)
    except OSError as error:
        if error.filename == str(part):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            part.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: it is there as it was, or as it is to be."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def save_tensors(tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any new file: its library lets only the owner read it, and an
    adapter may be served, or looked at, by others."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode & 0o777)


def append(path: Path, lines: bytes) -> None:
    """Add lines to a file: all of them, or none where the disk has no room."""
    with naming(path), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while lines:
                lines = lines[file.write(lines) or 0 :]
        except OSError:
            os.truncate(path, end)
            raise


def cache_folder(part: str = "", *, create: bool = False) -> Path:
    """Where what can be made or downloaded again is kept: `$PTMOE_CACHE`, by default `~/.cache/ptmoe`, or a part of it.

    Raises:
        PtmoeError: it is somebody else's, or others may write to it: what lies in it may be theirs.
        OSError: it cannot be created.
    """
    root = os.environ.get("PTMOE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ptmoe"
    folders = [Path(root).expanduser()]
    folders += [folders[0] / part] if part else []
    for folder in folders:
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid") and folder.exists():
            status = folder.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise PtmoeError(
                    f"the cache {folder} can be written by others than you: delete it, or name another folder with "
                    "PTMOE_CACHE"
                )
    return folders[-1]


def names_repository(name: str) -> bool:
    """Whether a name can be one of the Hub's, and is not that of a file or folder here which is mistyped."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    owner, slash, _ = name.partition("/")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isascii() and not (slash and os.path.isdir(owner))


def sha256(path: Path) -> str:
    return hexdigest(path, hashlib.sha256())


def hexdigest(path: Path, digest: Any) -> str:
    """A file's hash, read in parts, by a `digest` of `hashlib` that is new."""
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return str(digest.hexdigest())
