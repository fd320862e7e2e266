"""README and docs name what is there, and README's code runs."""

import inspect
import re
from pathlib import Path

import pytest

from ptmoe.methods import WITH_FILES

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

MADE_BY_THE_READER = {"src/ptmoe/methods/soft_mixture.py", "src/ptmoe/tasks/units.py"}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("docs/changelog.md", "docs/contributing.md")])
def test_every_linked_file_is_there(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_test_that_is_named_is_there(page):
    text = (ROOT / page).read_text()
    for path in re.findall(
        r"(?<![\w./-])(?:tests|benchmarks|docs|examples|src)/[\w./-]+\.(?:py|yaml|md|jsonl?)\b", text
    ):
        assert path in MADE_BY_THE_READER or (ROOT / path).exists(), path
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


def test_the_readmes_first_python_block_runs(tmp_path, monkeypatch):
    from ptmoe import nano

    block = re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block.replace("meta-llama/Llama-3.2-1B-Instruct", str(nano.FOLDER)), names)
    assert names["out"].loss.isfinite()
    assert names["out"].routing.gate.shape == (1, 2)
    assert set(names["model"].encoders) == {"default", "b"}


def test_the_readme_holds_the_two_commands_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    for name in ("quickstart", "test"):
        assert re.search(rf"<!-- ci: {name} -->\n```bash\n.+\n```", readme)


def test_the_reference_has_each_class_that_describes_a_field_of_a_method():
    page = (ROOT / "docs" / "reference" / "methods.md").read_text()
    for config in WITH_FILES:
        for name in (name for name, field in config.model_fields.items() if not field.description):
            described = re.compile(rf"^ {{4}}{name}: ", re.MULTILINE)
            owner = next(one for one in config.__mro__ if described.search(inspect.cleandoc(one.__doc__ or "")))
            assert owner in WITH_FILES or f".{owner.__name__}\n" in page, f"{config.method}: {name}"
