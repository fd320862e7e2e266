"""`ptmoe eval` and `ptmoe score`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from ptmoe.cli.console import Console
from ptmoe.cli.launch import Launch, run_in_processes
from ptmoe.cli.options import AdapterBase, DataDir, Device, Examples, Ids, NamedSplit, SkipBad
from ptmoe.errors import PtmoeError
from ptmoe.files import check_name

if TYPE_CHECKING:
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.runs.records import EvaluationSummary
    from ptmoe.tasks.base import Example


def evaluate(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(help="run folder or adapter folder; without one --model is evaluated alone")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="a named task, a group (mrqa-in, …) or a JSON-lines file, or several: a,b")
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
    score: Annotated[
        Literal["answers", "choices"],
        typer.Option(help="as the model writes, or, for classifications, with the most likely label"),
    ] = "answers",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="of a written answer; by default the task's")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="real tokens of a prompt; longer contexts lose their end")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(help="the tokenizer's chat template; by default as the run was trained, else for named tasks"),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="where eval/ and predictions/ are written; by default the run folder")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="start over instead of resuming an interrupted evaluation")
    ] = False,
    launch: Launch = None,
) -> None:
    """Answer tasks greedily and grade the answers. An interrupted evaluation is resumed."""
    from contextlib import nullcontext

    from ptmoe.adapters.folder import local_folder, read_config_file
    from ptmoe.runs.environment import rank, world_size
    from ptmoe.runs.folders import distinct_tasks, trained_with_keys, writing
    from ptmoe.tasks import check_data_dir, check_labels, listed_names
    from ptmoe.train.processes import Processes

    adapter = None if run is None else local_folder(run)  # a missing run is reported before what else is wrong
    if not task:
        raise PtmoeError("nothing to answer: give a task with --task (`ptmoe tasks` lists them)")
    if run is None and model is None:
        raise PtmoeError("nothing to evaluate: give a run or adapter folder, or a base with --model")
    if run is None and output_dir is None:
        raise PtmoeError("a base alone has no run folder: name a folder with --output-dir")
    tasks = list(dict.fromkeys(name for group in task for name in listed_names(group)))
    graded = distinct_tasks(tasks)
    check_data_dir(tasks, data_dir)
    if len(tasks) > 1 and ids is not None:
        raise PtmoeError(f"{len(tasks)} tasks and one list of ids {ids}: evaluate that task by itself")
    if score == "choices":
        check_labels(graded.values())
    if adapter is not None:
        read_config_file(adapter)  # so is a damaged one, before any data is read or downloaded
    folder = output_dir or Path(str(run))
    check_name(folder)
    if not folder.is_dir() and output_dir is None:
        raise PtmoeError(f"{run} is not a local folder: name a folder for the results with --output-dir")
    if launch is not None:
        run_in_processes(launch)
    console = Console(quiet=rank() > 0)  # of several processes only the first prints
    if device is not None and world_size() > 1:
        raise PtmoeError(f"--device {device} with {world_size()} processes: each takes its own, so leave it out")
    context.with_resource(writing(folder) if rank() == 0 else nullcontext())
    places = {"run", "data_dir", "ids", "output_dir"}  # may differ between machines: what they hold may not
    decided = {name: value for name, value in (context.obj | context.params).items() if name not in places}
    processes = context.with_resource(Processes(decided))
    keys = None if run is None else trained_with_keys(Path(run))
    data = {"data_dir": data_dir, "ids": ids, "max_examples": examples, "keys": keys}
    loaded = {name: _load(name, split, console, skip_bad, **data) for name in tasks}

    from ptmoe.cli.progress import progress_bar
    from ptmoe.evaluate import evaluate as evaluate_task
    from ptmoe.models.attach import load_run
    from ptmoe.models.bases import load_base, quiet
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.tasks import Problems
    from ptmoe.tasks.tokens import usable, uses_chat

    quiet()
    device = str(processes.join()) if world_size() > 1 else device
    if run is not None:
        prompted = load_run(run, model=model, device=device, **context.obj)
        answering, tokenizer = prompted.model, prompted.tokenizer
        chat = prompted.chat if chat is None else chat
    else:
        base, tokenizer = load_base(str(model), device=device, **context.obj)
        answering = PromptedCausalLM(base.eval())
    if batch_size > 1 or tokens_per_batch is not None:
        _warn_of_near_ties(answering, console)

    chats = {name: uses_chat(graded[name], tokenizer, chat) for name in tasks}
    problems = Problems(skip=skip_bad)
    loaded = {name: usable(loaded[name], tokenizer, problems, chat=chats[name]) for name in tasks}
    if problems.count:
        console.print(f"left out {problems.listed()}")

    def answer(name: str) -> EvaluationSummary:
        bar = progress.add_task(name, total=len(loaded[name]), note="")
        return evaluate_task(
            answering,
            tokenizer,
            loaded[name],
            task=graded[name],
            split=split,
            score=score,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            chat=chats[name],
            folder=folder,
            overwrite=overwrite,
            together=world_size() > 1,
            progress=lambda done, _: progress.update(bar, completed=done),
        ).summary()

    with progress_bar(console) as progress:
        summaries = [answer(name) for name in tasks]
    processes.part()
    console.print(evaluation_table(summaries))
    console.print(f"results: {folder / 'eval'}, predictions: {folder / 'predictions'}")
    if rank() == 0:
        report_run(folder, console)


def report_run(folder: Path, console: Console) -> None:
    """Write the page of a run folder; a folder without a finished run, as of an adapter or a base alone, has none."""
    try:
        from ptmoe.report.page import write_run_report

        page = write_run_report(folder)
    except PtmoeError as error:  # the results are there: what is missing for a page must not fail the command
        console.print(f"no report: {error}")
    else:
        if page is not None:
            console.print(f"report: {page}")


def _warn_of_near_ties(model: PromptedCausalLM, console: Console) -> None:
    from ptmoe.methods.base import quantization_of

    dtype = str(model.dtype).removeprefix("torch.")
    in_8_bits = quantization_of(model.base_model) == "8bit"  # its layers look for outliers in the whole batch
    if dtype != "float32" or in_8_bits:
        console.print(
            f"{'8bit' if in_8_bits else dtype}: in a near tie an answer may depend on the batch size; it does not with "
            f"--dtype float32{' --quantization 4bit' if in_8_bits else ''}"
        )


def _load(name: str, split: str, console: Console, skip_bad: bool, **data: Any) -> list[Example]:
    from ptmoe.tasks import Problems, load_task

    problems = Problems(skip=skip_bad)
    examples = load_task(name, split, problems=problems, say=console.print, **data)
    for line in problems.notes():
        console.print(f"{name}: {line}")
    return examples


def evaluation_table(summaries: Sequence[EvaluationSummary]) -> Table:
    """A row for each task: its metrics with their 95 % intervals; with several tasks their plain mean."""
    names = list(dict.fromkeys(metric for summary in summaries for metric in summary.metrics))
    counted = ("cut", "unanswered", "no_label")
    notes = [note for note in counted if any(getattr(summary, note) for summary in summaries)]
    table = Table("task")
    for column in ("examples", *(f"{name}, %" for name in names), *(note.replace("_", " ") for note in notes)):
        table.add_column(column, justify="right")

    def cells(scores: Mapping[str, float], intervals: Mapping[str, tuple[float, float]] | None = None) -> Iterator[str]:
        for name in names:
            interval = " [{:.2f}, {:.2f}]".format(*intervals[name]) if intervals and name in scores else ""
            yield f"{scores[name]:.2f}{interval}" if name in scores else "–"

    for summary in summaries:
        counts = (f"{getattr(summary, note):,}" for note in notes)
        table.add_row(summary.task, f"{summary.examples:,}", *cells(summary.metrics, summary.interval), *counts)
        if len(summary.by_domain) > 1:
            for domain, part in summary.by_domain.items():
                table.add_row(f"  {domain}", f"{part['examples']:,}", *cells(part))
            table.add_row("  mean of these", "", *cells(summary.mean_of_domains))
    if len(summaries) > 1:
        shared = set.intersection(*(set(summary.metrics) for summary in summaries))
        means = {name: sum(summary.metrics[name] for summary in summaries) / len(summaries) for name in shared}
        table.add_section()
        table.add_row("mean", "", *cells(means))
    return table


def score(
    task: Annotated[str, typer.Argument(help="a named task or a JSON-lines file")],
    predictions: Annotated[Path, typer.Argument(help="{id: text} as JSON, or JSON lines with an id and a text")],
    split: NamedSplit = "test",
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
    from ptmoe.runs.records import EvaluationSummary
    from ptmoe.tasks.predictions import read_predictions
    from ptmoe.tasks.scoring import grade, grading_task, summarise

    if output is not None:
        check_name(output)
    console = Console()
    texts = read_predictions(predictions)
    loaded = _load(task, split, console, skip_bad, data_dir=data_dir, ids=ids, max_examples=examples)
    marks = grade(task, texts, loaded, missing_as_wrong=missing_as_wrong)
    summary = EvaluationSummary(
        **summarise(
            grading_task(task),
            split,
            marks,
            [(texts.get(example.id), example.references) for example in loaded],
            [example.domain for example in loaded],
        ),
        unanswered=sum(texts.get(example.id) is None for example in loaded),
    )
    console.print(evaluation_table([summary]))
    if output is not None:
        summary.write(output)
        console.print(f"written: {output}")
