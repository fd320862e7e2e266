"""Runs the pages' marked blocks as a reader would, each page in a new folder: `python docs/check_snippets.py [PAGE …]`.

A comment before a block marks it: `<!-- ci: run -->` runs it, `<!-- ci: run with data -->` only where there is a
`../shared/data`, `<!-- ci: file NAME -->` writes it to a file. A block that fails ends its page, and the script with
status 1. `SHOW=1` prints what the blocks print.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^<!-- ci: (run with data|run|file (\S+)) -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNERS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


def check(page: Path) -> bool:
    """Whether every marked block of a page runs; there has to be one."""
    data = ROOT.parent / "shared"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "work"
        folder.mkdir()
        (folder / "examples").symlink_to(ROOT / "examples")
        if data.exists():
            (folder.parent / "shared").symlink_to(data)
        blocks = list(BLOCK.finditer(page.read_text()))
        print(f"{page.name}: {len(blocks)} marked blocks", flush=True)
        return bool(blocks) and all(run(*block.groups(), folder, data.exists()) for block in blocks)


def run(mark: str, name: str | None, language: str, text: str, folder: Path, data: bool) -> bool:
    if name is not None:
        (folder / name).write_text(text)
        return True
    if mark == "run with data" and not data:
        print(f"  left out without ../shared/data: {text.strip().splitlines()[0]}")
        return True
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    started = time.monotonic()
    command = [*RUNNERS[language], text]
    environment = os.environ | {"PATH": paths}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    outcome = "FAILED" if done.returncode else "ran"
    print(f"  {outcome} in {time.monotonic() - started:.0f} s: {text.strip().splitlines()[0]}")
    if done.returncode or os.environ.get("SHOW"):
        print(done.stdout + done.stderr, flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    pages = [Path(page) for page in sys.argv[1:]] or [
        page for page in sorted((ROOT / "docs").glob("*.md")) if BLOCK.search(page.read_text())
    ]
    failed = [page.name for page in pages if not check(page)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
