"""EDoRA (Nasiri & Garraghan 2025, arXiv:2501.12067): DoRA whose direction changes by a small matrix between the leading
singular vectors of the weight.

W = U Σ Vᵀ
y = m ⊙ (W + B M A) / ‖W + B M A‖ x + b         A = Σ_R V_Rᵀ (R, in), B = U_R (out, R), both frozen; M (R, R), m (out,)

‖·‖ (out,) is the norm of each row, m starts at ‖W‖ and M as in LoRA-XS: the base is as it was to five digits. As the
factors are W's own, the norms need no product of the size of W: ‖W + B M A‖² = ‖W‖² + ‖B (I + M) Σ_R‖² - ‖B Σ_R‖².
The paper leaves open which way norms are taken and whether they have a gradient: here as in `peft`'s DoRA, for each
output, and as constants.
"""

from typing import cast

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.lora_xs import LoRAXSConfig, LoRAXSPart
from ptmoe.methods.parts import weight_of


class EDoRAPart(LoRAXSPart):
    """Tensors: `M (R, R)`, `magnitude (out,)`; frozen `A (R, in)`, `B (out, R)`, `squares (out,)`, of W's norms."""

    squares: Tensor

    def __init__(self, config: "EDoRAConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.magnitude = nn.Parameter(torch.empty(out_features))
        self.register_buffer("squares", torch.empty(out_features))

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        super().initialise(module, generator)
        self.squares.copy_(weight_of(module).float().square().sum(1))
        self.magnitude.copy_(self.squares.sqrt())

    @torch.no_grad()
    def norms(self) -> Tensor:
        """`(out,)`, of the rows of `W + B M A`."""
        values: Tensor = torch.linalg.vector_norm(self.A, dim=1)
        before = self.B * values  # U_R Σ_R
        with torch.autocast(self.M.device.type, enabled=False):
            after = before + self.B @ self.M * values
        # A row of zeros stays one.
        return (self.squares + (after.square() - before.square()).sum(1)).clamp(min=1e-30).sqrt()

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        bias = cast("Tensor | None", module.bias)
        if bias is not None and bias.is_meta and not output.is_meta:
            raise PtmoeError(
                "edora takes a module's bias off its output, and this base's are offloaded: load it without offloading"
            )
        plain = output.float() if bias is None else output.float() - bias
        factor = self.magnitude / self.norms()
        return (factor - 1) * plain + factor * super().forward(x, output, module)


class EDoRAConfig(LoRAXSConfig):
    """EDoRA: `R² + out` trainable parameters for each target module."""

    method = "edora"
    order = 440
    default_learning_rate = 3e-2
    part_class = EDoRAPart
