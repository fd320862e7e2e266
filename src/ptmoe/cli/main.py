"""`ptmoe`: a command's options are its signature and the fields of a settings class.

Nothing heavy is imported before a command runs.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ptmoe.cli.options import HELP, command_of, given

app = typer.Typer(
    name="ptmoe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes cut long option names short in a terminal of 80 columns
    context_settings={"help_option_names": list(HELP)},
)

TRAIN_OPTIONS = "ptmoe.train.options:TrainOptions"
base_options = command_of(TRAIN_OPTIONS, "revision", "dtype", "quantization")

# Options that several commands share.
Model = Annotated[str, typer.Option(help="nano, a folder, or a Hugging Face Hub repository")]
AdapterBase = Annotated[str | None, typer.Option("--model", help="by default the base that the adapter names")]
Adapter = Annotated[Path, typer.Argument(help="adapter folder, or a run folder that holds one")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps, …; by default the accelerator, where there is one")
]
DataDir = Annotated[str | None, typer.Option(help="folder or file with the data set; by default it is downloaded")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="skip bad records, and report how many there were")]
Chat = Annotated[
    bool | None,
    typer.Option(help="the tokenizer's chat template; by default as the run was trained, else for named tasks"),
]
Ids = Annotated[Path | None, typer.Option(help="file of example ids, one a line or a JSON list: only these")]
Examples = Annotated[int | None, typer.Option(min=1, help="the first N examples only")]


def _print_version(asked: bool) -> None:
    if asked:
        from ptmoe import __version__

        print(f"ptmoe {__version__}")
        raise typer.Exit


@app.callback()
def ptmoe(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Tune a frozen language model with a soft prompt composed for each input."""


@app.command()
def quickstart(
    output_dir: Annotated[Path | None, typer.Option(help="run folder; by default a new one under runs/")] = None,
    task: Annotated[str, typer.Option(help="a task of nano's world")] = "nano/mixed",
    seed: Annotated[int, typer.Option(help="of the initial prompts, the order of the data and the router's noise")] = 0,
    recipe: Annotated[
        Literal["default", "paper"], typer.Option(help="routing options of PT-MoE: ours, or as published")
    ] = "default",
    steps: Annotated[int | None, typer.Option(help="training steps of each method")] = None,
) -> None:
    """See it learn: tune pt and pt-moe at one parameter budget on nano's mixed world, and compare."""
    from ptmoe.cli.comparison import quickstart as run

    run(output_dir, task=task, seed=seed, recipe=recipe, **given(steps=steps))


@app.command(cls=command_of(TRAIN_OPTIONS, methods=True))
def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="YAML file; options on the command line take precedence")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the run's last checkpoint")] = False,
) -> None:
    """Train an adapter and write its run folder. `ptmoe train RUN/config.yaml` repeats a run.

    A method's own options (--rank 8, …) are shown by `ptmoe train --method NAME --help`.
    """
    from ptmoe.cli.training import run

    run(config, context.obj, resume=resume)


@app.command(cls=base_options)
def generate(
    context: typer.Context,
    adapter: Adapter,
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts; by default the lines of standard input")] = None,
    model: AdapterBase = None,
    device: Device = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    num_beams: Annotated[int, typer.Option(min=1)] = 1,
    do_sample: Annotated[bool, typer.Option("--do-sample")] = False,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="for --do-sample")] = None,
    chat: Annotated[
        bool | None, typer.Option(help="the tokenizer's chat template; by default as the run was trained")
    ] = None,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="report the expert that each prompt is routed to")
    ] = False,
) -> None:
    """Complete prompts with an adapter."""
    from ptmoe.cli.inference import generate as run

    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": do_sample}
    run(
        adapter,
        prompt,
        {**context.obj, "model": model, "device": device},
        {**options, **given(temperature=temperature, top_p=top_p)},
        seed=seed,
        chat=chat,
        show_routing=show_routing,
    )


