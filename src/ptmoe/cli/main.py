"""`ptmoe`: a command's options are its function's signature and the fields of a settings class.

Nothing heavy is imported before a command runs.
"""

import gc
import os
import sys
from typing import Annotated, NoReturn

import typer

from ptmoe import __version__
from ptmoe.cli.comparison import compare, quickstart
from ptmoe.cli.evaluation import evaluate, score
from ptmoe.cli.inference import convert, generate, inspect
from ptmoe.cli.options import HELP, command_of
from ptmoe.cli.serving import chat, serve
from ptmoe.cli.tables import params, tasks, tasks_show
from ptmoe.cli.training import train
from ptmoe.cli.tuning import tune
from ptmoe.cli.verification import verify
from ptmoe.errors import PtmoeError, system_error
from ptmoe.files import printable

TRAIN_OPTIONS = "ptmoe.train.options:TrainOptions"
base_options = command_of(TRAIN_OPTIONS, "revision", "dtype", "quantization")

app = typer.Typer(
    name="ptmoe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes cut long option names short in a terminal of 80 columns
    context_settings={"help_option_names": list(HELP)},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"ptmoe {__version__}")
        raise typer.Exit


@app.callback()
def ptmoe(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Tune a frozen language model with a soft prompt composed for each input."""


app.command()(quickstart)
app.command(cls=command_of(TRAIN_OPTIONS, methods=True))(train)
app.command(cls=base_options)(generate)
app.command(cls=command_of("ptmoe.serve.limits:Limits"))(serve)
app.command()(chat)
app.command("eval", cls=base_options)(evaluate)
app.command()(score)
app.command()(verify)


@app.command(
    name="lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def harness(context: typer.Context) -> None:
    """Run EleutherAI's lm_eval on an adapter. The options are its own: --model ptmoe --model_args adapter=RUN …"""
    from ptmoe.evaluate.harness import main as run

    run(context.args)


app.command(cls=command_of("ptmoe.compare.plan:ComparePlan"))(compare)
app.command(cls=command_of("ptmoe.compare.search:TunePlan", methods=True))(tune)
app.command(cls=base_options)(inspect)
app.command(cls=command_of(TRAIN_OPTIONS, "revision"))(params)
tasks_app = typer.Typer(help="List the tasks, or show one task's examples.", invoke_without_command=True)
tasks_app.callback()(tasks)
tasks_app.command("show", cls=command_of(TRAIN_OPTIONS, "revision"))(tasks_show)
app.add_typer(tasks_app, name="tasks")
app.command()(convert)


def main() -> None:
    """Run a command; an error that the user can fix ends with one message and status 2, a signal with the status that
    shells and schedulers expect."""
    gc.set_threshold(10_000, 10, 10)  # or a sixth of the start goes into looking through what imports make, which stays
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk may be where the output goes to
    except PtmoeError as error:
        _end(error)
    except OSError as error:
        _end(system_error(error))


def _end(error: PtmoeError) -> NoReturn:
    print(f"error: {printable(str(error))}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again as it ends, and complains
    sys.exit(error.status)


if __name__ == "__main__":
    main()
