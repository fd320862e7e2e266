"""FFA-LoRA (Sun et al. 2024, arXiv:2403.12313), from `peft`: LoRA whose A keeps its random start; only B trains.

y = W x + (α / R) B A x                        A: (R, in), frozen; B: (out, R), zero at the start

Meant for federated and private training, where a sum of products B A is not the product of the sums: with one A for
all, the B of several clients may be averaged, and noise is not squared. Unlike LoRA-FA it has no optimizer of its own.
"""

from ptmoe.methods.lora import LoRAFamilyConfig


class FFALoRAConfig(LoRAFamilyConfig):
    """FFA-LoRA: `R·out` trainable parameters for each target module."""

    method = "ffa-lora"
    order = 530
    default_learning_rate = 0.1
    rated_width = None
    frozen = "lora_A"
