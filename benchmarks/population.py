"""Many soft prompts trained at once on one real model, to search learning rates, lengths and recipes.

    python -m benchmarks.population --plan benchmarks/real/search.yaml --output docs/results/search.jsonl

Prompts of different adapters share a batch, so the base computes the rows of all of them in one pass: a step of many
prompts costs little more than a step of one on a GPU that one prompt leaves idle. Each has its own data order,
optimizer, schedule and router, and its gradients are those that it would have alone: the loss is summed over supervised
tokens, and each adapter's gradient divided by the number of its own.

The plan, a YAML file, has `model`, `task`, `max_steps`, `batch_size`, `max_length`, `judged` ({split: examples}, after
the last step, and after every `evaluate_every` steps for all but `test`) and `runs`, a list of `{label, method: {name,
…}, learning_rate: […], seeds: n or a list}`. With `domains` a run is trained once on each of them alone, and judged on
it; its `batch_size` is the plan's unless it has its own. `experts_of`, a list of domains, takes the place of its
router: the first domain's inputs get the first expert, and so on. An answer is right if every token of the completion,
its end included, is the most likely one, which is what greedy decoding then writes. A line for each run and evaluation
is written as it comes; `experts` in it says how many inputs of each domain each expert got.
"""

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ptmoe.fast.loss import IGNORED
from ptmoe.fast.paths import fast_kernels
from ptmoe.methods import METHODS
from ptmoe.methods.base import Routing
from ptmoe.methods.routing import RoutedEncoder
from ptmoe.models.attach import attach
from ptmoe.models.bases import load_base, quiet
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.settings import read_yaml
from ptmoe.tasks import load_task
from ptmoe.train.data import collate, fit
from ptmoe.train.routing import RoutingCallback

WARMUP = 0.1  # of the steps, as in `ptmoe train`
CLIPPED = 1.0


class Greedy:
    """Told of the supervised tokens' predictions, keeps which of them are the most likely, and their losses."""

    def __init__(self) -> None:
        self.right: list[Tensor] = []
        self.losses: list[Tensor] = []

    @torch.no_grad()
    def add(self, scores: Tensor, targets: Tensor) -> None:
        self.right.append(scores.argmax(-1) == targets)
        self.losses.append(nn.functional.cross_entropy(scores.float(), targets, reduction="none"))


class Member:
    """One adapter of the population, with all that is its own."""

    def __init__(
        self,
        model: PromptedCausalLM,
        number: int,
        run: dict[str, Any],
        plan: Any,
        rows: list[int],
        tokenizer: Any,
        *,
        rate: float,
        seed: int,
        domain: str | None = None,
    ) -> None:
        self.name, self.rate, self.seed, self.domain = f"member{number}", rate, seed, domain
        self.rows, self.batch_size = rows, run.get("batch_size", plan.batch_size)
        self.label = str(run["label"])
        entry = dict(run["method"])
        self.config = METHODS[entry.pop("name")](**entry)
        attach(model, self.config, seed=seed, tokenizer=tokenizer, adapter_name=self.name, check=number == 0)
        self.encoder = model.adapters[self.name]
        self.experts_of, self.experts = run.get("experts_of"), torch.empty(0)
        if self.experts_of is not None:
            self.encoder.route = self.given_route  # type: ignore[assignment]
        self.parameters = list(self.encoder.parameters())
        self.steps = plan.max_steps
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0, fused=True)
        warmup = max(1, round(WARMUP * self.steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, max(0.0, (self.steps - step) / max(1, self.steps - warmup))),
        )
        self.random = random.Random(seed)
        self.order: list[int] = []
        self.callback = RoutingCallback(progress=lambda *_: None)
        self.arguments = SimpleNamespace(
            per_device_train_batch_size=plan.batch_size * 8, gradient_accumulation_steps=1, world_size=1, seed=seed
        )
        self.arguments.disable_tqdm, self.arguments.learning_rate = True, rate
        self.state = SimpleNamespace(global_step=0, max_steps=self.steps, is_world_process_zero=True)
        self.losses: list[float] = []

    def given_route(self, *_: Any, **__: Any) -> Routing:
        """Of the rows that `experts` was set for."""
        chosen = nn.functional.one_hot(self.experts, len(cast(RoutedEncoder, self.encoder).expert_prompts()))
        return Routing(chosen.float(), chosen.float())

    def batch(self) -> list[int]:
        while len(self.order) < self.batch_size:
            part = list(self.rows)
            self.random.shuffle(part)
            self.order += part
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return chosen

    def as_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "method": self.config.method,
            "config": self.config.model_dump(),
            "learning_rate": self.rate,
            "seed": self.seed,
            "domain": self.domain,
            "batch_size": self.batch_size,
            "parameters": sum(tensor.numel() for tensor in self.encoder.tensors().values()),
        }


