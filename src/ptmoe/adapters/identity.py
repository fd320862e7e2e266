"""Which base model an adapter belongs to: its name and revision, and entries of its input embedding."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.settings import Settings

FINGERPRINT_SIZE = 64


class Fingerprint(Settings):
    """Of an embedding, as `fingerprint` takes it."""

    model_config = ConfigDict(strict=True)
    vocabulary: Annotated[int, Field(ge=1)]
    values: Annotated[
        list[Annotated[float, Field(allow_inf_nan=False)]],
        Field(min_length=FINGERPRINT_SIZE, max_length=FINGERPRINT_SIZE),
    ]


class Envelope(Settings):
    """What every adapter's config says beside the method's own fields; a folder of plain `peft` has less of it."""

    model_config = ConfigDict(strict=True)
    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    hidden_size: Annotated[int, Field(ge=1)] | None = None
    embedding_fingerprint: Fingerprint | None = None

    @property
    def base(self) -> BaseIdentity:
        mark = self.embedding_fingerprint
        fingerprint = None if mark is None else mark.model_dump()
        return BaseIdentity(self.base_model_name_or_path, self.revision, self.hidden_size, fingerprint)


@dataclass(frozen=True)
class BaseIdentity:
    """A base model as an adapter folder describes it.

    Attributes:
        name_or_path: where it was loaded from; None where that is unknown.
        revision: of its Hub repository.
        hidden_size: `H`; None in a folder that plain `peft` has written.
        fingerprint: of its embedding (`fingerprint`); None likewise.
    """

    name_or_path: str | None
    revision: str | None = None
    hidden_size: int | None = None
    fingerprint: dict[str, Any] | None = None

    @classmethod
    def of(cls, embedding: Tensor, name_or_path: str | None = None, revision: str | None = None) -> BaseIdentity:
        """The identity of the base with this `(V, H)` input embedding."""
        return cls(name_or_path, revision, embedding.shape[1], fingerprint(embedding))

    @property
    def mark(self) -> str:
        """16 hexadecimal digits, the same for the same fingerprint."""
        return hashlib.sha256(repr(self.fingerprint or {}).encode()).hexdigest()[:16]

    def check(self, embedding: Tensor, adapter: object, name_or_path: str | None) -> None:
        """
        Args:
            embedding: `(V, H)`, of the base that the adapter is about to be used with.
            adapter: what to call the adapter in a message.
            name_or_path: of that base, for the message.

        Raises:
            PtmoeError: the adapter was trained on another base.
        """
        names = [f" ({name})" if name else "" for name in (self.name_or_path, name_or_path)]
        if self.hidden_size is not None and embedding.shape[1] != self.hidden_size:
            raise PtmoeError(
                f"{adapter} is for a base of hidden size {self.hidden_size}{names[0]}, "
                f"this one has {embedding.shape[1]}{names[1]}: load the base it was trained on"
            )
        if self.fingerprint is not None and not _matches(embedding, self.fingerprint):
            raise PtmoeError(
                f"{adapter} was trained on another base{names[0]} than this one{names[1]}: "
                "their embeddings differ; load the base it was trained on"
            )


def fingerprint(embedding: Tensor, vocabulary: int | None = None) -> dict[str, Any]:
    """Entries spread over the first `vocabulary` rows of a `(V, H)` embedding (all of them by default)."""
    vocabulary = vocabulary or embedding.shape[0]
    hidden = embedding.shape[1]
    rows = [i * (vocabulary - 1) // (FINGERPRINT_SIZE - 1) for i in range(FINGERPRINT_SIZE)]
    columns = [(i * 7919) % hidden for i in range(FINGERPRINT_SIZE)]
    whole = embedding.full_tensor() if hasattr(embedding, "full_tensor") else embedding  # gathered from the processes
    values = whole.detach()[rows, columns].float().cpu()
    return {"vocabulary": vocabulary, "values": [float(f"{value:.6g}") for value in values.tolist()]}


def _matches(embedding: Tensor, saved: dict[str, Any]) -> bool:
    """Whether a fingerprint was taken from this embedding, in whatever dtype; rows added at its end do not matter."""
    if embedding.shape[0] < saved["vocabulary"]:
        return False
    here = torch.tensor(fingerprint(embedding, saved["vocabulary"])["values"])
    there = torch.tensor(saved["values"])
    # bfloat16 keeps 8 bits: two roundings of the same number are within 2^-7 of each other.
    return here.shape == there.shape and torch.allclose(here, there, rtol=2**-7, atol=1e-6)
