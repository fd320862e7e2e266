"""`ptmoe train`."""

from pathlib import Path
from typing import Any

from rich.console import Console

from ptmoe.runs.environment import rank
from ptmoe.train.options import TrainOptions, method_config


def run(config: Path | None, chosen: dict[str, Any], fields: dict[str, Any], *, resume: bool) -> None:
    """Train as a YAML file and the options beside it say."""
    if config is not None:
        options = TrainOptions.read(config, **chosen, **({"method": fields} if fields else {}))
    else:
        options = TrainOptions(**chosen, method={"name": "pt-moe", **fields})
    method_config(options.method)  # a misspelt method should not wait for torch and the data

    from ptmoe.models.bases import quiet

    quiet()  # some libraries speak while they are imported

    from ptmoe.cli.evaluation import evaluation_table, report_run
    from ptmoe.cli.progress import progress_bar, training_bar
    from ptmoe.train import train
    from ptmoe.train.steps import StepsCallback

    console = Console(quiet=rank() > 0)  # of several processes the first speaks
    with progress_bar(console) as progress:
        trained = train(
            options,
            resume=resume,
            callbacks=[StepsCallback(training_bar(progress, options.method["name"]))],
            say=progress.console.print,
        )
    result = trained.result
    console.print(
        f"{result.method}: {result.trainable_parameters:,} trainable parameters, {result.steps:,} steps on "
        f"{result.examples:,} examples in {result.train_seconds:.0f} s"
    )
    if trained.evaluations:
        console.print(evaluation_table([evaluation.summary() for evaluation in trained.evaluations]))
    if rank() == 0:
        report_run(trained.folder, console)
    console.print(f"run folder: {trained.folder}")
