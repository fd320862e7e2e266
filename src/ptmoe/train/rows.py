"""Tokenised examples, and the files that keep them for the next run.

Examples are tokenised in blocks, and a block's file is named by a hash of all that decides its tokens: its examples'
own texts, the tokenizer, the options and the code. So no file is ever out of date, wherever the examples come from, and
more examples of the same data only add blocks. The texts are read and hashed at every start; tokenising them takes more
than ten times as long.

A file is one array of int32, which is mapped into memory:

    rows, examples cut, examples left out | each row's length | its prompt's length | all tokens | checksum

The files lie in `$PTMOE_CACHE/tokens`, by default `~/.cache/ptmoe/tokens`, which may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch
import transformers
from torch.utils.data import Dataset

from ptmoe.fast.loss import IGNORED
from ptmoe.files import cache_folder, replaced
from ptmoe.tasks import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.tasks.base import Example

BLOCK = 1 << 20  # characters of the examples in a block; fewer in all are tokenised in seconds, and kept in no file
LIMIT = 8 << 30  # bytes of all files; those used least recently are removed
_COUNTS = 3  # numbers before the lengths
_WHENCE = ("is_local", "local_files_only", "name_or_path")

Row = np.ndarray[Any, np.dtype[np.int32]]
Encoded = tuple[tokens.Prompt, list[int]]  # an example's prompt and completion


class Block:
    """The rows of consecutive examples.

    Attributes:
        numbers: all of it in one array, as in the file.
        path: the file that it is mapped from; None for one in memory.
        cut: how many examples were cut to fit, and `left_out`, how many did not fit.
        lengths: `(rows,)`, tokens of each row.
    """

    def __init__(self, numbers: Row, path: Path | None = None) -> None:
        rows, self.cut, self.left_out = (int(number) for number in numbers[:_COUNTS])
        self.numbers, self.path = numbers, path
        self.lengths, self._prompts, self._tokens = np.split(numbers[_COUNTS:-1], [rows, 2 * rows])
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @classmethod
    def of(cls, encoded: Iterable[Encoded | None]) -> Block:
        """A block in memory; None stands for an example that does not fit."""
        lengths, prompts, ids = array("i"), array("i"), array("i")
        cut = left_out = 0
        for one in encoded:
            if one is None:
                left_out += 1
                continue
            prompt, completion = one
            cut += prompt.is_cut
            lengths.append(len(prompt.ids) + len(completion))
            prompts.append(len(prompt.ids))
            ids.extend(prompt.ids)
            ids.extend(completion)
        numbers: Row = np.concatenate([[len(lengths), cut, left_out], lengths, prompts, ids], dtype=np.int32)
        return cls(np.append(numbers, _checksum(numbers)))

    @classmethod
    def read(cls, path: Path) -> Block | None:
        """A block mapped from its file; None where there is none, or not as it was written."""
        try:
            size, numbers = path.stat().st_size, _mapped(path)
        except (OSError, RuntimeError):
            return None
        whole = size == numbers.nbytes and len(numbers) > _COUNTS and numbers[-1] == _checksum(numbers[:-1])
        return cls(numbers, path) if whole else None

    def write(self, path: Path) -> None:
        """All at once: a killed process leaves nothing under this name, and two may write it at the same time.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            self.numbers.tofile(partial)

    def row(self, index: int) -> dict[str, Row]:
        start = self._starts[index]
        ids = self._tokens[start : start + self.lengths[index]].copy()
        labels = ids.copy()
        labels[: self._prompts[index]] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def __reduce__(self) -> tuple[Any, ...]:
        """A data loader's worker maps the file itself, unless another run has removed it since."""
        if self.path is not None and self.path.exists():
            return _of_file, (self.path,)
        return Block, (np.array(self.numbers),)


def _of_file(path: Path) -> Block:
    return Block(_mapped(path), path)


