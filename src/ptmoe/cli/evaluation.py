"""`ptmoe eval` and `ptmoe score`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ptmoe.errors import PtmoeError
from ptmoe.settings import read_yaml
from ptmoe.tasks import Problems, load_task, task_named, task_names

if TYPE_CHECKING:
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
    if run is None and "name" not in base:
        raise PtmoeError("nothing to evaluate: give a run or adapter folder, or a base with --model")
    if run is None and output_dir is None:
        raise PtmoeError("a base alone has no run folder: name one with --output-dir")
    console = Console()
    tasks = list(dict.fromkeys(one for name in names for one in task_names(name)))
    if data.get("data_dir") is not None and Path(data["data_dir"]).is_file() and len(tasks) > 1:
        raise PtmoeError(f"{len(tasks)} tasks and one file {data['data_dir']}: give the folder that holds them all")
    if data.get("ids") is not None and len(tasks) > 1:
        raise PtmoeError(f"{len(tasks)} tasks and one list of ids {data['ids']}: evaluate that task by itself")
    asked = {name: load(name, split, data, skip_bad, console) for name in tasks}

    from ptmoe.cli.inference import load as load_run
    from ptmoe.cli.progress import progress_bar
    from ptmoe.evaluate import evaluate as evaluate_task
    from ptmoe.methods.base import quantization_of
    from ptmoe.models.bases import load_base, quiet
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.tasks.tokens import uses_chat

    quiet()
    if run is not None:
        model, tokenizer = load_run(Path(run), base)
        trained_chat = chat_of(Path(run))
        chat = trained_chat if chat is None else chat
    else:
        plain, tokenizer = load_base(**base)
        model = PromptedCausalLM(plain.eval())
    folder = output_dir or Path(str(run))
    if not folder.is_dir() and output_dir is None:
        raise PtmoeError(f"{run} is not a folder here: name one for the results with --output-dir")
    dtype = str(model.dtype).removeprefix("torch.")
    in_8_bits = quantization_of(model.base_model) == "8bit"  # its layers look for outliers in the whole batch
    several = options["batch_size"] > 1 or "tokens_per_batch" in options
    if (dtype != "float32" or in_8_bits) and several:
        console.print(
            f"{'8bit' if in_8_bits else dtype}: in a near tie an answer may depend on the batch size; it does not with "
            f"--dtype float32{' --quantization 4bit' if in_8_bits else ''}"
        )
    summaries = []
    for name, examples in asked.items():
        with progress_bar() as progress:
            bar = progress.add_task(name, total=len(examples), note="")
            evaluation = evaluate_task(
                model,
                tokenizer,
                examples,
                task=task_named(name),
                split=split,
                chat=uses_chat(task_named(name), tokenizer, chat),
                folder=folder,
                progress=lambda done, total, bar=bar, on=progress: on.update(bar, completed=done),  # type: ignore[misc]
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


def load(name: str, split: str, data: dict[str, Any], skip_bad: bool, console: Console) -> list[Example]:
    problems = Problems(skip=skip_bad)
    examples = load_task(name, split, problems=problems, say=console.print, **data)
    if problems.count:
        console.print(f"{name}: left out {problems.listed()}")
    return examples


def chat_of(run: Path) -> bool | None:
    """Whether a run was trained on prompts in the chat template; None where its folder does not say."""
    config = run / "config.yaml"
    return read_yaml(config).get("chat") if config.is_file() else None


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
