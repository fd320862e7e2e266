"""`ptmoe tune`."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from ptmoe.cli.console import Console
from ptmoe.cli.interruption import ends_with_a_signal


def tune(
    context: typer.Context,
    plan: Annotated[
        Path | None, typer.Argument(help="YAML file, or the folder of a search to continue; options take precedence")
    ] = None,
) -> None:
    """Search for a training's settings with Ray Tune: learning rate, router noise, rank, or what --search names.

    The training is what `ptmoe train` would do with the same options; the best settings become best.yaml, which
    `ptmoe train` takes. The same command continues a search that was interrupted.
    """
    from ptmoe.compare.search import TunePlan, read_plan, resolved
    from ptmoe.train.options import method_entry

    options = {name: value for name, value in context.obj.items() if name in TunePlan.model_fields}
    fields = {name: value for name, value in context.obj.items() if name not in options}
    if "method" in options or fields:
        options["method"] = {**method_entry(options.get("method", {})), **fields}
    asked = resolved(read_plan(plan, options))
    folder = Path(asked.output_dir or Path("runs") / f"tune-{datetime.now().strftime('%Y%m%d-%H%M%S')}")

    from ptmoe.models.bases import quiet

    quiet()
    # The report's libraries are optional: a missing one should show before the trials, not after.
    from ptmoe.compare.tuning import best_of
    from ptmoe.compare.tuning import tune as search
    from ptmoe.report import write_tuning_report

    console = Console(highlight=False)
    for field, values in asked.search.items():
        console.print(f"{field}: {values if isinstance(values, str) else ', '.join(map(str, values))}")
    with ends_with_a_signal(f"ptmoe tune {folder}", console):
        records = search(asked, folder, say=lambda line: console.print(line, markup=False))
    failed = [record for record in records if record.state == "failed"]
    if page := write_tuning_report(folder):
        best = best_of([record for record in records if record.state != "failed"])
        console.print(f"best: trial {best.number}, {best.scores[-1][1]:.1f} % on the validation examples")
        console.print(f"train with it: ptmoe train {folder / 'best.yaml'}")
        console.print(f"report: {page}")
    if failed:
        console.print(f"{len(failed)} of {len(records)} trials failed; the same command retries them")
        raise SystemExit(1)