def _mapped(path: Path) -> Row:
    # `np.memmap` would keep each file open, and large data has more files than a process may open.
    mapped = torch.from_file(str(path), size=path.stat().st_size // 4, dtype=torch.int32)
    numbers: Row = mapped.numpy()
    numbers.flags.writeable = False
    return numbers


def _checksum(numbers: Row) -> np.int32:
    checksum: np.int32 = np.uint32(zlib.crc32(numbers.data)).view(np.int32)
    return checksum


class TokenRows(Dataset[dict[str, Row]]):
    """A sequence of rows, each `input_ids` and `labels`, `(L,)` of int32, the caller's own.

    Attributes:
        lengths: `(rows,)`, the L of each.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.lengths: Row = np.concatenate([np.empty(0, np.int32), *(block.lengths for block in blocks)])
        self._blocks = list(blocks)
        self._ends = np.cumsum([len(block.lengths) for block in blocks])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        """A row, or with a slice a list of them."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        index = range(len(self))[index]  # a negative one counts from the end, one beyond it raises
        number = int(np.searchsorted(self._ends, index, side="right"))
        block = self._blocks[number]
        return block.row(index - int(self._ends[number]) + len(block.lengths))


class TokenCache:
    """Blocks in files that are named by what they were made from.

    Args:
        settings: all that decides the tokens besides the examples (`settings_of`); called where there is data enough.
        say: told that a file cannot be written: its tokens and all that follow stay in memory.
    """

    def __init__(self, settings: Callable[[], bytes], say: Callable[[str], None]) -> None:
        self.folder = cache_folder() / "tokens"
        self._make_settings, self._say = settings, say
        self._settings = b""
        self._used: set[Path] = set()
        self._written = self._refused = False

    def block(self, texts: bytes, make: Callable[[], Block]) -> Block:
        """The block of the examples with these texts, a hash: from its file, or made and written to it."""
        if self._refused:
            return make()
        made: Block | None = None
        try:
            self._settings = self._settings or self._make_settings()
            path = self.folder / f"{hashlib.sha256(self._settings + texts).hexdigest()}.tokens"
            self._used.add(path)
            found = Block.read(path)
            if found is not None:
                with suppress(OSError):  # a folder that can only be read
                    os.utime(path)
                return found
            made = make()
            made.write(path)
            self._written = True
            return Block.read(path) or made
        except OSError as error:
            self._refused = True
            self._say(f"tokens are not kept in {self.folder} for the next run: {error.strerror or error}")
            return made or make()

    def trim(self) -> None:
        """Remove the files used least recently, by any run, while all take more than `LIMIT`; never this run's own."""
        if not self._written:
            return
        with suppress(OSError):  # another run removes some, too
            files = [(path.stat(), path) for path in self.folder.glob("*.tokens*")]
            excess = sum(state.st_size for state, _ in files) - LIMIT
            for state, path in sorted(files, key=lambda file: file[0].st_mtime):
                if excess > 0 and path not in self._used:
                    path.unlink(missing_ok=True)
                    excess -= state.st_size


def token_blocks(
    examples: Iterable[Example], encode: Callable[[Example], Encoded | None], cache: TokenCache | None
) -> list[Block]:
    """Examples tokenised by `encode`, or what a run before this made of them."""
    blocks: list[Block] = []
    for part, characters, texts in _parts(examples):
        if not blocks and characters < BLOCK:
            cache = None

        def make(part: list[Example] = part) -> Block:
            return Block.of(map(encode, part))

        blocks.append(cache.block(texts, make) if cache else make())
    if cache is not None:
        cache.trim()
    return blocks


def _parts(examples: Iterable[Example]) -> Iterator[tuple[list[Example], int, bytes]]:
    """Consecutive examples of `BLOCK` characters, or fewer at the end; how many, and a hash of their texts."""
    part: list[Example] = []
    characters, digest = 0, hashlib.sha256()
    for example in examples:
        text = repr((example.input, example.target, example.messages, example.context, example.answer))
        digest.update(f"{text}\n".encode())
        characters += len(text)
        part.append(example)
        if characters >= BLOCK:
            yield part, characters, digest.digest()
            part, characters, digest = [], 0, hashlib.sha256()
    if part:
        yield part, characters, digest.digest()


def settings_of(
    tokenizer: PreTrainedTokenizerBase, encode: Callable[..., Encoded | None], options: dict[str, Any]
) -> bytes:
    """A hash of a tokenizer as it is saved, chat template and all, of `encode`'s code, and of the options it gets.

    Raises:
        OSError: the tokenizer cannot be saved.
    """
    tokenizer("")  # what was padded or cut before would be saved as the tokenizer's own way
    parts = [type(tokenizer).__qualname__, transformers.__version__, tokenizers.__version__, json.dumps(options)]
    # The sources themselves: a version number would have to be thought of.
    parts += [inspect.getsource(code) for code in (tokens, sys.modules[__name__], encode)]
    saved: list[tuple[str, bytes]] = []
    with TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # each kind of tokenizer has its own way to fail
            raise OSError(f"{type(tokenizer).__name__} cannot be saved: {error}") from None
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            if file.name == "tokenizer_config.json":  # which also says where the tokenizer was loaded from
                config = json.loads(content)
                content = json.dumps({key: config[key] for key in config if key not in _WHENCE}).encode()
            saved.append((file.name, content))
    return hashlib.sha256(repr((parts, saved)).encode()).digest()