@app.command(name="eval", cls=base_options)
def evaluate(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(help="run folder or adapter folder; without one --model is evaluated alone")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="a named task, a group (mrqa-in, …) or a JSON-lines file; several times")
    ] = None,
    split: Annotated[str, typer.Option(help="of named tasks")] = "test",
    data_dir: DataDir = None,
    ids: Ids = None,
    examples: Examples = None,
    skip_bad: SkipBad = False,
    model: AdapterBase = None,
    device: Device = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--per-device-eval-batch-size",
            "--batch-size",
            min=1,
            help="rows computed at once on one device by the evaluation; changes no answer in float32",
        ),
    ] = 32,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(min=1, help="instead: as many rows as fit into this many tokens, new and virtual tokens included"),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="of an answer; by default the task's")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="real tokens of a prompt; longer contexts lose their end")
    ] = None,
    chat: Chat = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="where eval/ and predictions/ are written; by default the run folder")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="start over instead of resuming an interrupted evaluation")
    ] = False,
) -> None:
    """Answer tasks greedily and grade the answers. An interrupted evaluation is resumed."""
    from ptmoe.cli.evaluation import evaluate as evaluate_run

    options = {"batch_size": batch_size, "overwrite": overwrite}
    limits = given(tokens_per_batch=tokens_per_batch, max_new_tokens=max_new_tokens, max_length=max_length)
    evaluate_run(
        run,
        task or [],
        split,
        given(data_dir=data_dir, ids=ids, max_examples=examples),
        {**context.obj, "model": model, "device": device},
        {**options, **limits},
        chat=chat,
        output_dir=output_dir,
        skip_bad=skip_bad,
    )


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="a named task or a JSON-lines file")],
    predictions: Annotated[Path, typer.Argument(help="{id: text} as JSON, or JSON lines with an id and a text")],
    split: Annotated[str, typer.Option(help="of a named task")] = "test",
    data_dir: DataDir = None,
    ids: Ids = None,
    examples: Examples = None,
    skip_bad: SkipBad = False,
    missing_as_wrong: Annotated[
        bool, typer.Option("--missing-as-wrong", help="an unanswered example scores 0, as in MRQA's evaluator")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    """Grade any system's predictions, without a model."""
    from ptmoe.cli.evaluation import score as run

    data = given(data_dir=data_dir, ids=ids, max_examples=examples)
    run(task, predictions, split, data, missing_as_wrong=missing_as_wrong, skip_bad=skip_bad, output=output)


@app.command(
    name="lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def harness(context: typer.Context) -> None:
    """Run EleutherAI's lm_eval on an adapter. The options are its own: --model ptmoe --model_args adapter=RUN …"""
    from ptmoe.evaluate.harness import main as run

    run(context.args)


@app.command(cls=command_of("ptmoe.compare.plan:ComparePlan"))
def compare(
    context: typer.Context,
    plan: Annotated[
        Path | None,
        typer.Argument(help="YAML file, or the folder of a comparison to continue; options take precedence"),
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="also evaluate the untouched base, once; as --method base")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what would be run, and at what sizes")] = False,
) -> None:
    """Compare methods × tasks × seeds on equal terms.

    Each method is trained and evaluated with each task and seed, and a report is written. The same command continues a
    comparison that was interrupted or extended.
    """
    from ptmoe.cli.comparison import run

    run(plan, context.obj, with_base=with_base, dry_run=dry_run)


@app.command(cls=base_options)
def inspect(
    context: typer.Context,
    adapter: Adapter,
    task: Annotated[str, typer.Option(help="a named task or a JSON-lines file whose inputs are routed")],
    split: Annotated[str, typer.Option(help="of a named task")] = "test",
    data_dir: DataDir = None,
    examples: Annotated[int, typer.Option(min=1, help="the first N examples only")] = 1000,
    model: AdapterBase = None,
    device: Device = None,
    output_dir: Annotated[Path | None, typer.Option(help="where figures go; by default ADAPTER/inspect")] = None,
) -> None:
    """Print and draw what an adapter has learned.

    That is the experts' use by domain, the similarity of their prompts, and the words nearest to each virtual token.
    """
    from ptmoe.cli.inference import inspect as run

    data = given(data_dir=data_dir, max_examples=examples)
    run(adapter, task, split, data, {**context.obj, "model": model, "device": device}, output_dir)


@app.command(cls=command_of(TRAIN_OPTIONS, "revision"))
def params(
    context: typer.Context,
    model: Model = "nano",
    method: Annotated[
        str | None, typer.Option(help="one method, or with fields as in pt-moe:rank=8; by default all methods")
    ] = None,
    num_virtual_tokens: Annotated[int | None, typer.Option(help="T, length of the soft prompt")] = None,
    num_experts: Annotated[int | None, typer.Option(help="N, number of expert factors or prompts")] = None,
    rank: Annotated[int | None, typer.Option(help="R, of the prompt's factors")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="pick each method's free size to come closest without exceeding it: 80k, 1.5M"),
    ] = None,
) -> None:
    """Count each method's trainable parameters on a base. The base's config is enough, no weights are loaded."""
    from ptmoe.cli.tables import params as run

    fields = given(num_virtual_tokens=num_virtual_tokens, num_experts=num_experts, rank=rank)
    run(model, context.obj.get("revision"), method, fields, budget)


tasks_app = typer.Typer(help="List the tasks, or show one task's examples.", invoke_without_command=True)
app.add_typer(tasks_app, name="tasks")


@tasks_app.callback()
def tasks(context: typer.Context, data_dir: DataDir = None) -> None:
    """List the named tasks: their splits, licence and source, and which of them are on this machine."""
    if context.invoked_subcommand is None:
        from ptmoe.cli.tables import tasks as run

        run(data_dir)


@tasks_app.command("show", cls=command_of(TRAIN_OPTIONS, "revision"))
def tasks_show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="a named task, a group, a mixture or a JSON-lines file")],
    split: Annotated[str, typer.Option(help="of a named task")] = "test",
    data_dir: DataDir = None,
    examples: Annotated[int, typer.Option(min=1)] = 4,
    skip_bad: SkipBad = False,
    model: Model = "nano",
    chat: Annotated[bool | None, typer.Option(help="the tokenizer's chat template; by default for named tasks")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="real tokens of an example; longer contexts are cut")
    ] = None,
    num_virtual_tokens: Annotated[int, typer.Option(min=0, help="T, length of the soft prompt")] = 40,
) -> None:
    """Print examples as the model sees them, with the virtual tokens' place, what is cut and what is supervised."""
    from ptmoe.cli.tables import tasks_show as run

    base = {"name": model, **context.obj}
    run(name, split, data_dir, examples, base, chat, max_length, num_virtual_tokens, skip_bad=skip_bad)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="adapter folder: a pt adapter of ours, or peft's PROMPT_TUNING")],
    target: Annotated[Path, typer.Argument(help="folder to write; must be new or empty")],
    model: Annotated[
        str | None, typer.Option(help="the base, for a folder of peft's; by default the base that it names")
    ] = None,
) -> None:
    """Convert a pt adapter to peft's PROMPT_TUNING, or back. The logits stay the same."""
    from ptmoe.cli.inference import convert as run

    run(source, target, model)


def main() -> None:
    """Run a command; an error that the user can fix ends with one message and status 2."""
    try:
        app()
    except Exception as error:
        # Imported here: `ptmoe --help` needs none of it.
        from ptmoe.errors import PtmoeError

        if not isinstance(error, PtmoeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
