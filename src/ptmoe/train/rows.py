"""Tokenised examples, and the files that cache them for later runs.

Examples are tokenised in blocks, and the name of a block's file is a hash of everything that decides its tokens: the
examples' own texts, the tokenizer, the options and the code. So no file is ever out of date, wherever the examples come
from, and more examples of the same data only add blocks. The texts are read and hashed at every start; tokenising them
takes more than ten times as long.

A file is one array of int32, which is mapped into memory:

    rows, examples cut, examples left out | each row's length | its prompt's length | all tokens | SHA-256

The files are in `$PTMOE_CACHE/tokens`, by default `~/.cache/ptmoe/tokens`, which may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ptmoe.fast.loss import IGNORED
from ptmoe.files import cache_folder, replaced
from ptmoe.tasks import chat, tokens
from ptmoe.tasks.base import Example
from ptmoe.tasks.problems import BadRecordError, Problems

BLOCK = 1 << 20  # characters of the examples in a block; less data is tokenised in seconds, and not cached
LIMIT = 8 << 30  # bytes of all files; the least recently used are removed
_COUNTS, _SUM = 3, 8  # numbers before the lengths, and of the checksum at the end
_ORIGIN = ("is_local", "local_files_only", "name_or_path")  # keys of a tokenizer's config that no token depends on

Row = np.ndarray[Any, np.dtype[np.int32]]
Encoded = tuple[tokens.Prompt, list[int]]  # an example's prompt and completion


class Block:
    """The rows of consecutive examples.

    Attributes:
        numbers: the block as one array, as in its file.
        path: the file that it is mapped from; None for a block in memory.
        cut: how many examples were cut to fit.
        left_out: how many examples did not fit.
        lengths: `(rows,)`, tokens of each row.
    """

    def __init__(self, numbers: Row, path: Path | None = None) -> None:
        rows, self.cut, self.left_out = (int(number) for number in numbers[:_COUNTS])
        self.numbers, self.path = numbers, path
        self.lengths, self._prompts, self._tokens = np.split(numbers[_COUNTS:-_SUM], [rows, 2 * rows])
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @classmethod
    def of(cls, encoded: Iterable[Encoded | None]) -> Block:
        """A block in memory; None stands for an example that does not fit."""
        examples = list(encoded)
        rows = [example for example in examples if example is not None]
        counts = [len(rows), sum(prompt.is_cut for prompt, _ in rows), len(examples) - len(rows)]
        lengths = [len(prompt.ids) + len(completion) for prompt, completion in rows]
        prompts = [len(prompt.ids) for prompt, _ in rows]
        ids = (token for prompt, completion in rows for token in (*prompt.ids, *completion))
        numbers = np.fromiter(chain(counts, lengths, prompts, ids), np.int32)
        return cls(np.append(numbers, _checksum(numbers)))

    @classmethod
    def read(cls, path: Path) -> Block | None:
        """A block mapped from its file; None if there is no such file or it is damaged."""
        try:
            size, numbers = path.stat().st_size, _mapped(path)
        except (OSError, RuntimeError):
            return None
        whole = size == numbers.nbytes and len(numbers) > _COUNTS + _SUM
        whole = whole and np.array_equal(numbers[-_SUM:], _checksum(numbers[:-_SUM]))
        return cls(numbers, path) if whole else None

    def write(self, path: Path) -> None:
        """Atomically: an interruption leaves no partial file, and two processes may write the same one.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def _checksum(numbers: Row) -> Row:
    return np.frombuffer(hashlib.sha256(numbers.data).digest(), np.int32)


class TokenRows(Dataset[dict[str, Row]]):
    """A sequence of rows, each `input_ids` and `labels`, `(L,)` of int32; the caller may change them.

    Attributes:
        lengths: `(rows,)`, the L of each.
        cut: how many examples were cut to fit.
        left_out: how many examples did not fit, and have no row.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.lengths: Row = np.concatenate([np.empty(0, np.int32), *(block.lengths for block in blocks)])
        self.cut = sum(block.cut for block in blocks)
        self.left_out = sum(block.left_out for block in blocks)
        self._blocks = list(blocks)
        self._ends = np.cumsum([len(block.lengths) for block in blocks])

    def __len__(self) -> int:
        return len(self.lengths)

    def fingerprint(self) -> str:
        """A hash of all rows: of the data, and of whatever made tokens of it."""
        digest = hashlib.sha256()
        for block in self._blocks:
            digest.update(block.numbers[_COUNTS:-_SUM].data)
        return digest.hexdigest()[:16]

    def __getitem__(self, index: Any) -> Any:
        """A row, or a list of rows for a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        index = range(len(self))[index]  # counts negative indices from the end, and raises beyond it
        number = int(np.searchsorted(self._ends, index, side="right"))
        block = self._blocks[number]
        return block.row(index - int(self._ends[number]) + len(block.lengths))


