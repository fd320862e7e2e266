"""Runs the pages' marked blocks as a reader would, each page in a new folder.

python docs/check_snippets.py [--quick] [PAGE …]       --quick trains for 20 steps and evaluates on 40
                                                       examples where a block says more

A comment before a block marks it: `<!-- ci: run -->` runs it, `<!-- ci: run with data -->` only where there is a
`../shared/data`, `<!-- ci: file NAME -->` writes it to a file. A block that fails ends its page, and the script with
status 1. Pages run side by side, one on each core. `SHOW=1` prints what the blocks print.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What takes time, and as much as shows that a block works.
LESS = {re.compile(r"(--max-steps |max_steps=)(\d+)"): 20, re.compile(r"(--eval-examples |--limit )(\d+)"): 40}
BLOCK = re.compile(r"^<!-- ci: (run with data|run|file (\S+)) -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNERS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


def check(page: Path, quick: bool) -> tuple[bool, list[str]]:
    """Whether every marked block of a page runs, of which there has to be one, and what is to be said of it."""
    data = ROOT.parent / "shared"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "work"
        folder.mkdir()
        (folder / "examples").symlink_to(ROOT / "examples")
        if data.exists():
            (folder.parent / "shared").symlink_to(data)
        text = page.read_text()
        for asked, most in LESS.items() if quick else ():
            text = asked.sub(lambda found, most=most: f"{found[1]}{min(most, int(found[2]))}", text)
        blocks = list(BLOCK.finditer(text))
        said = [f"{page.name}: {len(blocks)} marked blocks"]
        return bool(blocks) and all(run(*block.groups(), folder, data.exists(), said) for block in blocks), said


def run(mark: str, name: str | None, language: str, text: str, folder: Path, data: bool, said: list[str]) -> bool:
    if name is not None:
        (folder / name).write_text(text)
        return True
    if mark == "run with data" and not data:
        said.append(f"  left out without ../shared/data: {text.strip().splitlines()[0]}")
        return True
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    started = time.monotonic()
    command = [*RUNNERS[language], text]
    environment = os.environ | {"PATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    outcome = "FAILED" if done.returncode else "ran"
    said.append(f"  {outcome} in {time.monotonic() - started:.0f} s: {text.strip().splitlines()[0]}")
    if done.returncode or os.environ.get("SHOW"):
        said.append(done.stdout + done.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    pages = [Path(page) for page in sys.argv[1:] if page != "--quick"] or [
        page for page in sorted((ROOT / "docs").glob("*.md")) if BLOCK.search(page.read_text())
    ]
    pages.sort(key=lambda page: -page.stat().st_size)  # the longest first, so that it is not the last one to end
    failed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for page, (fine, said) in zip(pages, pool.map(partial(check, quick=quick), pages), strict=True):
            print("\n".join(said), flush=True)
            failed += [] if fine else [page.name]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
