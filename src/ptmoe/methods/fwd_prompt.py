"""Fwd-Prompt (Zheng et al. 2024, arXiv:2401.09181), its single-prompt part: tasks in sequence, whose prompt changes
only outside the span of earlier prompts.

P = P_0 + (C - P_0)(I - Uᵀ U)                  P_0, C: (T, H), U: (k, H), U Uᵀ = I

P_0 is the prompt of the last earlier task, and U the leading right singular vectors of all earlier prompts, one below
the other, that hold `energy` of their squared norm. So the gradient at C is that at the prompt, projected away from
them, and whatever an optimizer makes of it, P - P_0 is orthogonal to them. The adapter folder holds P, as that of `pt`.

The paper has a pool of prompts, and projects their gradient away from earlier tasks and onto the subspace of what was
pretrained, both from an SVD of input embeddings. Here there is one prompt, the subspace to stay away from is that of
the earlier prompts themselves, and the second projection is left out. Without earlier prompts it is `pt`.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import InitialEmbeddings, Prompt
from ptmoe.methods.pt import PT, PTConfig


class FwdPromptConfig(PTConfig):
    """Prompt tuning for tasks in sequence: `T·H` trainable parameters.

    Attributes:
        earlier: adapter folders of `pt` or `fwd-prompt`, the first task's first; the prompt starts from the last, which
            has `num_virtual_tokens` as well.
        energy: the share of the earlier prompts' squared norm that is kept from change, at most 1.
    """

    method = "fwd-prompt"
    order = 340
    figure_color = ("#7a3b00", "#c98a4b")
    figure_marker = "p"
    earlier: list[str] = []
    energy: Annotated[float, Field(gt=0, le=1)] = 0.95

    def build(self, hidden_size: int) -> "FwdPrompt":
        return FwdPrompt(self, hidden_size)


class FwdPrompt(PT):
    """Tensors: `prompt (T, H)`; while training, `start (T, H)` and `basis (k, H)`, and `prompt` is C."""

    config: FwdPromptConfig

    def __init__(self, config: FwdPromptConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size)
        self.register_buffer("start", None)
        self.register_buffer("basis", None)
        self.start: Tensor | None
        self.basis: Tensor | None

    def fixed_prompts(self) -> Tensor:
        if self.start is None or self.basis is None:
            return super().fixed_prompts()
        change = self.prompt - self.start
        return (self.start + (change - change @ self.basis.T @ self.basis))[None]

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        if self.basis is None and self.config.earlier and self.training and torch.is_grad_enabled():
            raise PtmoeError(
                "a loaded fwd-prompt knows no directions of earlier prompts, so training would change what they do: "
                "attach a new one, whose earlier names this folder as well"
            )
        return super().forward(input_embeds, input_mask)

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        if not self.config.earlier:
            super().initialise(source)
            return
        assert source.read_prompt is not None
        prompts = [source.read_prompt(folder).float() for folder in self.config.earlier]
        if prompts[-1].shape != self.prompt.shape:
            needed, found = tuple(self.prompt.shape), tuple(prompts[-1].shape)
            raise PtmoeError(
                f"the prompt starts from {self.config.earlier[-1]}, of shape {found}, and needs {needed}: set "
                f"num_virtual_tokens={found[0]}"
            )
        _, values, right = torch.linalg.svd(torch.cat(prompts).double(), full_matrices=False)
        held = values.square().cumsum(0)
        kept = int((held < (self.config.energy - 1e-12) * held[-1]).sum()) + 1
        if kept == self.prompt.shape[1]:
            raise PtmoeError(
                f"energy={self.config.energy}: the earlier prompts take all {kept} dimensions of the embeddings, so "
                "nothing is left to train: lower energy"
            )
        self.prompt.copy_(prompts[-1])
        device = self.prompt.device
        self.start, self.basis = self.prompt.detach().clone(), right[:kept].float().contiguous().to(device)

    def tensors(self) -> dict[str, Tensor]:
        return {"prompt": self.fixed_prompts()[0].detach()}

    def training_state(self) -> dict[str, Tensor]:
        return {} if self.basis is None else dict(self.state_dict())

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(state)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict(tensors, strict=self.basis is None)
