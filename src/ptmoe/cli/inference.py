"""`ptmoe generate`, `inspect` and `convert`."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ptmoe.cli.console import Console
from ptmoe.cli.options import Adapter, AdapterBase, DataDir, Device, NamedSplit, given
from ptmoe.errors import PtmoeError
from ptmoe.files import check_name, replaced

if TYPE_CHECKING:
    from ptmoe.runs.records import RoutingSummary


def generate(
    context: typer.Context,
    adapter: Adapter,
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts; by default the lines of standard input")] = None,
    model: AdapterBase = None,
    device: Device = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of each completion")] = 64,
    num_beams: Annotated[int, typer.Option(min=1, help="of a beam search; 1 is none")] = 1,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="sample, instead of the likeliest token each time")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="for --do-sample")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="for --do-sample: the likeliest tokens of this probability")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=-(2**63), max=2**63 - 1, help="for --do-sample")] = None,
    chat: Annotated[
        bool | None, typer.Option(help="the tokenizer's chat template; by default as the run was trained")
    ] = None,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="report the expert that each prompt is routed to")
    ] = False,
) -> None:
    """Complete prompts with an adapter."""
    from ptmoe.adapters.folder import local_folder, read_config_file

    check_sampling(do_sample, temperature, top_p, seed)
    read_config_file(local_folder(adapter))  # a missing one is reported before prompts are asked for
    prompts = prompt or sys.stdin.read().removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n").split("\n")
    if not any(text.strip() for text in prompts):
        raise PtmoeError("no prompt: give one as an argument, or lines on standard input")

    import torch

    from ptmoe.evaluate.generation import answer_text, end_tokens
    from ptmoe.models.attach import load_run
    from ptmoe.models.bases import quiet
    from ptmoe.tasks.base import Example
    from ptmoe.tasks.tokens import encode_prompt

    quiet()
    loaded = load_run(adapter, model=model, device=device, **context.obj)
    prompted, tokenizer = loaded.model, loaded.tokenizer
    ends = sorted(end_tokens(prompted, tokenizer))
    options = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "do_sample": do_sample,
        "eos_token_id": ends or None,
        "pad_token_id": tokenizer.pad_token_id,
        **given(temperature=temperature, top_p=top_p),
    }
    if seed is not None:
        torch.manual_seed(seed)
    for text in prompts:
        if not text.strip():
            print()
            continue
        in_template = bool(loaded.chat) if chat is None else chat
        encoded = encode_prompt(Example("", text, "", (), ""), tokenizer, chat=in_template)
        assert encoded is not None  # without a limit every prompt fits
        ids = torch.tensor([encoded.ids], device=prompted.device)
        completed = prompted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        print(answer_text(tokenizer, completed[0, ids.shape[1] :].tolist(), ends))
        routing = prompted.route(ids) if show_routing else None
        if routing is not None:
            gate = ", ".join(f"{value:.3f}" for value in routing.gate[0].tolist())
            print(f"expert {int(routing.gate[0].argmax())}, gate [{gate}]", file=sys.stderr)


def check_sampling(do_sample: bool, temperature: float | None, top_p: float | None, seed: int | None = None) -> None:
    """
    Raises:
        PtmoeError: options of sampling without it, or values that it does not have.
    """
    for name, value in given(temperature=temperature, top_p=top_p, seed=seed).items():
        option = f"--{name.replace('_', '-')}"
        if not do_sample:
            raise PtmoeError(f"{option} {value} is for sampling, and has no effect without it: add --do-sample")
        if name == "seed":  # any is one
            continue
        most = 1 if name == "top_p" else math.inf
        if not (0 < value <= most and math.isfinite(value)):  # also where it is NaN
            needed = "above 0 and at most 1" if name == "top_p" else "above 0; for the likeliest token omit --do-sample"
            raise PtmoeError(f"{option} {value:g}: needs a number {needed}")


def inspect(
    context: typer.Context,
    adapter: Adapter,
    task: Annotated[str, typer.Option(help="a named task or a JSON-lines file whose inputs are routed")],
    split: NamedSplit = "test",
    data_dir: DataDir = None,
    examples: Annotated[int, typer.Option(min=1, help="the first N examples only")] = 1000,
    model: AdapterBase = None,
    device: Device = None,
    output_dir: Annotated[Path | None, typer.Option(help="where figures go; by default ADAPTER/inspect")] = None,
) -> None:
    """Print and draw what an adapter has learned.

    That is the experts' use by domain, the similarity of their prompts, and the words nearest to each virtual token.
    """
    from ptmoe.adapters.folder import local_folder, read_config_file
    from ptmoe.cli.evaluation import report_run
    from ptmoe.models.attach import load_run
    from ptmoe.models.bases import quiet
    from ptmoe.runs.folders import INSPECT_FOLDER, NEAREST_FILE, ROUTING_FILE, is_run, trained_with_keys, writing
    from ptmoe.tasks import load_task, task_named
    from ptmoe.tasks.tokens import uses_chat

    read_config_file(local_folder(adapter))  # a missing one is reported before any data is read
    if output_dir is None and not adapter.is_dir():
        raise PtmoeError(f"{adapter} is not a local folder: name a folder for the results with --output-dir")
    inputs = load_task(task, split, data_dir, max_examples=examples, keys=trained_with_keys(Path(adapter)))
    folder = output_dir or adapter / INSPECT_FOLDER
    context.with_resource(writing(folder))
    quiet()
    loaded = load_run(adapter, model=model, device=device, **context.obj)
    prompted, tokenizer, config = loaded.model, loaded.tokenizer, loaded.model.method_config

    from ptmoe.evaluate.nearest_words import nearest_words
    from ptmoe.evaluate.routing import expert_similarity, has_one_expert, route_examples, summarise_routing
    from ptmoe.report import routing_figures
    from ptmoe.report.figures import drawing

    gates = route_examples(prompted, tokenizer, inputs, chat=uses_chat(task_named(task), tokenizer, loaded.chat))
    domains = [example.domain for example in inputs]
    similarity = expert_similarity(prompted.encoder)
    kinds = {"soft_gate": config.soft_gate, "one_expert": has_one_expert(prompted.encoder)}
    routing = summarise_routing(gates, domains, similarity=similarity, **kinds)
    nearest = nearest_words(prompted, tokenizer)
    if routing is None and not nearest.experts:
        raise PtmoeError(
            f"{adapter} is a {config.method} adapter: it has neither a gate of each input nor virtual tokens in the "
            "embeddings' space, there is nothing to show"
        )
    console = Console()
    console.print(f"{config.method} on {task}, {len(inputs):,} inputs")
    if routing is None:
        console.print("it does not route: one prompt serves every input")
    else:
        _print_routing(console, routing, Counter(domains))
        routing.write(folder / ROUTING_FILE)
        with drawing():
            for name, figure in routing_figures(routing).items():
                with replaced(folder / f"{name}.png") as part:
                    figure.savefig(part, format="png", dpi=150, bbox_inches="tight")
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


def _print_routing(console: Console, routing: RoutingSummary, examples: Mapping[str, int]) -> None:
    """Which expert each domain goes to, how evenly, and whether routing has collapsed; `examples` of each domain."""
    from ptmoe.runs.records import collapsed_expert

    experts = [f"expert {i}" for i in range(routing.num_experts)]
    table = Table("domain", *experts)
    for domain, use in routing.use.items():
        table.add_row(domain or "all", *(f"{100 * share:.1f} %" for share in use))
    console.print(table)
    console.print(
        f"entropy of the use {routing.entropy:.3f} nats (even: {math.log(len(experts)):.3f}), "
        f"mutual information of expert and domain {routing.mutual_information:.3f} nats"
    )
    shares = routing.overall_shares(examples)
    if routing.one_expert:
        console.print("one expert for all inputs: its training found nothing that tells them apart (router_test)")
    elif collapsed_expert(shares) is not None:
        console.print(
            f"warning: the routing has collapsed, one of {len(experts)} experts takes "
            f"{100 * max(shares):.1f} % of the {'gate' if routing.is_soft else 'inputs'}"
        )
    similarity = Table("cosine of the prompts", *experts)
    for expert, row in zip(experts, routing.prompt_similarity or [], strict=False):
        similarity.add_row(expert, *(f"{value:.3f}" for value in row))
    console.print(similarity)


def convert(
    source: Annotated[Path, typer.Argument(help="adapter folder: a pt adapter of ours, or peft's PROMPT_TUNING")],
    target: Annotated[Path, typer.Argument(help="folder to write; must be new or empty")],
    model: Annotated[
        str | None, typer.Option(help="the base, for a folder of peft's; by default the base that it names")
    ] = None,
) -> None:
    """Convert a pt adapter to peft's PROMPT_TUNING, or back. The logits stay the same."""
    from ptmoe.adapters.folder import CONFIG_FILE, local_folder, read_config_file
    from ptmoe.adapters.peft import from_peft, to_peft
    from ptmoe.models.bases import load_base, quiet

    check_name(target)
    source = local_folder(source)
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
