"""What a training step costs on a GPU when its batch has a shape that the process has not seen, and when it has.

    python -m benchmarks.new_shapes

A random base of SmolLM2-135M's shape in bfloat16, PT-MoE in front of it, 16 rows of 12 to 256 tokens: the wall time of
a step, the time that its kernels run, and how many there are; with cuDNN's attention and without, packed and padded.
"""

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from ptmoe import PTMoEConfig, attach
from ptmoe.fast import attention
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.train.data import collate

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def batch(seed: int, rows: int, device: torch.device) -> dict[str, Tensor]:
    drawn = random.Random(seed)
    examples = []
    for _ in range(rows):
        length = min(256, int(12 * 2.718 ** (3 * drawn.random())))
        ids = torch.tensor([drawn.randrange(1, 49_000) for _ in range(length)])
        labels = ids.clone()
        labels[:-2] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return {name: value.to(device) for name, value in collate(examples).items()}


@contextmanager
def with_plans() -> Iterator[None]:
    """cuDNN's attention is not left out."""
    before, attention.attention_obstacle = attention.attention_obstacle, lambda _: "asked for"  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.attention_obstacle = before


def step(model: PromptedCausalLM, inputs: dict[str, Tensor]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    loss = model(**inputs).loss
    assert loss is not None
    loss.backward()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(name: str, model: PromptedCausalLM, batches: list[dict[str, Tensor]]) -> None:
    step(model, batches[0])
    new = [step(model, inputs) for inputs in batches[1:]]
    seen = [step(model, inputs) for inputs in batches[1:]]
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step(model, batches[1])
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time for event in kernels) / 1e6
    print(
        f"{name:32} new shape {sorted(new)[len(new) // 2]:.3f} s, seen {sorted(seen)[len(seen) // 2]:.3f} s, "
        f"{len(kernels)} kernels of {busy:.3f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--shapes", type=int, default=8)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this is about CUDA devices, and there is none")
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), torch.__version__)
    with device:
        base = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    config = PTMoEConfig(num_virtual_tokens=20, num_experts=5, rank=12, recipe="paper")
    model = attach(base, config).train()
    for packed in (True, False):
        model.packing = packed
        how = "packed" if packed else "padded"
        # Other batches for each, for a shape stays seen.
        first = 1000 * packed
        batches = [batch(first + seed, chosen.rows, device) for seed in range(2 * chosen.shapes)]
        measure(f"{how}, without cuDNN's attention", model, batches[: chosen.shapes])
        with with_plans():
            measure(f"{how}, with it", model, batches[chosen.shapes :])


if __name__ == "__main__":
    main()
