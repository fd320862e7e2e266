"""`ptmoe eval` and `ptmoe score`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ptmoe.errors import PtmoeError
from ptmoe.tasks import Problems, load_task, task_named, task_names

if TYPE_CHECKING:
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.runs.records import EvaluationSummary
    from ptmoe.tasks.base import Example


def evaluate(
    run: str | None,
    names: Sequence[str],
    split: str,
    data: dict[str, Any],
    base: dict[str, Any],
    options: dict[str, Any],
    *,
    chat: bool | None,
    output_dir: Path | None,
    skip_bad: bool,
) -> None:
    """Evaluate an adapter, or a base without one, on tasks one after another."""
    if not names:
        raise PtmoeError("nothing to answer: give a task with --task (`ptmoe tasks` lists them)")
    if run is None and base["model"] is None:
        raise PtmoeError("nothing to evaluate: give a run or adapter folder, or a base with --model")
    if run is None and output_dir is None:
        raise PtmoeError("a base alone has no run folder: name a folder with --output-dir")
    console = Console()
    tasks = list(dict.fromkeys(task for name in names for task in task_names(name)))
    if data.get("data_dir") is not None and Path(data["data_dir"]).is_file() and len(tasks) > 1:
        raise PtmoeError(f"{len(tasks)} tasks and one file {data['data_dir']}: give the folder that holds them all")
    if data.get("ids") is not None and len(tasks) > 1:
        raise PtmoeError(f"{len(tasks)} tasks and one list of ids {data['ids']}: evaluate that task by itself")
    if run is not None:
        from ptmoe.adapters.folder import local_folder, read_config_file

        read_config_file(local_folder(run))  # a missing run is reported before any data is read or downloaded
    folder = output_dir or Path(str(run))
    if not folder.is_dir() and output_dir is None:
        raise PtmoeError(f"{run} is not a local folder: name a folder for the results with --output-dir")
    examples = {task: load(task, split, data, skip_bad, console) for task in tasks}

    from ptmoe.cli.progress import progress_bar
    from ptmoe.evaluate import evaluate as evaluate_task
    from ptmoe.models.attach import load_run
    from ptmoe.models.bases import load_base, quiet
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.tasks.tokens import uses_chat

    quiet()
    if run is not None:
        loaded = load_run(run, **base)
        model, tokenizer = loaded.model, loaded.tokenizer
        chat = loaded.chat if chat is None else chat
    else:
        plain, tokenizer = load_base(base.pop("model"), **base)
        model = PromptedCausalLM(plain.eval())
    if options["batch_size"] > 1 or "tokens_per_batch" in options:
        _warn_of_near_ties(model, console)
    summaries = []
    for name in tasks:
        with progress_bar() as progress:
            bar = progress.add_task(name, total=len(examples[name]), note="")
            evaluation = evaluate_task(
                model,
                tokenizer,
                examples[name],
                task=task_named(name),
                split=split,
                chat=uses_chat(task_named(name), tokenizer, chat),
                folder=folder,
                progress=lambda done, total, bar=bar, bars=progress: bars.update(bar, completed=done),  # type: ignore[misc]
                **options,
            )
        summaries.append(evaluation.summary())
    console.print(evaluation_table(summaries))
    console.print(f"results: {folder / 'eval'}, predictions: {folder / 'predictions'}")
    report_run(folder, console)


def report_run(folder: Path, console: Console) -> None:
    """Write the page of a run folder; a folder without a finished run, as of an adapter or a base alone, has none."""
    try:
        from ptmoe.report.page import write_run_report

        page = write_run_report(folder)
    except PtmoeError as error:  # the results are there: what is missing for a page must not fail the command
        console.print(f"no report: {error}", markup=False)
    else:
        if page is not None:
            console.print(f"report: {page}", markup=False)


def _warn_of_near_ties(model: PromptedCausalLM, console: Console) -> None:
    from ptmoe.methods.base import quantization_of

    dtype = str(model.dtype).removeprefix("torch.")
    in_8_bits = quantization_of(model.base_model) == "8bit"  # its layers look for outliers in the whole batch
    if dtype != "float32" or in_8_bits:
        console.print(
            f"{'8bit' if in_8_bits else dtype}: in a near tie an answer may depend on the batch size; it does not with "
            f"--dtype float32{' --quantization 4bit' if in_8_bits else ''}"
        )


def load(name: str, split: str, data: dict[str, Any], skip_bad: bool, console: Console) -> list[Example]:
    problems = Problems(skip=skip_bad)
    examples = load_task(name, split, problems=problems, say=console.print, **data)
    if problems.count:
        console.print(f"{name}: left out {problems.listed()}")
    return examples


def evaluation_table(summaries: Sequence[EvaluationSummary]) -> Table:
    """A row for each task: its metrics with their 95 % intervals; with several tasks their plain mean."""
    names = list(dict.fromkeys(metric for summary in summaries for metric in summary.metrics))
    notes = [note for note in ("cut", "unanswered") if any(getattr(summary, note) for summary in summaries)]
    table = Table("task")
    for column in ("examples", *(f"{name}, %" for name in names), *notes):
        table.add_column(column, justify="right")
    for summary in summaries:
        cells = [_with_interval(summary, name) if name in summary.metrics else "–" for name in names]
        counts = (f"{getattr(summary, note):,}" for note in notes)
        table.add_row(summary.task, f"{summary.examples:,}", *cells, *counts)
        if len(summary.by_domain) > 1:
            for domain, part in summary.by_domain.items():
                scores = (f"{part[name]:.2f}" if name in part else "–" for name in names)
                table.add_row(f"  {domain}", f"{part['examples']:,}", *scores)
            means = summary.mean_of_domains
            table.add_row("  mean of these", "", *(f"{means[name]:.2f}" if name in means else "–" for name in names))
    if len(summaries) > 1:
        averages = []
        for name in names:
            values = [summary.metrics[name] for summary in summaries if name in summary.metrics]
            averages.append(f"{sum(values) / len(values):.2f}" if len(values) == len(summaries) else "–")
        table.add_section()
        table.add_row("mean", "", *averages)
    return table


def _with_interval(summary: EvaluationSummary, metric: str) -> str:
    low, high = summary.interval[metric]
    return f"{summary.metrics[metric]:.2f} [{low:.2f}, {high:.2f}]"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if len(known) == len(values) else "–"


def score(
    name: str,
    predictions: Path,
    split: str,
    data: dict[str, Any],
    *,
    missing_as_wrong: bool,
    skip_bad: bool,
    output: Path | None,
) -> None:
    """Grade a file of predictions without a model."""
    from ptmoe.runs.records import EvaluationSummary
    from ptmoe.tasks.predictions import read_predictions
    from ptmoe.tasks.scoring import grade, summarise

    console = Console()
    texts = read_predictions(predictions)
    examples = load(name, split, data, skip_bad, console)
    marks = grade(name, texts, examples, missing_as_wrong=missing_as_wrong)
    summary = EvaluationSummary(
        **summarise(task_named(name), split, marks, [example.domain for example in examples]),
        unanswered=sum(example.id not in texts for example in examples),
    )
    console.print(evaluation_table([summary]))
    if output is not None:
        summary.write(output)
        console.print(f"written: {output}")
