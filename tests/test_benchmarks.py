"""The benchmarks' command, what their systems compute, and how their numbers become a page."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
pytest.importorskip("benchmarks.cases", reason="a source distribution has no benchmarks")

from benchmarks import machine, report  # noqa: E402
from benchmarks.cases import GOALS, PARTS, QUICK, QUICK_SHAPE, Case, Goal, cases  # noqa: E402
from benchmarks.interleave import measure  # noqa: E402
from benchmarks.lengths import FILE, rows, sample  # noqa: E402
from benchmarks.parts import generate, step  # noqa: E402
from benchmarks.report import Figure, is_met, measured, read, render  # noqa: E402
from benchmarks.serving import Goal as ServingGoal  # noqa: E402
from benchmarks.serving import Measurement, section  # noqa: E402
from benchmarks.worker import built  # noqa: E402

COMMANDS = {"startup", "study"}  # parts that measure whole commands
QUICK_CASES = [case for case in cases(PARTS, [QUICK_SHAPE], None, "cpu", quick=True) if case.part not in COMMANDS]
SYSTEMS = {
    f"{case.part}, {case.name}, {name}": {"shape": case.shape, "dtype": case.dtype, **options}
    for case in QUICK_CASES
    for name, options in case.systems.items()
}


def result(part="epoch", name="passages", rounds=None, **changes):
    """A line of a results file."""
    rounds = rounds or {"ptmoe pt-moe": [1.0, 2.0, 3.0], "Trainer + peft prompt tuning": [7.0, 12.0, 27.0]}
    return {
        "part": part,
        "name": name,
        "shape": "sketch",
        "dtype": "float32",
        "device": "cpu",
        "reference": "ptmoe pt-moe",
        "date": "2026-01-01",
        "command": "python -m benchmarks",
        "environment": machine.describe() | {"commit": "abc"},
        "rounds": {
            system: [{"seconds": value, "peak_bytes": int(value * 1e9), "base_bytes": 10**8} for value in values]
            for system, values in rounds.items()
        },
        "failures": {},
        **changes,
    }


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_a_ratio_is_taken_round_by_round():
    figure = report.ratios(result(), "Trainer + peft prompt tuning", "ptmoe pt-moe")
    assert figure == Figure(median=7.0, least=6.0, most=9.0)  # of the medians it would be 6.0


def test_the_limit_is_the_fastest_way():
    lines = result("step", rounds={"ptmoe pt-moe": [3.0] * 3, "limit, a": [1.0, 9.0, 2.0], "limit, b": [2.5] * 3})
    assert report.fastest(lines, "limit") == "limit, a"


@pytest.mark.parametrize(
    ("bound", "met"),
    [({"at_least": 6}, True), ({"at_least": 8}, False), ({"at_most": 8}, True), ({"at_most": 6}, False)],
)
def test_a_goal_is_met_by_the_median(bound, met):
    goal = Goal("faster", "epoch", "Trainer + peft prompt tuning", "ptmoe pt-moe", **bound)
    assert is_met(goal, measured(goal, result())) is met


def test_a_goal_is_about_its_own_cases():
    goal = Goal("faster", "epoch", "Trainer + peft prompt tuning", "ptmoe pt-moe", at_least=6, shape="llama-1b")
    assert measured(goal, result()) is None
    assert measured(goal, result(shape="llama-1b")) is not None
    assert measured(goal, result(shape="llama-1b", rounds={"ptmoe pt-moe": [1.0]})) is None  # the other one failed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.0123"),
        (0.5, "0.500"),
        (1.2345, "1.23"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (0, "0"),
        (-25.92, "-25.9"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert Figure(value, value, value).text() == text


def test_every_goal_is_about_a_system_that_is_measured():
    for device in ("cpu", "cuda"):
        made = list(cases(PARTS, None, None, device))
        for goal in GOALS:
            if goal.device in (None, device) and (device == "cpu" or goal.shape != "sketch"):
                about = [case for case in made if case.part == goal.part and goal.name in (None, case.name)]
                about = [case for case in about if goal.shape in (None, case.shape)]
                assert about, goal
                for case in about:
                    assert goal.system in case.systems
                    assert goal.over is None or any(name.startswith(goal.over) for name in case.systems)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_met_and_what_failed(tmp_path):
    path = tmp_path / "cpu.jsonl"
    failed = result(name="other", failures={"trl": "killed by signal 9"})
    slow = result(rounds={"ptmoe pt-moe": [5.0], "Trainer + peft prompt tuning": [7.0]})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (slow, failed, result())))
    page = render({"cpu": read(path), "cuda": []})
    assert "| sketch, float32, passages | ≥ 6 | 7.00 (6.00–9.00) | met |" in page
    assert "≤ 0.3 | 0.143 (0.111–0.167) | met" in page
    assert "1.40" not in page  # a later line of a case stands for it
    assert "trl could not be measured: killed by signal 9." in page
    assert "## GPU" not in page


def test_each_device_has_its_own_part():
    page = render({"cpu": [result()], "cuda": [result(device="cuda", rounds={"ptmoe pt-moe": [0.5]})]})
    cpu, gpu = page.split("## GPU")
    assert "2.00 (1.00–3.00)" in cpu
    assert "2.00 (1.00–3.00)" not in gpu
    assert "0.500" in gpu


# -- what is measured --------------------------------------------------------------------------------------------------


def test_only_lengths_are_recorded():
    recorded = json.loads(FILE.read_text())
    assert {name: len(pairs) for name, pairs in recorded.items()} == {"passages": 1190, "gsm8k": 1319}
    assert all(prompt > 0 and answer > 1 for pairs in recorded.values() for prompt, answer in pairs)
    assert sample("passages", 5, seed=1) == sample("passages", 5, seed=1) != sample("passages", 5, seed=2)


@pytest.mark.parametrize("by_length", [False, True])
def test_no_batch_of_completions_holds_more_than_its_places(by_length):
    prompts = [prompt for prompt, _ in rows(sample("passages", 100, seed=0), 100)]
    made = generate.batches(prompts, 4_000, 104, by_length)
    assert sorted(map(len, prompts)) == sorted(len(prompt) for batch in made for prompt in batch)
    assert all(len(batch) * (max(map(len, batch)) + 104) <= 4_000 for batch in made)
    for one, following in pairwise(made):  # which has the first prompt that did not fit
        assert (len(one) + 1) * (max(map(len, [*one, following[0]])) + 104) > 4_000


def test_packed_rows_of_the_limit_do_not_see_each_other():
    base = machine.Setting(QUICK_SHAPE, "float32").base()
    call = step._call(base, [7, 5, 9], packed=True)
    with torch.no_grad():
        together = base.model(**call, use_cache=False).last_hidden_state[0]
        alone = [
            base.model(inputs_embeds=part[None]).last_hidden_state[0]
            for part in call["inputs_embeds"][0].split([7, 5, 9])
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:training without ptmoe.RoutingCallback")
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_runs(name):
    setting, measure_round = built(SYSTEMS[name])
    made = measure_round(True)
    assert setting.held > 0
    assert made.get("seconds", 1) > 0


@pytest.mark.parametrize("ends", [False, True])
def test_both_sides_complete_alike(ends, monkeypatch):
    """With one prompt and no padding, which peft puts behind the prompt, they make the same tokens, and as many as the
    recorded answers have where these end."""
    attach, get_peft_model, texts = generate.attach, generate.get_peft_model, []

    def ours(*arguments, **options):
        model = attach(*arguments, **options)
        torch.nn.init.constant_(model.encoder.prompt, 0.01)
        return model

    def theirs(*arguments):
        model = get_peft_model(*arguments)
        torch.nn.init.constant_(model.prompt_encoder.default.embedding.weight, 0.01)
        return model

    class Noting(generate.Ids):
        def decode(self, ids, **_):
            texts.append(super().decode(ids))
            return texts[-1]

    monkeypatch.setattr(generate, "attach", ours)
    monkeypatch.setattr(generate, "get_peft_model", theirs)
    monkeypatch.setattr(generate, "Ids", Noting)
    lengths = [[9, 2], [9, 5], [9, 1], [9, 30]]
    work = {"ends": ends, "lengths": lengths, "virtual": 5, "places": 10_000, "new_tokens": 12}
    setting = machine.Setting(QUICK_SHAPE, "float32")
    generate.ptmoe(setting, method={"name": "pt", "num_virtual_tokens": 5}, **work)(False)
    generate.peft(setting, by_length=False, **work)(False)
    one, other = texts[-8:-4], texts[-4:]
    assert one == other
    assert [len(text.split()) for text in one] == ([1, 4, 0, 12] if ends else [12] * 4)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_system_that_fails_leaves_the_others():
    case = Case(
        "startup",
        "one that fails",
        "",
        "",
        {
            "good": {"run": "startup.command", "arguments": ["-c", ""], "repeats": 1},
            "bad": {"run": "startup.command", "arguments": ["-c", "raise SystemExit(3)"], "repeats": 1},
        },
        warm_up="none",
    )
    rounds, failures = measure(case, 2, lambda _: None)
    assert len(rounds["good"]) == 2
    assert "exit status 3" in failures["bad"]
    assert "bad" not in rounds


def python(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_measures_writes_and_resumes(tmp_path):
    def run(*arguments):
        return python("benchmarks", *arguments, "--output", str(tmp_path / "RESULTS.md"))

    made = run("adapters", "--quick")
    assert made.returncode == 0, made.stderr
    (line,) = read(tmp_path / "results" / "cpu.jsonl")
    assert [point["adapters"] for point in line["rounds"]["ptmoe pt-moe"][0]["points"]] == list(QUICK.adapters)
    assert "Memory of many adapters" in (tmp_path / "RESULTS.md").read_text()
    assert "round 1" not in run("adapters", "--quick", "--resume").stdout
    assert "--shape tiny is for --quick" in run("step", "--shape", "tiny").stderr


@pytest.mark.slow
def test_a_profile_names_the_operators_that_take_the_time():
    def run(*arguments):
        return python("benchmarks.profiling", *arguments, "--shape", "tiny")

    made = run("step", "ptmoe pt-moe", "--name", "passages")
    assert made.returncode == 0, made.stderr
    assert "| operator | seconds | share | calls |" in made.stdout
    assert "`aten::" in made.stdout
    assert "it has ptmoe pt-moe, " in run("step", "another").stderr
    assert "no case 'passage' in step: it has equal lengths; passages" in run("step", "x", "--name", "passage").stderr


@pytest.mark.parametrize("name", ["mixed", "real/classification", "real/squad", "real/words"])
def test_the_studies_are_plans_that_compare_reads(name):
    from ptmoe.compare import read_plan

    plan = read_plan(machine.ROOT / "benchmarks" / f"{name}.yaml")
    assert {"pt", "dpt", "smop", "pt-moe", "lora", "hydralora", "vera"} <= {entry["name"] for entry in plan.methods}
    assert len(plan.seeds) >= 3


@pytest.mark.parametrize("name", ["league", "router_rate", "real/league", "real/squad-short"])
@pytest.mark.ci
def test_other_plans_have_methods_and_options_that_there_are(name):
    from ptmoe.compare import read_plan
    from ptmoe.compare.cells import variants
    from ptmoe.models.bases import load_config

    plan = read_plan(machine.ROOT / "benchmarks" / f"{name}.yaml")
    found, left_out = variants(plan, load_config("nano"))  # raises what it does not know
    assert len(found) + len(left_out) == len(plan.methods)


def test_a_goal_of_serving_is_judged_round_by_round():
    rounds = {"ours": [10.0, 30.0, 29.0], "theirs": [10.0, 20.0, 30.0]}
    ratio, more = ServingGoal("ours", "at least", 0.97, "theirs"), ServingGoal("ours", "more by at most", 3.0, "theirs")
    assert ratio.figure(rounds) == Figure(1.0, 29 / 30, 1.5)
    assert more.figure(rounds) == Figure(0.0, -1.0, 10.0)
    assert ratio.is_met(ratio.figure(rounds))
    assert more.is_met(more.figure(rounds))
    assert not ServingGoal("ours", "at most", 5.0).is_met(ServingGoal("ours", "at most", 5.0).figure(rounds))


def test_the_page_has_the_last_record_of_each_measurement_of_serving(tmp_path):
    about = {"on": "nano", "date": "2026-01-01", "commit": "abc", "command": "python -m benchmarks.serve"}
    path = tmp_path / "serving.jsonl"
    for value in (1.0, 2.0):
        made = Measurement("http", "HTTP", "ms", {"over HTTP": [value]}, [ServingGoal("over HTTP", "at most", 1.5)])
        with path.open("a") as opened:
            opened.write(json.dumps(made.line() | about) + "\n")
    page = section(path)
    assert "| HTTP | over HTTP ≤ 1.5 | 2.00 | **not met** |" in page
    assert "1.00" not in page
    assert section(tmp_path / "none.jsonl") == ""
