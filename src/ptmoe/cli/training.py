"""`ptmoe train`."""

from pathlib import Path
from typing import Annotated

import typer

from ptmoe.cli.console import Console
from ptmoe.cli.launch import Launch, run_in_processes
from ptmoe.errors import PtmoeError


def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="YAML file; options on the command line take precedence")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the run's last checkpoint")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="resume although the base, the data or options differ; both are recorded")
    ] = False,
    launch: Launch = None,
) -> None:
    """Train an adapter and write its run folder.

    `ptmoe train RUN/config.yaml` repeats a run, `ptmoe train --resume --output-dir RUN` continues one.

    A method's own options (--rank 8, …) are shown by `ptmoe train --method NAME --help`.
    """
    from ptmoe.runs.folders import CONFIG_FILE
    from ptmoe.settings import read_yaml
    from ptmoe.train.options import DEFAULT_METHOD, TrainOptions, method_config, method_entry
    from ptmoe.train.resume import recorded

    options = {name: value for name, value in context.obj.items() if name in TrainOptions.model_fields}
    fields = {name: value for name, value in context.obj.items() if name not in options}
    options["method"] = {**method_entry(options.get("method", {})), **fields}
    folder = Path(options.get("output_dir", ""))
    given = config is not None or {"task", "data"} & options.keys()
    if resume and not given and "output_dir" not in options:
        raise PtmoeError("--resume needs the folder of the run: name it with --output-dir")
    if resume and "output_dir" in options and (not given or (config is None and (folder / CONFIG_FILE).exists())):
        training = recorded(folder, **options)
    else:
        training = TrainOptions.read(config, **options) if config else TrainOptions(**options)
    method_config(training.method)  # a misspelt method is reported before torch and the data are loaded
    if launch is not None:
        from ptmoe.train.recipe import run_folder

        place = run_folder(training, resume)
        run_in_processes(launch, *([] if training.output_dir else ["--output-dir", str(place)]))

    from ptmoe.models.bases import quiet

    quiet()  # some libraries print while they are imported

    from ptmoe.cli.evaluation import evaluation_table, report_run
    from ptmoe.cli.progress import progress_bar, training_bar
    from ptmoe.runs.environment import rank
    from ptmoe.train import train as run
    from ptmoe.train.steps import StepsCallback

    console = Console(quiet=rank() > 0)  # of several processes only the first prints
    if config is not None and "learning_rate" not in options and training.learning_rate is not None:
        written = read_yaml(config)
        model = written.get("model", TrainOptions.model_fields["model"].default)
        before = [method_entry(written.get("method", DEFAULT_METHOD))["name"], model]
        now = [training.method["name"], training.model]
        if before != now:
            console.print(
                f"learning rate {training.learning_rate:g}, as {config} has it for {' on '.join(before)}, is now that "
                f"of {' on '.join(now)}: --learning-rate gives another"
            )
    with progress_bar(console) as progress:
        steps = StepsCallback(training_bar(progress, training.method["name"]))
        router = training_bar(progress, "router")
        trained = run(
            training, resume=resume, force=force, callbacks=[steps], router_progress=router, say=progress.console.print
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
