"""How well the start of PT-MoE's router holds for examples that it was not made from, before any training.

    python -m benchmarks.routing_start --model smollm2 --task mixture/classification --data-dir DATA --experts 3 \
        --examples 168 --max-length 96

Of five random halves of the examples one makes the start and the other is routed by it. Printed are a row of means over
these: the share of the other half whose domain is the most frequent one of its expert, and the mean cosine of the
gradients of two examples of one expert and of two experts; and the p of `router_test` on all examples.
"""

import argparse
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor

from ptmoe.methods.pt_moe import PTMoE, PTMoEConfig
from ptmoe.models.attach import attach
from ptmoe.models.bases import load_base, quiet
from ptmoe.tasks import load_task
from ptmoe.train.data import collate, fit
from ptmoe.train.routing import mean_inputs, prompt_gradients, sample_batches, start_router

HALVES = 5
ROWS = 8  # computed at once


def started(config: PTMoEConfig, means: Tensor, gradients: Tensor, seed: int) -> tuple[PTMoE, float]:
    """An encoder whose router starts from these examples, and what `start_router` returns."""
    encoder = config.build(means.shape[1])
    encoder.router.initialise(torch.Generator().manual_seed(seed))
    encoder.router.standardize(means)
    return encoder, float(start_router(encoder, means, gradients, torch.Generator().manual_seed(seed)))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="nano")
    arguments.add_argument("--task", default="nano/mixed")
    arguments.add_argument("--data-dir")
    arguments.add_argument("--experts", type=int, default=4)
    arguments.add_argument("--examples", type=int, default=384)
    arguments.add_argument("--max-length", type=int, default=512)
    arguments.add_argument("--dtype", default="auto")
    given = arguments.parse_args()
    quiet()
    base, tokenizer = load_base(given.model, dtype=given.dtype)
    examples = load_task(given.task, "train", given.data_dir)
    rows = fit(examples, tokenizer, given.max_length)
    if len(rows) < len(examples):
        raise SystemExit(f"{len(examples) - len(rows)} examples do not fit: raise --max-length")
    count = min(given.examples, len(rows))
    domains: Any = sample_batches([example.domain for example in examples], cast(Any, list), count, count)[0]
    config = PTMoEConfig(num_virtual_tokens=20, rank=12, num_experts=given.experts)
    model = attach(base, config, tokenizer=tokenizer)
    batches: list[dict[str, Any]] = sample_batches(rows, collate, ROWS, count)
    means = torch.cat([mean_inputs(model, batch) for batch in batches]).float()
    gradients = torch.cat([prompt_gradients(model, batch) for batch in batches])
    domain, same, other = [], [], []
    for seed in range(HALVES):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        first, second = order[: count // 2], order[count // 2 :]
        encoder, _ = started(config, means[first], gradients[first], seed)
        expert = encoder.router(means[second], 0.0).argmax(1)
        cosines = gradients[second] @ gradients[second].T
        shared = expert[:, None] == expert
        distinct = ~torch.eye(len(second), dtype=torch.bool)
        same.append(cosines[shared & distinct].mean())
        if not shared.all():
            other.append(cosines[~shared].mean())
        taken = [Counter(domains[int(i)] for i in second[expert == k]) for k in range(given.experts)]
        domain.append(sum(max(each.values(), default=0) for each in taken) / len(second))
    own = f"{100 * sum(domain) / HALVES:.0f} %" if len(set(domains)) > 1 else "–"
    apart = f"{sum(other) / len(other):.3f}" if other else "–"
    _, chance = started(config, means, gradients, 0)
    print(
        f"| {given.task} | {count} | {given.experts} | {own} | {sum(same) / HALVES:.3f} | {apart} | {chance:.3f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
