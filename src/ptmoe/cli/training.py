"""`ptmoe train`."""

from pathlib import Path
from typing import Any

from rich.console import Console

from ptmoe.runs.environment import rank
from ptmoe.train.options import TrainOptions, method_config, method_entry


def run(config: Path | None, chosen: dict[str, Any], *, resume: bool) -> None:
    """Train as a YAML file and the options beside it say; those that are not `TrainOptions`' are the method's."""
    options = {name: value for name, value in chosen.items() if name in TrainOptions.model_fields}
    fields = {name: value for name, value in chosen.items() if name not in options}
    options["method"] = {**method_entry(options.get("method", {})), **fields}
    training = TrainOptions.read(config, **options) if config else TrainOptions(**options)
    method_config(training.method)  # a misspelt method is reported before torch and the data are loaded

    from ptmoe.models.bases import quiet

    quiet()  # some libraries print while they are imported

    from ptmoe.cli.evaluation import evaluation_table, report_run
    from ptmoe.cli.progress import progress_bar, training_bar
    from ptmoe.train import train
    from ptmoe.train.steps import StepsCallback

    console = Console(quiet=rank() > 0)  # of several processes only the first prints
    with progress_bar(console) as progress:
        trained = train(
            training,
            resume=resume,
            callbacks=[StepsCallback(training_bar(progress, training.method["name"]))],
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
