"""`ptmoe generate`, `inspect` and `convert`."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ptmoe.errors import PtmoeError

if TYPE_CHECKING:
    from ptmoe.runs.records import RoutingSummary


def generate(
    adapter: Path,
    prompts: list[str] | None,
    base: dict[str, Any],
    options: dict[str, Any],
    *,
    seed: int | None,
    chat: bool | None,
    show_routing: bool,
) -> None:
    """Print a completion of each prompt; an empty line for an empty prompt."""
    prompts = prompts or [line.rstrip("\n") for line in sys.stdin]
    if not any(prompt.strip() for prompt in prompts):
        raise PtmoeError("no prompt: give one as an argument, or lines on standard input")

    import torch

    from ptmoe.evaluate.generation import end_tokens
    from ptmoe.models.attach import load_run
    from ptmoe.models.bases import quiet
    from ptmoe.tasks.base import Example
    from ptmoe.tasks.tokens import encode_prompt

    quiet()
    loaded = load_run(adapter, **base)
    model, tokenizer = loaded.model, loaded.tokenizer
    chat = bool(loaded.chat) if chat is None else chat
    ends = {"eos_token_id": sorted(end_tokens(model, tokenizer)) or None, "pad_token_id": tokenizer.pad_token_id}
    if seed is not None:
        torch.manual_seed(seed)
    for prompt in prompts:
        if not prompt.strip():
            print()
            continue
        encoded = encode_prompt(Example("", prompt, "", (), ""), tokenizer, chat=chat)
        assert encoded is not None  # without a limit every prompt fits
        ids = torch.tensor([encoded.ids], device=model.device)
        completed = model.generate(input_ids=ids, **ends, **options)
        print(tokenizer.decode(completed[0, ids.shape[1] :], skip_special_tokens=True))
        routing = model.route(ids) if show_routing else None
        if routing is not None:
            gate = ", ".join(f"{value:.3f}" for value in routing.gate[0].tolist())
            print(f"expert {int(routing.gate[0].argmax())}, gate [{gate}]", file=sys.stderr)


def inspect(
    adapter: Path, task: str, split: str, data: dict[str, Any], base: dict[str, Any], output_dir: Path | None
) -> None:
    from ptmoe.cli.evaluation import report_run
    from ptmoe.models.attach import load_run
    from ptmoe.models.bases import quiet
    from ptmoe.runs.folders import INSPECT_FOLDER, NEAREST_FILE, ROUTING_FILE, is_run
    from ptmoe.tasks import load_task, task_named
    from ptmoe.tasks.tokens import uses_chat

    examples = load_task(task, split, **data)
    quiet()
    loaded = load_run(adapter, **base)
    model, tokenizer = loaded.model, loaded.tokenizer

    from ptmoe.evaluate.nearest_words import nearest_words
    from ptmoe.evaluate.routing import expert_similarity, route_examples, summarise_routing
    from ptmoe.report import routing_figures
    from ptmoe.report.theme import drawing

    chat = uses_chat(task_named(task), tokenizer, loaded.chat)
    gates = route_examples(model, tokenizer, examples, chat=chat)
    domains = [example.domain for example in examples]
    routing = summarise_routing(
        gates, domains, similarity=expert_similarity(model.encoder), soft_gate=model.method_config.soft_gate
    )
    console = Console()
    nearest = nearest_words(model, tokenizer)
    folder = output_dir or adapter / INSPECT_FOLDER
    if routing is None and not nearest.experts:
        raise PtmoeError(
            f"{adapter} is a {model.method_config.method} adapter: it has neither a gate of each input nor virtual "
            "tokens in the embeddings' space, there is nothing to show"
        )
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"{model.method_config.method} on {task}, {len(examples):,} inputs")
    if routing is None:
        console.print("it does not route: one prompt serves every input")
    else:
        show_routing(console, routing, Counter(domains))
        routing.write(folder / ROUTING_FILE)
        with drawing():
            for name, figure in routing_figures(routing).items():
                figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    prompts = [f"expert {i}" for i in range(len(nearest.experts))] if len(nearest.experts) > 1 else ["prompt"]
    words = Table("virtual token", *prompts)
    for index, row in enumerate(zip(*nearest.experts, strict=True)):
        words.add_row(f"P_{index + 1}", *(" ".join(f"{word!r} {cosine:.2f}" for word, cosine in near) for near in row))
    console.print("the nearest words of the vocabulary, by cosine")
    console.print(words)
    nearest.write(folder / NEAREST_FILE)
    console.print(f"figures and numbers: {folder}")
    if output_dir is None and is_run(adapter):
        report_run(adapter, console)  # now with these words


def show_routing(console: Console, routing: RoutingSummary, examples: Mapping[str, int]) -> None:
    """Which expert each domain goes to, how evenly, and whether routing has collapsed; `examples` of each domain."""
    from ptmoe.runs.records import collapsed_expert

    experts = routing.num_experts
    table = Table("domain", *(f"expert {i}" for i in range(experts)))
    for domain, use in routing.use.items():
        table.add_row(domain or "all", *(f"{100 * share:.1f} %" for share in use))
    console.print(table)
    console.print(
        f"entropy of the use {routing.entropy:.3f} nats (even: {math.log(experts):.3f}), "
        f"mutual information of expert and domain {routing.mutual_information:.3f} nats"
    )
    shares = routing.overall_shares(examples)
    if collapsed_expert(shares) is not None:
        console.print(
            f"[bold]warning[/bold]: the routing has collapsed, one of {experts} experts takes "
            f"{100 * max(shares):.1f} % of the {'gate' if routing.is_soft else 'inputs'}"
        )
    similarity = Table("cosine of the prompts", *(f"expert {i}" for i in range(experts)))
    for index, row in enumerate(routing.prompt_similarity or []):
        similarity.add_row(f"expert {index}", *(f"{value:.3f}" for value in row))
    console.print(similarity)


def convert(source: Path, target: Path, model: str | None) -> None:
    """Write a pt adapter as peft's PROMPT_TUNING folder, or the reverse."""
    from ptmoe.adapters.folder import CONFIG_FILE, read_config_file
    from ptmoe.adapters.peft import from_peft, to_peft
    from ptmoe.models.bases import load_base, quiet

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PtmoeError(f"{target} already exists: name a new or empty folder")
    if not (source / CONFIG_FILE).is_file():
        raise PtmoeError(f"{source} has no {CONFIG_FILE}: give an adapter folder")
    written = read_config_file(source)
    if written.get("peft_type") != "PROMPT_TUNING":
        to_peft(source, target)
        print(f"peft PROMPT_TUNING folder: {target}")
        return
    quiet()
    base, _ = load_base(model or str(written.get("base_model_name_or_path")))
    from_peft(source, target, base)
    print(f"pt adapter folder: {target}")