def token_rows(
    examples: Iterable[Example],
    encode: Callable[[Example], Encoded | None],
    settings: Callable[[], bytes] | None,
    problems: Problems,
    say: Callable[[str], None],
) -> TokenRows:
    """Examples tokenised by `encode`, or read from the files of an earlier run.

    Args:
        examples: whose texts are not kept.
        encode: gives an example's tokens, or None if it does not fit; raises `BadRecordError`.
        settings: gives `settings_hash` of whatever decides the tokens besides the examples; called if there is enough
            data to cache. None to cache nothing.
        problems: gets the examples that cannot be tokenised. A block with one is not cached, so that a later run
            reports it as well.
        say: reports that a file cannot be written: from there on, tokens stay in memory.
    """

    def encoded(part: Iterable[Example]) -> Iterator[Encoded | None]:
        for example in part:
            try:
                row = encode(example)
            except BadRecordError as error:
                problems.add(example.where, str(error))
            else:
                yield row

    folder, blocks, prefix = cache_folder("tokens"), list[Block](), b""
    for part, characters, texts in _parts(examples):
        if not blocks and characters < BLOCK:
            settings = None
        block = None
        try:
            if settings is not None:
                prefix, folder = prefix or settings(), cache_folder("tokens", create=True)
                path = folder / f"{hashlib.sha256(prefix + texts).hexdigest()}.tokens"
                block = Block.read(path)
                if block is not None:
                    with suppress(OSError):  # a read-only folder
                        os.utime(path)
                else:
                    before, block = problems.count, Block.of(encoded(part))
                    if problems.count == before:
                        block.write(path)
                        block = Block.read(path) or block
        except OSError as error:
            settings = None
            say(f"tokens are not cached in {folder} for later runs: {error.strerror or error}")
        blocks.append(block or Block.of(encoded(part)))
    if settings is not None:
        _trim(folder, {block.path for block in blocks})
    return TokenRows(blocks)


def _trim(folder: Path, own: set[Path | None]) -> None:
    """Remove the files that any run used least recently while all exceed `LIMIT`; never those of this run."""
    with suppress(OSError):  # another run removes some, too
        files = [(path.stat(), path) for path in folder.glob("*.tokens*")]
        excess = sum(state.st_size for state, _ in files) - LIMIT
        for state, path in sorted(files, key=lambda file: file[0].st_mtime):
            if excess > 0 and path not in own:
                path.unlink(missing_ok=True)
                excess -= state.st_size


def _parts(examples: Iterable[Example]) -> Iterator[tuple[list[Example], int, bytes]]:
    """Consecutive examples of `BLOCK` characters or, at the end, fewer; their number of characters, and a hash of their
    texts."""
    part: list[Example] = []
    characters, digest = 0, hashlib.sha256()
    for example in examples:
        text = repr(example.contents)
        digest.update(f"{text}\n".encode())
        characters += len(text)
        part.append(example)
        if characters >= BLOCK:
            yield part, characters, digest.digest()
            part, characters, digest = [], 0, hashlib.sha256()
    if part:
        yield part, characters, digest.digest()


def settings_hash(
    tokenizer: PreTrainedTokenizerBase, encode: Callable[..., Encoded | None], options: dict[str, Any]
) -> bytes:
    """A hash of a tokenizer as it is saved, chat template included, of `encode`'s code, and of its options.

    Raises:
        OSError: the tokenizer cannot be saved.
    """
    tokenizer("")  # resets padding and truncation, which would be saved as well
    parts = [type(tokenizer).__qualname__, transformers.__version__, tokenizers.__version__, json.dumps(options)]
    parts.append(str(vars(tokenizer).get("embedded_tokens")))
    # The sources themselves: nobody has to remember to raise a version number.
    parts += [inspect.getsource(code) for code in (chat, tokens, sys.modules[__name__], encode)]
    saved: list[tuple[str, bytes]] = []
    with TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # each kind of tokenizer has its own way to fail
            raise OSError(f"{type(tokenizer).__name__} cannot be saved: {error}") from None
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            if file.name == "tokenizer_config.json":
                config = json.loads(content)
                content = json.dumps({key: config[key] for key in config if key not in _ORIGIN}).encode()
            saved.append((file.name, content))
    return hashlib.sha256(repr((parts, saved)).encode()).digest()
