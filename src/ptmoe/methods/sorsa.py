"""SORSA (Cao & Song 2024, arXiv:2409.00055): PiSSA whose singular vectors are kept orthonormal by a regulariser.

W = U Σ Vᵀ,  W' = W - U_R Σ_R V_Rᵀ
y = (W' + U diag(σ) Vᵀ) x          from U_R, Σ_R, V_R; U (out, R), σ (R,), V (in, R) trained
loss + γ Σ (‖Uᵀ U - I‖ + ‖Vᵀ V - I‖)            over the target modules; Frobenius norms

`peft` has PiSSA's two factors, `A (R, in)` and `B (out, R)`, each with the root of σ in it. Here the vectors are their
rows and columns at unit length and σ is what remains, so the regulariser acts on angles alone; in the paper, where σ
stands apart, it acts on lengths too. The paper's γ has a rate of its own; here it is a weight in the loss.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ptmoe.methods.base import Prompt
from ptmoe.methods.pissa import PiSSAConfig, Residual


class SORSA(Residual):
    config: "SORSAConfig"

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        prompt = super().forward(input_embeds, input_mask)
        if self.training:
            vectors = [one if "lora_A" in name else one.T for name, one in self.named_parameters()]
            distances = torch.stack([skew(rows).to(input_embeds.device) for rows in vectors])
            prompt.auxiliary_loss = self.config.gamma * distances.sum()
        return prompt


def skew(rows: Tensor) -> Tensor:
    """How far the directions of rows `(R, n)` are from orthogonal: the norm of the cosines between them."""
    unit = nn.functional.normalize(rows, dim=1)
    distance: Tensor = torch.linalg.matrix_norm(unit @ unit.T - torch.eye(len(rows), device=rows.device))
    return distance


class SORSAConfig(PiSSAConfig):
    """SORSA: `R·(in + out)` trainable parameters for each target module.

    Attributes:
        gamma: `γ`, the weight of the regulariser.
    """

    method = "sorsa"
    order = 420
    default_learning_rate = 1e-2
    rated_width = None
    encoder_class = SORSA
    adds_loss = True
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
