"""What the project is installed with."""

import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

import ptmoe.methods

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
SCRIPT = ROOT / "tools" / "supply_chain.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_the_methods_need_of_peft_comes_with_the_project():
    """`peft` imports what it does not ask for: what its modules import comes with the packages that ours asks for."""
    needed = set()
    for path in Path(ptmoe.methods.__file__).parent.glob("*.py"):
        for name in re.findall(r"from (peft[\w.]*) import", path.read_text()):
            source = Path(importlib.util.find_spec(name).origin)
            for node in ast.parse(source.read_text()).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                needed |= {name.partition(".")[0] for name in names}
    asked, seen = ["ptmoe"], set()
    while asked:
        name = re.split(r"[^\w.-]", asked.pop())[0].lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            requirements = PROJECT["dependencies"] if name == "ptmoe" else importlib.metadata.requires(name) or []
            asked += [line for line in requirements if "extra ==" not in line]
    homes = importlib.metadata.packages_distributions()
    missing = {
        module
        for module in needed - sys.stdlib_module_names - {"peft"}
        if not seen & {home.lower().replace("_", "-") for home in homes.get(module, ())}
    }
    assert "attr" in needed
    assert not missing


def pins(text):
    """The version of each package, by its name as the index has it."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_lock_pins_what_is_tested_each_with_a_hash():
    locked, tested = pins(LOCK.read_text()), pins((ROOT / "constraints.txt").read_text())
    assert locked.keys() >= tested.keys() - {"torch"}, tested.keys() - locked.keys()
    assert {name: locked[name] for name in tested if name in locked} == {
        n: v for n, v in tested.items() if n != "torch"
    }
    entries = re.split(r"^(?=[\w])", LOCK.read_text(), flags=re.MULTILINE)[1:]
    assert len(entries) == len(locked)
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in LOCK.read_text()


def test_the_lock_holds_all_that_the_project_asks_for():
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        name = re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower()
        assert name == "torch" or name in pins(LOCK.read_text()), name


@pytest.fixture
def supply_chain():
    spec = importlib.util.spec_from_file_location("supply_chain", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("lines", "accepted"),
    [
        (["License-Expression: MIT"], True),
        (["License-Expression: Apache-2.0 AND (BSD-2-Clause AND MIT)"], True),
        (["License-Expression: GPL-3.0-only OR MIT"], True),
        (["License-Expression: MIT AND GPL-3.0-only"], False),
        (["Classifier: License :: OSI Approved :: BSD License"], True),
        (["Classifier: License :: OSI Approved :: GNU Affero General Public License v3"], False),
        (["Classifier: License :: OSI Approved", "License: Apache-2.0"], True),
        ([], False),
    ],
)
def test_a_licence_is_accepted_if_it_is_listed(supply_chain, tmp_path, lines, accepted):
    folder = tmp_path / "x-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", "Name: x", "Version: 1", *lines, ""]))
    assert supply_chain.is_accepted(importlib.metadata.PathDistribution(folder)) == accepted


def test_an_audit_names_what_it_knows_and_says_where_it_knows_nothing(supply_chain, capsys):
    weak = {"name": "x", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}
    skipped = {"name": "y", "skip_reason": "not found"}
    assert supply_chain.known_weaknesses(json.dumps({"dependencies": [weak, skipped]})) == ["x 1: CVE-1, mended in 1.1"]
    assert "1 of 2 packages audited" in capsys.readouterr().out
    for report in ("", json.dumps({"dependencies": [skipped]})):
        assert supply_chain.known_weaknesses(report) == []
        assert "not audited" in capsys.readouterr().out
