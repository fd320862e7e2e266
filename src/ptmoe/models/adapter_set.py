"""`AdapterSet`: named adapters over one embedding matrix, from a batch of inputs to its soft prompts.

No base model is needed: a server in front of an inference engine holds an embedding matrix and an `AdapterSet`, and
sends the engine embeddings.

```python
adapters = AdapterSet(nn.Embedding.from_pretrained(matrix))  # (V, H)
adapters.load("runs/qa", "qa")
spliced, prompts = adapters.compose(input_ids, attention_mask, adapter_names=["qa", "__base__"])
```
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ptmoe.adapters.folder import local_folder, read_adapter
from ptmoe.errors import PtmoeError, near, without_embedding
from ptmoe.methods.base import MethodConfig, PreTrainedModel, Prompt, PromptEncoder
from ptmoe.methods.weights import needs_no_base
from ptmoe.models.prompts import Prompts
from ptmoe.models.splice import Spliced, splice

BASE = "__base__"  # in `adapter_names`, as in peft: this row gets no prompt


class AdapterSet(nn.Module):
    """Named adapters over one embedding matrix; a batch may mix them.

    A method that changes the base's layers for all rows alike excludes all other adapters.

    Args:
        embedding: the base's input embedding, `(B, L)` ids to `(B, L, H)`. It is called, not read, because some scale
            their rows, and it stays its owner's: it is not part of this module.
        base: whose it is, and whose layers some methods change for each row; None where there is no base here. It stays
            its owner's as well.

    Attributes:
        encoders: by name.
        active: the name of the adapter in use; `""` for none.
        enabled: False within `PromptedCausalLM.disable_adapter()`.
    """

    embedding: nn.Module
    base: PreTrainedModel | None

    def __init__(self, embedding: nn.Module, base: PreTrainedModel | None = None) -> None:
        super().__init__()
        vars(self).update(embedding=embedding, base=base, _own=base and base.get_input_embeddings())
        self.encoders = nn.ModuleDict()
        self.active = ""
        self.enabled = True
        self._configs: dict[str, MethodConfig] = {}
        self.eval()  # as a loaded model of `transformers`

    @property
    def in_use(self) -> bool:
        """Whether an adapter is active and not disabled."""
        return self.enabled and bool(self.active)

    @property
    def changes_layers(self) -> bool:
        """Whether the active adapter changes the base's layers for all rows alike."""
        return bool(self.active) and self[self.active].config.changes_layers

    def __getitem__(self, name: str) -> PromptEncoder:
        if not isinstance(name, str) or name not in self.encoders:
            raise PtmoeError(f"no adapter {name!r}{near(str(name), self.encoders)}")
        return cast(PromptEncoder, self.encoders[name])

    def check_addable(self, name: str, config: MethodConfig) -> None:
        """
        Raises:
            PtmoeError: a name that cannot be used, or adapters that one model cannot hold together.
        """
        # An nn.ModuleDict holds no key that is one of its own attributes, "train" or "training".
        if not isinstance(name, str) or name in ("", BASE) or "." in name or hasattr(nn.ModuleDict(), name):
            raise PtmoeError(f"adapter name {name!r} cannot be used: choose another word, without dots")
        if name in self.encoders:
            raise PtmoeError(f"adapter {name!r} is there already: choose another name or delete_adapter({name!r})")
        if self.encoders and (config.changes_layers or self.changes_layers):
            changing = config if config.changes_layers else self[self.active].config
            raise PtmoeError(
                f"{changing.method} changes the base's layers, so a model holds one such adapter and no other; this "
                f"one holds {', '.join(self.encoders)}: use a base of its own, or delete_adapter"
            )

    def add(self, name: str, encoder: PromptEncoder) -> None:
        """Add an encoder that `check_addable` allows; it is not active, and does not train before it is."""
        # Thousands of adapters share a few configs.
        key = encoder.config.method + encoder.config.model_dump_json()
        encoder.config = self._configs.setdefault(key, encoder.config)
        encoder.place(cast(Tensor, self.embedding.weight).device)
        self.encoders[name] = encoder.train(self.encoders.training).requires_grad_(False)

    def activate(self, name: str) -> None:
        """Make an adapter the one that is used where no `adapter_names` are given, and the one that trains."""
        encoder = self[name]
        if self.active in self.encoders:
            self[self.active].requires_grad_(False)
        encoder.requires_grad_(True)
        self.active = name

    def remove(self, name: str) -> None:
        """
        Raises:
            PtmoeError: no such adapter, the active one, or one that cannot be taken out of its base (`ft`).
        """
        encoder = self[name]
        if name == self.active and not self.changes_layers:
            raise PtmoeError(f"adapter {name!r} is active: set_adapter to another first")
        encoder.remove()
        if name == self.active:
            self.active = ""
        del self.encoders[name]

    def load(self, path: str | Path, name: str, *, revision: str | None = None) -> None:
        """Add a saved adapter that may share a batch with the others.

        Args:
            path: an adapter folder, a run folder that holds one, or the name of a Hub repository.
            name: for `adapter_names`.
            revision: of the Hub repository.

        Raises:
            PtmoeError: a folder that is not a whole adapter, one of another base, or a method that needs a base where
                there is none, or one of its own.
        """
        saved = read_adapter(local_folder(path, revision))
        config, weight = saved.config, cast(Tensor, self.embedding.weight)
        if not needs_no_base(config) and not (config.changes_rows and self.base is not None):
            what = "its base model's layers" if self.base is None else "a base model of its own"
            raise PtmoeError(f"{saved.folder} is a {config.method} adapter, which needs {what}")
        self.check_addable(name, config)
        saved.base.check(weight, saved.folder, None)
        if needs_no_base(config):
            encoder = config.build(weight.shape[1])
            encoder.load_tensors(saved.tensors)
        else:
            encoder = saved.encoder_for(cast(PreTrainedModel, self.base))
        with encoder.removed_on_failure():
            self.add(name, encoder)

    def encode(self, embeds: Tensor, input_mask: Tensor, adapter_names: Sequence[str] | None = None) -> Prompts:
        """The prompts of a batch, each row's from its own adapter.

        Args:
            embeds: `(B, L, H)`.
            input_mask: `(B, L)`, true at the tokens that decide the prompt.
            adapter_names: one name for each row; None is the active adapter for all, or no prompt where there is none.

        Raises:
            PtmoeError: an unknown name, or adapters that cannot share a batch.
        """
        if isinstance(adapter_names, str):
            raise PtmoeError(f"adapter_names={adapter_names!r}: give a list, one name for each row")
        if adapter_names is None:
            adapter_names = [self.active or BASE] * len(embeds)
        elif self.changes_layers and set(adapter_names) != {self.active}:
            raise PtmoeError(
                f"adapter_names={list(adapter_names)!r:.80}: {self[self.active].config.method} changes the layers that "
                "all rows go through, so a batch has one adapter; mixed batches are for prompts, and disable_adapter() "
                "is for the base"
            )
        if len(adapter_names) != len(embeds):
            raise PtmoeError(f"adapter_names has {len(adapter_names)} names for {len(embeds)} rows: give one each")
        names = list(dict.fromkeys(adapter_names)) if self.enabled else [BASE]
        # The soft prompt is composed in float32 whatever the mixed precision around it.
        with torch.autocast(embeds.device.type, enabled=False):
            if len(names) == 1 and names[0] != BASE:
                prompt = self[names[0]](embeds, input_mask)
                return Prompts(**vars(prompt))
            rows = {
                name: torch.tensor([row for row, other in enumerate(adapter_names) if other == name])
                for name in names
                if name != BASE
            }
            return self._mixed(embeds, input_mask, {name: index.to(embeds.device) for name, index in rows.items()})

    def _mixed(self, embeds: Tensor, input_mask: Tensor, rows: dict[str, Tensor]) -> Prompts:
        """Prompts of several adapters, `rows` the indices of each one's; the other rows get none."""
        parts: list[tuple[Tensor, Prompt]] = []
        for name, index in rows.items():
            prompt: Prompt = self[name](embeds[index], input_mask[index])
            if prompt.cache is not None:
                raise PtmoeError(
                    f"adapter {name!r} ({self[name].config.method}) fills the key-value cache of all rows and cannot "
                    "be mixed in a batch: give it a batch of its own"
                )
            parts.append((index, prompt))
        return Prompts.mixed(embeds, parts)

    def embed(self, input_ids: Tensor) -> Tensor:
        """`(B, L)` ids to `(B, L, H)`.

        Raises:
            PtmoeError: an id without an embedding, or a base that has got another embedding since.
        """
        if self.base is not None and self.base.get_input_embeddings() is not vars(self)["_own"]:
            raise PtmoeError(
                "the base's input embedding was replaced after adapters were attached, which belong to the one before: "
                "attach them, or load them, again"
            )
        rows = getattr(self.embedding, "num_embeddings", None)
        if rows is not None and input_ids.numel():
            for token in torch.stack(input_ids.aminmax()).tolist():
                if not 0 <= token < rows:
                    raise PtmoeError(f"input_ids: {without_embedding(token, rows)}")
        return cast(Tensor, self.embedding(input_ids))

    def compose(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> tuple[Spliced, Prompts]:
        """A batch with its prompts in place, as a base model takes it.

        Args:
            input_ids: `(B, L)`.
            attention_mask: `(B, L)`, 1 at real tokens, padding on either side; all ones by default.
            input_mask: `(B, L)`, the tokens that the router may read; all real ones by default.
            adapter_names: as in `encode`.

        Raises:
            PtmoeError: shapes that do not agree, and as `encode`.
        """
        check_shapes(input_ids, attention_mask=attention_mask, input_mask=input_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeds = self.embed(input_ids)
        readable = attention_mask.bool() if input_mask is None else input_mask.bool() & attention_mask.bool()
        prompts = self.encode(embeds, readable, adapter_names)
        return splice(prompts.embeds, prompts.lengths, embeds, attention_mask), prompts


def check_shapes(input_ids: Tensor, **others: Tensor | None) -> None:
    """
    Raises:
        PtmoeError: what is no tensor, `input_ids` that are not `(B, L)` or empty, or another of another shape.
    """
    for name, given in {"input_ids": input_ids, **others}.items():
        if given is not None and not isinstance(given, Tensor):
            raise PtmoeError(f"{name} is a {type(given).__name__}: needs a tensor; give other arguments by name")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise PtmoeError(f"input_ids has shape {tuple(input_ids.shape)}: needs (batch, length), neither of them 0")
    for name, other in others.items():
        if other is not None and other.shape != input_ids.shape:
            raise PtmoeError(
                f"{name} has shape {tuple(other.shape)}, input_ids {tuple(input_ids.shape)}: make them equal"
            )