def computed(
    model: PromptedCausalLM, rows: list[tuple[dict[str, Any], str, Member]], limit: int, backward: bool
) -> tuple[list[bool], list[float], list[int]]:
    """Whether each row's completion is what greedy decoding writes, the sum of its tokens' losses, and the expert that
    it got (-1 where rows of several adapters share a batch, or none is routed); with `backward` the gradients of these
    sums are added to the members'. At most `limit` padded tokens are computed at once."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]["input_ids"]))
    right, losses, experts = [False] * len(rows), [0.0] * len(rows), [-1] * len(rows)
    virtual = max(member.config.num_virtual_tokens for *_, member in rows)
    part: list[int] = []

    def flush() -> None:
        batch = {key: value.to(model.device) for key, value in collate([rows[i][0] for i in part]).items()}
        for member in {rows[i][2] for i in part}:
            if member.experts_of is not None:
                experts_of = [member.experts_of.index(rows[i][1]) for i in part if rows[i][2] is member]
                member.experts = torch.tensor(experts_of, device=model.device)
        greedy = Greedy()
        with torch.set_grad_enabled(backward):
            output = model(
                **batch,
                adapter_names=[rows[i][2].name for i in part],
                num_items_in_batch=1,
                skip_logits=True,
                token_statistics=greedy,
            )
        if backward:
            output.loss.backward()
        counts = (batch["labels"] != IGNORED).sum(1).tolist()
        correct, costs = torch.cat(greedy.right).tolist(), torch.cat(greedy.losses).tolist()
        if output.routing is not None:
            for i, expert in zip(part, output.routing.probabilities.argmax(1).tolist(), strict=True):
                experts[i] = expert
        start = 0
        for i, count in zip(part, counts, strict=True):
            right[i], losses[i] = all(correct[start : start + count]), sum(costs[start : start + count])
            start += count

    for i in order:
        if part and (len(part) + 1) * (len(rows[i][0]["input_ids"]) + virtual) > limit:
            flush()
            part = []
        part.append(i)
    flush()
    return right, losses, experts


def examined(
    plan: Any, split: str, count: int | None, tokenizer: Any, data_dir: str | None
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """The rows of a split's first examples, and their domains, in the order of their ids, as `real.table --lines`."""
    examples = sorted(load_task(plan.task, split, data_dir)[:count], key=attrgetter("id"))
    rows = fit(examples, tokenizer, plan.max_length)
    if len(rows) < len(examples):
        raise SystemExit(f"{len(examples) - len(rows)} examples of {split} do not fit: raise max_length")
    return [rows[i] for i in range(len(rows))], [example.domain or plan.task for example in examples]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--plan", type=Path, required=True)
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--data-dir")
    arguments.add_argument("--model")
    arguments.add_argument("--at-once", type=int, default=49152, help="padded tokens computed at once")
    arguments.add_argument(
        "--seconds", type=float, default=float("inf"), help="of training; then it is judged as it is"
    )
    arguments.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "auto")
    given = arguments.parse_args()
    quiet()
    plan = SimpleNamespace(**read_yaml(given.plan))
    base, tokenizer = load_base(given.model or plan.model, dtype=given.dtype)
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    with fast_kernels(base):
        train(given, plan, base, tokenizer)


