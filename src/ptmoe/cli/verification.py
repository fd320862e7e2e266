"""`ptmoe verify`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ptmoe.cli.console import Console
from ptmoe.cli.options import Device
from ptmoe.errors import PtmoeError, shown


def verify(
    folder: Annotated[Path, typer.Argument(help="run folder, or the folder of a comparison")],
    data_dir: Annotated[
        str | None, typer.Option(help="folder or file with the data; by default as the run has it")
    ] = None,
    device: Device = None,
) -> None:
    """Repeat a run's evaluations, and compare them, its base, adapter and data with what the folder records.

    Of a comparison, every finished cell. The status is 0 if all is as recorded, 1 if not. Nothing is written.
    """
    from ptmoe.models.bases import quiet
    from ptmoe.runs.folders import CELL_FILE, PLAN_FILE

    compared = (folder / PLAN_FILE).is_file()
    runs = sorted(path.parent for path in folder.glob(f"cells/**/{CELL_FILE}")) if compared else [folder]
    if not runs:
        raise PtmoeError(f"{folder} holds no finished cell: nothing to verify")
    quiet()
    from ptmoe.train.verify import verify as verify_run

    console, changed = Console(), 0
    for run in runs:
        checks = verify_run(run, data_dir=data_dir, device=device, say=console.print)
        differing = [check for check in checks if not check.equal]
        table = Table("", "recorded", "now", "")
        for check in differing if compared else checks:
            verdict = "equal" if check.equal else "differs" if check.decides else "differs, which decides nothing"
            table.add_row(check.what, shown(check.recorded), shown(check.found), verdict)
        if table.row_count:
            console.print(table)
        decided = [check for check in differing if check.decides]
        changed += bool(decided)
        what = f"differs from its record in {len(decided)} of {len(checks)} things" if decided else "is as recorded"
        console.print(f"{run} {what}")
    if compared:
        console.print(f"{len(runs) - changed} of {len(runs)} cells are as recorded")
    if changed:
        raise typer.Exit(1)
