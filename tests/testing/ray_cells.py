"""Cells on Ray that train nothing, for workers that may be killed: a module, so that Ray's workers find it."""

import os
import signal
import time
from pathlib import Path

from ptmoe.compare import workers
from ptmoe.compare.on_ray import CellActor

ATTEMPTS = "PTMOE_TEST_ATTEMPTS"  # names a file that gets a line for each attempt at a cell
ONCE, ALWAYS, BROKEN, TALKING = 13, 66, 77, 7  # seeds of cells that kill their process, that fail, that say something


def run_cell(options, progress, say):
    attempts = Path(os.environ[ATTEMPTS])
    before = attempts.read_text().split().count(str(options.seed))
    with attempts.open("a") as file:
        file.write(f"{options.seed}\n")
    folder = Path(options.output_dir)
    assert not folder.exists(), "a cell starts in a folder of its own"
    (folder / "eval").mkdir(parents=True)
    (folder / "half.txt").write_text("a cell that was killed leaves this")
    progress(1, 2, 0.5)
    time.sleep(0.02)
    if options.seed == ALWAYS or (options.seed == ONCE and not before):
        os.kill(os.getpid(), signal.SIGKILL)
    if options.seed == BROKEN:
        raise RuntimeError(f"out of memory, see {folder}")
    if options.seed == TALKING:
        say(f"written to {folder}")
    (folder / "half.txt").unlink()
    (folder / "eval" / "result.txt").write_text(f"{options.method['name']} {options.seed}")
    return 7


class Quick(CellActor):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        workers.run_cell = run_cell

    def prepare(self):
        """Nothing of what training imports, which takes seconds."""