def train(given: argparse.Namespace, plan: Any, base: Any, tokenizer: Any) -> None:
    started = time.monotonic()
    model = PromptedCausalLM(base)
    model.packing = None if base.device.type == "cpu" else False
    data, data_domains = examined(plan, "train", None, tokenizer, given.data_dir)
    judged = {split: examined(plan, split, count, tokenizer, given.data_dir) for split, count in plan.judged.items()}
    members: list[Member] = []
    for run in plan.runs:
        for rate in run["learning_rate"] if isinstance(run["learning_rate"], list) else [run["learning_rate"]]:
            seeds = run.get("seeds", 1)
            for seed in seeds if isinstance(seeds, list) else range(seeds):
                for domain in run.get("domains", [None]):
                    rows = [i for i, name in enumerate(data_domains) if domain in (None, name)]
                    if not rows:
                        raise SystemExit(f"{run['label']}: no example of domain {domain!r}: {sorted({*data_domains})}")
                    own = {"rate": float(rate), "seed": seed, "domain": domain}
                    members.append(Member(model, len(members), run, plan, rows, tokenizer, **own))
    for member in members:
        member.encoder.requires_grad_(True)
    print(f"{len(members)} members, {len(data)} rows, {time.monotonic() - started:.0f} s", flush=True)
    loader = DataLoader(cast(Any, data), batch_size=plan.batch_size, collate_fn=collate)  # the router's start reads it

    def hook(event: str, member: Member) -> None:
        if isinstance(member.encoder, RoutedEncoder) and member.experts_of is None:
            model.adapters.active = member.name
            getattr(member.callback, event)(member.arguments, member.state, None, model=model, train_dataloader=loader)

    def evaluate(step: int, split: str) -> None:
        model.eval()
        examples, domains = judged[split]
        for member in members:
            asked = [i for i, domain in enumerate(domains) if member.domain in (None, domain)]
            rows = [(examples[i], domains[i], member) for i in asked]
            right, losses, experts = computed(model, rows, 4 * given.at_once, False)
            scores: dict[str, list[bool]] = defaultdict(list)
            chosen: dict[str, Counter[int]] = defaultdict(Counter)
            for i, found, expert in zip(asked, right, experts, strict=True):
                scores[domains[i]].append(found)
                chosen[domains[i]][expert] += 1
            line = member.as_dict() | {
                "task": plan.task,
                "step": step,
                "steps": plan.max_steps,
                "split": split,
                "examples": len(right),
                "accuracy": round(100 * sum(right) / len(right), 2),
                "loss": round(sum(losses) / len(losses), 4),
                "training_loss": round(sum(member.losses[-50:]) / len(member.losses[-50:]), 4),
                "domains": {name: round(100 * sum(found) / len(found), 1) for name, found in scores.items()},
                "right": "".join("01"[found] for found in right),
                "seconds": round(time.monotonic() - started, 1),
            }
            if isinstance(member.encoder, RoutedEncoder):
                line["routing"] = member.encoder.training_log()
                numbers = range(len(member.encoder.expert_prompts()))
                line["experts"] = {name: [counts[i] for i in numbers] for name, counts in chosen.items()}
            with given.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
        model.train()

    given.output.parent.mkdir(parents=True, exist_ok=True)
    model.train()
    for member in members:
        hook("on_train_begin", member)
    for step in range(plan.max_steps):
        batch: list[tuple[dict[str, Any], str, Member]] = []
        for member in members:
            member.state.global_step = step
            hook("on_step_begin", member)
            batch += [(data[i], data_domains[i], member) for i in member.batch()]
        _, losses, _ = computed(model, batch, given.at_once, True)
        first = 0
        for member in members:
            part = slice(first, first + member.batch_size)
            first += member.batch_size
            tokens = sum(int((row["labels"] != IGNORED).sum()) for row, *_ in batch[part])
            member.losses.append(sum(losses[part]) / tokens)
            torch._foreach_div_([p.grad for p in member.parameters if p.grad is not None], tokens)
            nn.utils.clip_grad_norm_(member.parameters, CLIPPED, foreach=True)
            member.optimizer.step()
            member.schedule.step()
            member.optimizer.zero_grad()
        done, late = step + 1, time.monotonic() - started > given.seconds
        if done % 20 == 0 or done < 4:
            print(f"step {done}: {time.monotonic() - started:.1f} s", flush=True)
        if done == plan.max_steps or late:
            break
        if done % plan.evaluate_every == 0:
            for split in judged:
                if split != "test":
                    evaluate(done, split)
    for member in members:
        hook("on_train_end", member)
    for split in judged:
        evaluate(done, split)
    print(f"done after {done} steps in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
