"""What an inference engine does: input embeddings in, tokens out.

The prompt is composed and spliced on this side (`ptmoe.serve.registry`), so an engine knows nothing of adapters.
"""

from collections.abc import AsyncGenerator, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.fast.passes import Changes

LEAST = -9999.0  # a log-probability of minus infinity, which JSON cannot hold


class EngineError(RuntimeError):
    """A fault inside an engine, which ends one request; the client is told this, and the log what the engine raised."""


class UnavailableError(EngineError):
    """The engine cannot be reached, or an adapter not be read just now; the request may be sent again."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_tokens: int  # new tokens at most
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # the smallest set of most likely tokens with at least this probability is sampled from
    seed: int | None = None  # the same seed gives the same tokens; None draws one
    # How many of the most likely tokens are reported at each position, beside the chosen one's own log-probability (of
    # the model's distribution, before temperature and `top_p`); None for neither.
    logprobs: int | None = None
    ends: frozenset[int] = frozenset()  # tokens that end the answer; the one that does is yielded


@dataclass(frozen=True)
class Input:
    """One row with its prompt in place."""

    embeds: Tensor  # `(T + L, H)` in the base's dtype
    token_ids: list[int]  # the `L` real tokens
    # The same for inputs whose `T` virtual tokens are the same, so that their keys and values may be kept; None where
    # they are composed for this input.
    prefix: Hashable | None = None
    # How the base's layers compute this row alone; only the local engine is given any.
    changes: Changes | None = None

    @property
    def virtual(self) -> int:
        """`T`, the number of virtual tokens."""
        return len(self.embeds) - len(self.token_ids)


@dataclass(frozen=True)
class Token:
    """A new token; `logprob` and `top`, `(token, log-probability)` pairs, only where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Engine(Protocol):
    """An inference engine."""

    name: str  # for `/health` and the log
    positions: int | None  # how many a row may have, virtual and new tokens included; None without a limit

    def generate(self, row: Input, sampling: Sampling) -> AsyncGenerator[Token, None]:
        """Tokens as they come, until `max_tokens` or one of `ends`. Closing the generator (`aclose`, or cancelling the
        task that reads it) cancels the row.

        Raises:
            EngineError: this row failed; others go on.
        """
        ...

    async def start(self) -> None:
        """Called once, in the event loop of the server, before the first row.

        Raises:
            PtmoeError: the engine cannot serve this base.
        """
        ...

    async def stop(self) -> None:
        """Called once, when no row is left."""
        ...

    async def health(self) -> dict[str, Any]:
        """What `/health` says of it: `ok`, a boolean, and whatever helps."""
        ...


def check_room(row: Input, new: int, positions: int | None) -> None:
    """
    Raises:
        PtmoeError: the row and its `new` tokens need more positions than there are.
    """
    if positions is not None and len(row.embeds) + new > positions:
        raise PtmoeError(
            f"the input's {len(row.token_ids):,} tokens with {row.virtual} virtual and {new:,} new ones need "
            f"{len(row.embeds) + new:,} positions, and the base has {positions:,}: shorten the input to "
            f"{max(positions - row.virtual - new, 0):,} tokens, or lower max_tokens"
        )
