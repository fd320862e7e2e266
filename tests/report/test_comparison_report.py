"""A comparison's report: every number comes from its cells, tests and intervals are right, nothing hostile runs."""

import base64
import csv
import io
import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.image import imread
from scipy import stats

from ptmoe.cli.console import Console
from ptmoe.errors import PtmoeError
from ptmoe.evaluate.nearest_words import nearest_tokens, nearest_words
from ptmoe.methods import METHODS
from ptmoe.models.attach import attach
from ptmoe.report import comparison_summary, read_comparison, write_report
from ptmoe.report.comparison import AVERAGE, MEAN, paper
from ptmoe.report.figures import curve_points, drawing, inline_svg, score_by_parameters, styles
from ptmoe.report.results import Board, Score, boards, holm, paired_test, t_interval
from ptmoe.report.sections import published_rows
from ptmoe.report.table import Table, to_csv, to_json, to_latex, to_markdown
from ptmoe.runs.folders import FAILED_FILE, predictions_file
from ptmoe.runs.predictions import read_predictions
from ptmoe.runs.records import Failure, write_lines
from ptmoe.tasks.resampling import Group, bootstrap_interval
from testing.bases import tiny_llama
from testing.folders import ALL_ON_SECOND, DOMAINS, ONE_EACH, SVAMP_TYPES, write_cell, write_plan
from testing.pages import Page

TASKS = ("nano/mixed", "nano/facts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The base, and three methods × two tasks × three seeds; one cell failed, one was interrupted."""
    folder = tmp_path_factory.mktemp("nano")
    words = [[[["sea", 0.8], [" port", 0.7]]] * 10] * 4
    for task in TASKS:
        write_cell(folder, "base", task, 0, skill=0.1)
        for label, skill in (("pt", 0.5), ("smop", 0.35), ("pt-moe", 0.9)):
            for seed in range(3):
                if (label, task, seed) != ("smop", "nano/facts", 2):
                    use = {"smop": ALL_ON_SECOND, "pt-moe": ONE_EACH}.get(label)
                    nearest = words if label == "pt-moe" else None
                    write_cell(folder, label, task, seed, skill=skill + 0.02 * seed, use=use, nearest=nearest)
    write_plan(folder, title="Four methods", methods=["base", "smop", "pt", "pt-moe"], seeds=[0, 1, 2])
    failure = Failure(label="smop", task="nano/facts", seed=2, error="DivergedError: the loss became NaN")
    write_lines(folder / FAILED_FILE, [failure])
    return folder


@pytest.fixture(scope="module")
def comparison(folder):
    return read_comparison(folder)


@pytest.fixture(scope="module")
def page(folder):
    return Page(write_report(folder))


@pytest.fixture(scope="module")
def maths(tmp_path_factory):
    """Trained on GSM8K and evaluated on two more tasks, one seed of pt, two of pt-moe."""
    folder = tmp_path_factory.mktemp("maths")
    tasks = ["gsm8k", "svamp", "mawps"]
    write_cell(folder, "pt", "gsm8k", 0, skill=0.5, tasks=tasks, examples=61)
    for seed in range(2):
        write_cell(folder, "pt-moe", "gsm8k", seed, skill=0.7, tasks=tasks, examples=61)
    return folder


def on_disk(folder, label, task, evaluated=None):
    """A label's evaluations as their files hold them, by seed."""
    name = (evaluated or task).replace("/", "__")
    places = (folder / "cells" / label / task.replace("/", "__")).glob(f"seed-*/eval/{name}.json")
    return [json.loads(path.read_text()) for path in sorted(places)]


def download(page, kind, number=0):
    found = [address for address in page.addresses if address.startswith(f"data:{kind}")]
    return base64.b64decode(found[number].partition(",")[2]).decode()


# Statistics


def test_an_interval_over_seeds_is_students():
    values = [71.0, 74.5, 69.25, 73.0]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 2"):
        t_interval([70.0])


def test_a_bootstrap_interval_agrees_with_resampling_one_by_one():
    values = np.random.default_rng(3).choice([0.0, 0.5, 1.0], 80)
    generator = np.random.default_rng(4)
    means = [generator.choice(values, 80).mean() for _ in range(10_000)]
    assert bootstrap_interval([Group(1.0, values)]) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.01)


def test_a_sign_flip_test_agrees_with_all_sign_arrangements():
    differences = np.array([1, 1, 1, 0, -1, 1, 0.5, 1, 0, -0.5, 1, 1])
    sums = np.array(list(product((1, -1), repeat=12))) @ differences
    exact = np.mean(np.abs(sums) >= abs(differences.sum()))
    test = paired_test([Group(1.0, differences)])
    assert test.difference.mean == pytest.approx(differences.mean())
    assert test.p == pytest.approx(exact, abs=0.015)
    assert paired_test([Group(1.0, np.ones(100))]).p == 1 / 10_001  # never 0: the observed arrangement counts


def test_groups_weigh_as_told_and_not_by_their_sizes():
    groups = [Group(0.5, np.ones(10)), Group(0.5, np.zeros(990))]
    test = paired_test(groups)
    assert test.difference[:4] == (0.5, (), 0.5, 0.5)
    assert test.p < 0.01


def test_no_difference_is_no_finding():
    assert paired_test([Group(1.0, np.zeros(50))]).p == 1.0


@pytest.mark.ci
def test_many_distinct_values_are_tested_like_few():
    values = np.random.default_rng(0).normal(0.1, 1, 3000)
    expected = stats.ttest_1samp(values, 0).pvalue
    assert paired_test([Group(1.0, values)]).p == pytest.approx(expected, rel=0.3, abs=2e-4)


@pytest.mark.parametrize(("lowest", "highest"), [(0, 100), (50, 100), (43, 44)])
@pytest.mark.ci
def test_ten_thousand_scores_are_resampled_in_less_memory_than_their_picks(lowest, highest):
    """All distinct, as a mean F1 over seeds is; rounding them moves the interval by nothing that is printed."""
    values = np.append(np.random.default_rng(0).uniform(lowest, highest, 9_999), 100)
    half = 1.96 * values.std() / 100
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap_interval([Group(1.0, values)]) == pytest.approx(expected, abs=0.05)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


# Reading


def test_only_cells_that_are_finished_count(comparison):
    assert comparison.labels == ["base", "smop", "pt", "pt-moe"]  # as the plan lists them
    assert len(comparison.cells) == 2 + 5 + 6 + 6
    (failed,) = comparison.left_out
    assert (failed.label, failed.task, failed.seed, failed.state) == ("smop", "nano/facts", 2, "failed")


def test_no_finished_cell_is_an_error_that_says_what_there_is(tmp_path):
    with pytest.raises(PtmoeError, match="no cell at all"):
        read_comparison(tmp_path)
    write_cell(tmp_path, "pt", "nano/mixed", 0, finished=False)
    with pytest.raises(PtmoeError, match="1 unfinished"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(PtmoeError, match="not a folder"):
        read_comparison(tmp_path / "nowhere")


def test_unfinished_failed_and_missing_cells_are_told_apart(tmp_path):
    for seed in range(3):
        write_cell(tmp_path, "pt", "nano/mixed", seed)
    write_cell(tmp_path, "dpt", "nano/mixed", 0, finished=False)
    failures = [Failure(label="dpt", task="nano/mixed", seed=1, error=text) for text in ("first", "last")]
    failures.append(Failure(label="pt", task="nano/mixed", seed=2, error="finished since"))
    write_lines(tmp_path / FAILED_FILE, failures)
    found = {(cell.label, cell.seed): (cell.state, cell.reason) for cell in read_comparison(tmp_path).left_out}
    assert found == {
        ("dpt", 0): ("unfinished", ""),
        ("dpt", 1): ("failed", "last"),
        ("dpt", 2): ("not started", ""),
    }


def test_a_failed_cell_is_one_cell_whatever_its_label_and_its_file_are_called(tmp_path):
    file, labels = "/data/my__set/train.jsonl", ("pt", "a__b", "c/d", "_", "x" * 300)
    write_plan(tmp_path, methods=[{"name": "pt", "label": label} for label in labels], tasks=[file], seeds=[0, 1])
    write_cell(tmp_path, "pt", file, 0, tasks=["nano/mixed"])
    write_cell(tmp_path, "pt", file, 1, method="pt", tasks=["nano/mixed"], finished=False)
    for label in labels[1:]:
        for seed in range(2):
            write_cell(tmp_path, label, file, seed, method="dpt", tasks=["nano/mixed"], finished=False)
    failures = [Failure(label=label, task=file, seed=0, error="no memory") for label in labels[1:]]
    write_lines(tmp_path / FAILED_FILE, failures)
    left_out = {(each.label, each.task, each.seed): each.state for each in read_comparison(tmp_path).left_out}
    unfinished = {(label, file, 1): "unfinished" for label in labels}
    assert left_out == {(label, file, 0): "failed" for label in labels[1:]} | unfinished


def test_a_base_that_failed_is_not_missing_for_every_seed(tmp_path):
    for task, seed in product(TASKS, range(3)):
        write_cell(tmp_path, "pt", task, seed)
    write_cell(tmp_path, "untouched", TASKS[0], 0, method="base")
    write_lines(tmp_path / FAILED_FILE, [Failure(label="untouched", task=TASKS[1], seed=0, error="no memory")])
    write_plan(tmp_path, methods=[{"name": "base", "label": "untouched"}, "pt"], tasks=list(TASKS), seeds=[0, 1, 2])
    assert [each.state for each in read_comparison(tmp_path).left_out] == ["failed"]


def write_score(cell, score):
    path = cell / "eval" / "nano__mixed.json"
    path.write_text(re.sub(r'("metrics": \{\s*"accuracy": )[\d.]+', rf"\g<1>{score}", path.read_text()))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda cell: (cell / "result.json").unlink(), "result.json is missing"),
        (lambda cell: (cell / "cell.json").write_text("{"), "cell.json"),
        (lambda cell: (cell / "metrics.jsonl").write_text('{"step": "many"}'), "line 1: step"),
        (lambda cell: (cell / "eval" / "nano__mixed.json").unlink(), "lacks nano/mixed"),
        (lambda cell: write_score(cell, "NaN"), "metrics.accuracy: Input should be a finite number"),
        (lambda cell: write_score(cell, "1e999"), "metrics.accuracy: Input should be a finite number"),
        (
            lambda cell: (cell / "cell.json").write_text(
                (cell / "cell.json").read_text().replace('"seed": 1', '"seed": 0')
            ),
            "repeats",
        ),
        (
            lambda cell: (cell / "cell.json").write_text((cell / "cell.json").read_text().replace("3840", "3841")),
            "trainable_parameters=3841",
        ),
    ],
)
def test_a_damaged_cell_is_named_and_the_others_are_reported(tmp_path, damage, said):
    cells = [write_cell(tmp_path, "pt", "nano/mixed", seed) for seed in range(3)]
    damage(cells[1])
    comparison = read_comparison(tmp_path)
    assert [cell.seed for cell in comparison.cells] == [0, 2]
    (left,) = comparison.left_out
    assert (left.state, left.seed) == ("damaged", 1)
    assert said in left.reason
    assert str(cells[1]) in left.reason


def test_a_label_is_one_method_at_one_size(tmp_path):
    write_cell(tmp_path, "pt", "nano/mixed", 0)
    write_cell(tmp_path, "pt", "nano/mixed", 1, parameters=1920, size={"num_virtual_tokens": 10})
    (left,) = read_comparison(tmp_path).left_out
    assert "{'num_virtual_tokens': 10}" in left.reason


def test_sizes_of_a_method_stand_in_the_order_of_their_numbers(tmp_path):
    for experts in (10, 2):
        write_cell(tmp_path, f"pt-moe N={experts}", "nano/mixed", 0, method="pt-moe", size={"num_experts": experts})
    write_cell(tmp_path, "pt", "nano/mixed", 0)
    write_plan(tmp_path, methods=["pt", "pt-moe"])
    assert read_comparison(tmp_path).labels == ["pt", "pt-moe N=2", "pt-moe N=10"]


def test_without_a_plan_methods_have_their_own_order(tmp_path, monkeypatch):
    from ptmoe.methods import METHODS

    for label in ("lora", "pt", "base"):
        write_cell(tmp_path, label, "nano/mixed", 0)
    for order, name in enumerate(("pt", "lora")):
        monkeypatch.setattr(METHODS[name], "order", order, raising=False)
    assert read_comparison(tmp_path).labels == ["base", "pt", "lora"]


# Results


def test_a_score_is_the_mean_over_seeds_with_students_interval(folder, comparison):
    (board,) = boards(comparison)
    for column in board.columns:
        score = board.scores["pt", column.name]
        values = [one["metrics"]["accuracy"] for one in on_disk(folder, "pt", column.task)]
        assert len(values) == 3
        assert score.mean == pytest.approx(np.mean(values))
        expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
        assert (score.low, score.high) == pytest.approx(expected)
        assert (score.over, score.seeds) == ("seeds", (0, 1, 2))


def test_the_average_is_the_plain_mean_over_tasks_with_each_seeds_own_average(folder, comparison):
    (board,) = boards(comparison)
    average = board.scores["pt-moe", AVERAGE]
    values = [
        np.mean([one["metrics"]["accuracy"], other["metrics"]["accuracy"]])
        for one, other in zip(*(on_disk(folder, "pt-moe", task) for task in TASKS), strict=True)
    ]
    assert average.mean == pytest.approx(np.mean(values))
    assert (average.low, average.high) == pytest.approx(t_interval(values))


def test_one_seed_has_its_examples_interval_and_what_trains_nothing_never_another(tmp_path):
    for seed in range(2):
        write_cell(tmp_path, "base", "nano/mixed", seed, skill=0.3)
    write_cell(tmp_path, "pt", "nano/mixed", 0)
    (board,) = boards(read_comparison(tmp_path))
    for label in ("base", "pt"):
        first = on_disk(tmp_path, label, "nano/mixed")[0]
        average = board.scores[label, AVERAGE]
        assert (average.low, average.high) == pytest.approx(first["interval"]["accuracy"])
        assert average.over == "examples"


def test_an_average_over_tasks_of_a_single_seed_adds_the_half_widths_as_squares(tmp_path):
    for task in TASKS:
        write_cell(tmp_path, "pt", task, 0)
    (board,) = boards(read_comparison(tmp_path))
    average, parts = board.scores["pt", AVERAGE], [board.scores["pt", task] for task in TASKS]
    assert average.mean - average.low == pytest.approx(np.hypot(*(part.mean - part.low for part in parts)) / 2)
    write_cell(tmp_path, "pt", TASKS[0], 1)
    (board,) = boards(read_comparison(tmp_path))
    assert board.scores["pt", AVERAGE][1:] == ((0, 1), None, None, None), "other seeds of each task: no interval"


def test_a_method_that_lacks_a_task_has_no_average_and_cannot_lead(tmp_path):
    for task in TASKS:
        write_cell(tmp_path, "pt", task, 0, skill=0.3)
    write_cell(tmp_path, "pt-moe", TASKS[0], 0, skill=0.95)
    (board,) = boards(read_comparison(tmp_path))
    assert ("pt-moe", AVERAGE) not in board.scores
    assert board.ranking == ("pt",)
    assert board.tests == ()


@pytest.mark.ci
def test_svamp_stands_as_the_mean_of_its_types_and_both_forms_are_offered(maths):
    (board,) = boards(read_comparison(maths))
    column = next(column for column in board.columns if column.task == "svamp")
    (evaluation,) = on_disk(maths, "pt", "gsm8k", "svamp")
    types = np.mean([evaluation["by_domain"][name]["accuracy"] for name in SVAMP_TYPES])
    score = board.scores["pt", "svamp"]
    assert (column.of, score.mean) == (MEAN, pytest.approx(types))
    assert score.low < types < score.high, "an interval over the examples of each type, from the predictions"
    assert evaluation["metrics"]["accuracy"] != pytest.approx(types)  # 61 examples are not of four equal parts
    write_report(maths)
    shown = list(csv.DictReader((maths / "tables" / "domains-accuracy-svamp.csv").open()))
    (ours,) = [row for row in shown if row["method"] == "pt"]
    assert float(ours["all examples"]) == pytest.approx(evaluation["metrics"]["accuracy"])
    assert float(ours["mean of domains"]) == pytest.approx(types)


def test_questions_have_a_table_for_f1_and_one_for_exact_match(tmp_path):
    for label in ("pt", "pt-moe"):
        write_cell(tmp_path, label, "mrqa-in", 0, tasks=["mrqa/squad", "mrqa/drop"])
    found = boards(read_comparison(tmp_path))
    assert [(board.metric, board.ranks) for board in found] == [("f1", True), ("exact_match", False)]
    assert [column.name for column in found[0].columns] == ["mrqa/squad", "mrqa/drop"]


def test_a_task_that_follows_two_trainings_has_a_column_for_each(tmp_path):
    for task in TASKS:
        write_cell(tmp_path, "pt", task, 0, tasks=["nano/mixed"])
    (board,) = boards(read_comparison(tmp_path))
    assert [column.name for column in board.columns] == ["nano/mixed after nano/facts", "nano/mixed after nano/mixed"]


def test_the_first_two_by_average_are_tested_on_the_same_examples(folder, comparison):
    (board,) = boards(comparison)
    *tests, average = board.tests
    assert board.ranking[:2] == ("pt-moe", "pt")
    assert board.test_notes == ()

    def scores(label, task):
        """Mean over seeds of each example, read without the package."""
        found = {}
        for path in (folder / "cells" / label / task.replace("/", "__")).glob("seed-*/predictions/*.jsonl"):
            for line in map(json.loads, path.open()):
                found.setdefault(line["id"], []).append(line["scores"]["accuracy"])
        return {name: 100 * np.mean(values) for name, values in found.items()}

    everything = []
    for test in tests:
        first, second = scores("pt-moe", test.name), scores("pt", test.name)
        differences = np.array([first[name] - second[name] for name in first])
        everything.append(differences)
        assert (test.examples, test.difference.seeds) == (60, (0, 1, 2))
        assert test.difference.mean == pytest.approx(differences.mean())
        flips = np.random.default_rng(5).choice([-1, 1], (20_000, 60)) @ differences / 60
        assert test.p == pytest.approx(np.mean(np.abs(flips) >= differences.mean() - 1e-9), abs=2e-3)
        generator = np.random.default_rng(6)
        means = [generator.choice(differences, 60).mean() for _ in range(5000)]
        assert test.difference[2:4] == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=1.0)
    assert [test.p_holm for test in tests] == holm([test.p for test in tests])
    assert average.difference.mean == pytest.approx(np.mean([each.mean() for each in everything]))


def test_the_test_is_of_the_seeds_that_both_have(tmp_path):
    for label, seeds, skill in (("pt-moe", (0, 1), 0.9), ("pt", (1, 2), 0.5)):
        for seed in seeds:
            write_cell(tmp_path, label, "nano/mixed", seed, skill=skill)
    (board,) = boards(read_comparison(tmp_path))
    (test,) = board.tests
    first, second = on_disk(tmp_path, "pt-moe", "nano/mixed")[1], on_disk(tmp_path, "pt", "nano/mixed")[0]
    assert test.difference.seeds == (1,)
    assert test.difference.mean == pytest.approx(first["metrics"]["accuracy"] - second["metrics"]["accuracy"])


@pytest.mark.parametrize("by_domain", [False, True])
def test_examples_that_several_trainings_were_tested_on_are_counted_once(tmp_path, by_domain):
    """Two trainings to the same answers say no more than one of them."""
    task = "svamp" if by_domain else "gsm8k"
    for folder, trainings in ((tmp_path / "one", TASKS[:1]), (tmp_path / "two", TASKS)):
        for trained_on, (label, skill) in product(trainings, (("pt", 0.5), ("dpt", 0.62))):
            write_cell(folder, label, trained_on, 0, skill=skill, tasks=[task], examples=100)
    (one,), (two,) = (boards(read_comparison(tmp_path / name)) for name in ("one", "two"))
    for label in ("pt", "dpt"):
        found, expected = (board.scores[label, AVERAGE] for board in (two, one))
        assert (found.mean, *found.ends) == pytest.approx((expected.mean, *expected.ends), abs=1e-9)
    (test,), average = one.tests, two.tests[-1]
    assert average.name == AVERAGE
    assert average._replace(name=test.name, p_holm=test.p_holm) == test
    assert [each.p for each in two.tests[:2]] == [test.p] * 2


def test_the_average_that_is_tested_weighs_each_column_alike_and_names_the_seeds_of_all(tmp_path):
    for trained_on, seeds, tasks in ((TASKS[0], (0, 1), ["gsm8k", "svamp"]), (TASKS[1], (1,), ["gsm8k"])):
        for seed, (label, skill) in product(seeds, (("pt", 0.4), ("dpt", 0.7))):
            write_cell(tmp_path, label, trained_on, seed, skill=skill, tasks=tasks, examples=40)
    *tests, average = boards(read_comparison(tmp_path))[0].tests
    assert len(tests) == 3
    assert average.difference.mean == pytest.approx(np.mean([test.difference.mean for test in tests]))
    assert average.difference.seeds == (1,)


def test_predictions_that_are_missing_leave_a_task_untested_and_say_so(tmp_path):
    for label in ("pt", "pt-moe"):
        for task in TASKS:
            write_cell(tmp_path, label, task, 0)
    (tmp_path / "cells" / "pt" / "nano__facts" / "seed-0" / "predictions" / "nano__facts.jsonl").unlink()
    (board,) = boards(read_comparison(tmp_path))
    assert [test.name for test in board.tests] == ["nano/mixed"], "and no test of the averages"
    (note,) = board.test_notes
    assert re.match(r"nano/facts: .*is missing", note)


def test_examples_that_only_one_method_answered_are_left_out_of_the_test(tmp_path):
    write_cell(tmp_path, "pt", "nano/mixed", 0, examples=60)
    write_cell(tmp_path, "pt-moe", "nano/mixed", 0, examples=48)
    (board,) = boards(read_comparison(tmp_path))
    assert board.tests[0].examples == 48
    assert "only the 48 of 60" in board.test_notes[0]


@pytest.mark.parametrize("change", [{"prompt": "another"}, {"references": ["another"]}, {"prompt": "cut", "cut": 1}])
def test_examples_of_one_id_that_ask_different_things_are_no_pair(change, tmp_path):
    cells = [write_cell(tmp_path, label, "nano/mixed", 0) for label in ("pt", "pt-moe")]
    path = predictions_file(cells[0], "nano/mixed")
    first, *others = read_predictions(path)
    path.write_bytes(b"".join(each.line() for each in (replace(first, **change), *others)))
    (board,) = boards(read_comparison(tmp_path))
    assert board.tests[0].examples == 60 - ("cut" not in change)


# The page and its files


@pytest.mark.slow
def test_every_number_of_the_page_and_of_every_download_is_the_cells(folder, page):
    means = {
        label: [np.mean([one["metrics"]["accuracy"] for one in on_disk(folder, label, task)]) for task in TASKS]
        for label in ("base", "smop", "pt", "pt-moe")
    }
    header, *shown = page.tables[0]
    names = header[2:4]
    assert sorted(names) == sorted(TASKS)
    order = [TASKS.index(name) for name in names]
    records = json.loads(download(page, "application/json"))["rows"]
    sheet = list(csv.DictReader(io.StringIO(download(page, "text/csv"))))
    markdown = [line.split(" | ") for line in download(page, "text/markdown").splitlines() if line.startswith("| ")][2:]
    latex = [line.split(" & ") for line in download(page, "application/x-tex").splitlines() if " & " in line][1:]
    assert [row[0].split("T=")[0] for row in shown] == list(means)
    for number, (label, values) in enumerate(means.items()):
        assert records[number]["method"] == sheet[number]["method"] == label
        for place, task in enumerate(order):
            value = values[task]
            assert shown[number][2 + place].startswith(f"{value:.1f}")
            assert records[number][TASKS[task]] == pytest.approx(value)
            assert float(sheet[number][TASKS[task]]) == pytest.approx(value)
            assert markdown[number][2 + place].replace("*", "").startswith(f"{value:.1f}")
            assert latex[number][2 + place].removeprefix(r"\textbf{").startswith(f"{value:.1f}")
        assert records[number]["average"] == pytest.approx(np.mean(values))


@pytest.mark.ci
def test_the_best_of_each_column_is_bold_in_the_page_and_in_the_tables(page):
    _, *shown = page.tables[0]
    assert [row[0].startswith("pt-moe") for row in shown] == [False, False, False, True]
    assert page.bold[:3] == shown[3][2:5]
    assert download(page, "text/markdown").count("**") == 2 * (1 + 3)  # the title, and the best of three columns
    assert download(page, "application/x-tex").count(r"\textbf") == 3


def test_each_cell_is_in_the_table_of_cells_as_its_files_hold_it(folder, page):
    rows = list(csv.DictReader((folder / "tables" / "cells.csv").open()))
    for label, task in product(("pt", "pt-moe"), TASKS):
        for seed, evaluation in enumerate(on_disk(folder, label, task)):
            found = {
                row["of"]: row
                for row in rows
                if (row["label"], row["task"], row["seed"], row["metric"]) == (label, task, str(seed), "accuracy")
            }
            assert float(found["all examples"]["score"]) == evaluation["metrics"]["accuracy"]
            assert float(found["all examples"]["score low"]) == evaluation["interval"]["accuracy"][0]
            for domain in DOMAINS:
                assert float(found[domain]["score"]) == evaluation["by_domain"][domain]["accuracy"]


def test_files_beside_the_page_are_what_it_embeds(folder, page):
    kept = {path.name: path.read_bytes() for path in (folder / "tables").iterdir()}
    embedded = [
        base64.b64decode(one.partition(",")[2]) for one in page.addresses if one.startswith(("data:text", "data:app"))
    ]
    assert sorted(embedded) == sorted(kept.values())
    assert {name.rpartition(".")[2] for name in kept} == {"csv", "json", "md", "tex"}


def test_the_page_needs_nothing_beside_itself_and_runs_nothing(page):
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", page.source)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "default-src 'none'" in page.source


def test_each_figure_is_there_as_png_and_svg_and_shows_something(folder, page):
    figures = folder / "figures"
    stems = sorted(path.stem for path in figures.glob("*.png"))
    assert stems == sorted(path.stem for path in figures.glob("*.svg"))
    assert len(stems) == page.tags.count("figure")
    for start in ("average-accuracy-by-trainable", "loss-by-step", "loss-by-second", "routing-of", "prompt-similarity"):
        assert any(stem.startswith(start) for stem in stems), start
    for stem in stems:
        pixels = imread(figures / f"{stem}.png")[..., :3]
        assert len(np.unique(pixels @ [1, 1000, 1_000_000])) > 20, stem


@pytest.mark.ci
def test_domains_too_many_for_a_figure_are_in_their_table(tmp_path, monkeypatch):
    domains = tuple(f"part {number}" for number in range(10))
    for label in ("pt", "dpt"):
        write_cell(tmp_path, label, "nano/mixed", 0, domains=domains, sizes=[2] * 10)
    marks = 2 * (1 + len(domains))
    for most, drawn in ((marks, 1), (marks - 1, 0)):
        monkeypatch.setattr("ptmoe.report.figures.MOST_MARKS", most)
        page = Page(write_report(tmp_path))
        assert (
            sum("by domain" in figure for figure in re.findall(r"<figcaption>.*?</figcaption>", page.source)) == drawn
        )
        assert (f"More than {most:,} scores are in a table" in page.text) == (not drawn)
        assert all(f"<wbr>{number}<wbr></th>" in page.source for number in range(10))


def test_the_page_tells_the_plan_the_gaps_the_collapse_and_the_words(page):
    for shown in ("Four methods", "comparison.yaml", "c0ffee1234", "Abacus 9000", "ptmoe compare"):
        assert shown in page.text
    assert "DivergedError: the loss became NaN" in page.text
    assert "1 failed" in page.text
    assert "smop on nano/mixed, 3 of 3 seeds; with seed 0 expert 1 takes" in page.text
    assert "␣port 0.70" in page.text
    assert "pt-moe reaches accuracy" in page.text
    assert "(p < 0.001)" in page.text


def test_every_seeds_routing_is_in_a_table(folder, page):
    rows = list(csv.DictReader((folder / "tables" / "routing.csv").open()))
    assert [(row["method"], row["seed"]) for row in rows if row["task"] == "nano/mixed"] == [
        (label, str(seed)) for label in ("smop", "pt-moe") for seed in range(3)
    ]
    assert {row["collapsed"] for row in rows if row["method"] == "smop"} == {"yes"}
    for row in rows:
        (path,) = (folder / "cells" / row["method"] / row["trained on"].replace("/", "__")).glob(
            f"seed-{row['seed']}/eval/*"
        )
        assert float(row["mutual information, nats"]) == json.loads(path.read_text())["routing"]["mutual_information"]


def rewrite(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


UNLIKE = {  # what of one cell is otherwise: its file, the values, and what the page says
    "Cells were evaluated on different data.": (
        "eval/nano__mixed.json",
        {"settings": {"data": "other"}},
        "The first that differ: nano/mixed: base on nano/mixed, seed 0; pt on nano/mixed, seed 1.",
    ),
    "Cells were evaluated in different ways.": (
        "eval/nano__mixed.json",
        {"settings": {"data": "same", "score": "choices"}},
        "The first that differ: nano/mixed: base on nano/mixed, seed 0; pt on nano/mixed, seed 1.",
    ),
    "Cells were trained on different data.": (
        "environment.json",
        {"data": "other"},
        "The first that differ: nano/mixed: pt on nano/mixed, seed 0; pt on nano/mixed, seed 1.",
    ),
    "Cells ran on different bases.": (
        "environment.json",
        {"base": "other"},
        "The first that differ: base on nano/mixed, seed 0; pt on nano/mixed, seed 1.",
    ),
    "Cells ran with different versions.": (
        "environment.json",
        {"versions": {"python": "3.11.7", "torch": "2.99.1", "peft": "0.99"}},
        "The first that differ: base on nano/mixed, seed 0; pt on nano/mixed, seed 1.",
    ),
    "Training examples are evaluated as well.": (
        "result.json",
        {"examples": 3000, "examples_evaluated": 1200},
        "nano/mixed: 1,200 of 3,000.",
    ),
}


@pytest.fixture
def alike(tmp_path, monkeypatch):
    """Finished cells that agree in all that is warned of, the base's and three of pt, for a page without figures."""
    monkeypatch.setattr("ptmoe.report.page.sections", lambda *_: [])
    places = [write_cell(tmp_path, "base", "nano/mixed", 0)]
    places += [write_cell(tmp_path, "pt", "nano/mixed", seed) for seed in range(3)]
    for place in places:
        rewrite(place / "eval" / "nano__mixed.json", settings={"data": "same"})
        rewrite(place / "environment.json", data=None if "base" in place.parts else "same")
    return places


def told(folder):
    text = Page(write_report(folder)).text
    return text, {heading for heading in UNLIKE if heading in text}


def terminal(folder, width=400):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison_summary(folder))
    return console.export_text()


@pytest.mark.ci
def test_a_report_leaves_nothing_of_the_one_before_that_is_no_longer_so(tmp_path):
    def files(folder):
        write_report(folder)
        found = (*folder.glob("tables/*"), *folder.glob("figures/*"))
        return {path.relative_to(folder).as_posix() for path in found}

    folder = tmp_path / "c"
    for label in ("pt", "dpt"):
        write_cell(folder, label, "nano/mixed", 0)
    unfinished = write_cell(folder, "dpt", "nano/words", 0, finished=False)
    assert {"tables/left-out.csv", "figures/accuracy-on-nano-mixed-by-trainable-parameters.png"} <= files(folder)
    for name in ("tables/mine.csv", "figures/mine.png"):
        (folder / name).write_text("mine")
    shutil.rmtree(unfinished)
    for label in ("pt", "dpt"):
        write_cell(folder, label, "nano/words", 0)
    found = files(folder)
    shutil.copytree(folder / "cells", tmp_path / "fresh" / "cells")
    assert found == {*files(tmp_path / "fresh"), "tables/mine.csv", "figures/mine.png"}


def test_a_method_whose_seeds_have_different_learning_rates_is_named(alike, tmp_path):
    config = alike[2] / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.0123", "learning_rate: 0.05"))
    line = "The first that differ: nano/mixed: pt on nano/mixed, seed 0; pt on nano/mixed, seed 1."
    assert f"Cells of one method were trained at different learning rates. {line}" in terminal(tmp_path)


@pytest.mark.parametrize("heading", UNLIKE)
@pytest.mark.ci
def test_cells_that_are_unlike_are_named_and_others_are_not(heading, alike, tmp_path):
    file, values, line = UNLIKE[heading]
    assert told(tmp_path)[1] == set()
    assert not any(other in terminal(tmp_path) for other in UNLIKE)
    rewrite(alike[2] / file, **values)
    text, headings = told(tmp_path)
    assert headings == {heading}
    assert line in text
    assert f"{heading} {line}" in terminal(tmp_path)


NO_ROOM = {  # what says that some inputs do not fit, the file it is in, and which data may then be others
    "cut": ("eval/nano__mixed.json", "Cells were evaluated on different data."),
    "unanswered": ("eval/nano__mixed.json", "Cells were evaluated on different data."),
    "examples_cut": ("result.json", "Cells were trained on different data."),
    "examples_left_out": ("result.json", "Cells were trained on different data."),
}


@pytest.mark.parametrize("short_of_room", NO_ROOM)
@pytest.mark.ci
def test_methods_with_other_data_are_named_unless_they_have_no_room_for_all_of_it(short_of_room, alike, tmp_path):
    file, heading = NO_ROOM[short_of_room]
    data, values, _ = UNLIKE[heading]

    def add(seed, **changes):
        place = write_cell(tmp_path, "pt-moe", "nano/mixed", seed)
        rewrite(place / "eval" / "nano__mixed.json", settings={"data": "same"})
        rewrite(place / "environment.json", data="same")
        rewrite(place / data, **changes)
        return place

    place = add(0, **values)
    assert told(tmp_path)[1] == {heading}
    rewrite(place / file, **{short_of_room: 1})
    assert told(tmp_path)[1] == set()
    add(1)  # with as much room, and other data for all that
    text, headings = told(tmp_path)
    assert headings == {heading}
    assert "The first that differ: nano/mixed: pt-moe on nano/mixed, seed 0; pt-moe on nano/mixed, seed 1." in text


@pytest.mark.parametrize(("cut", "unanswered"), [(3, 2), (3, 0), (0, 2)])
@pytest.mark.ci
def test_inputs_that_did_not_fit_are_counted_for_each_method(cut, unanswered, alike, tmp_path):
    assert "did not fit" not in told(tmp_path)[0] + terminal(tmp_path)
    for place in alike[1:]:
        rewrite(place / "eval" / "nano__mixed.json", cut=cut, unanswered=unanswered, examples=1000)
    for text in (told(tmp_path)[0], terminal(tmp_path)):
        assert "Inputs did not fit: they were cut, or not answered, which scores 0." in text
        assert text.count(f"pt on nano/mixed: {cut} cut and {unanswered} not answered of 1,000.") == 1


def test_what_cells_ran_on_stands_once_for_all_that_agree_in_it(alike, tmp_path):
    for number, place in enumerate(alike):
        changes = [{"step": 1, "differences": {"seed": [0, number]}}]
        rewrite(place / "environment.json", options={"seed": number}, data=str(number), changes=changes)
    assert Page(write_report(tmp_path)).text.count("Versions, commit and hardware of ") == 1
    rewrite(alike[2] / "environment.json", hardware={"processor": "Abacus 9001"})
    page = Page(write_report(tmp_path))
    assert "Versions, commit and hardware of base/nano/mixed/seed-0 and 2 more" in page.text
    assert "Versions, commit and hardware of pt/nano/mixed/seed-1" in page.text


@pytest.mark.slow
def test_hostile_names_are_shown_and_not_run(tmp_path):
    label = '<img src=x onerror="alert(1)">&$_%=1+1'
    write_cell(tmp_path, "hostile", "nano/mixed", 0, method="pt", use=ONE_EACH, nearest=[[[["</td><script>", 0.5]]]])
    place = tmp_path / "cells" / "hostile" / "nano__mixed" / "seed-0" / "cell.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "label": label}))
    write_plan(tmp_path, title="</title><script>alert(1)</script>")
    page = Page(write_report(tmp_path, "</pre><script>"))
    assert "script" not in page.tags
    assert "x" not in page.addresses
    assert page.tables[0][1][0].startswith(label)


def test_a_spreadsheet_takes_no_text_for_a_formula():
    bad = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", 'a"b', "fine"]
    table = Table("a", "a", pd.DataFrame([[name, -2.5] for name in bad], columns=["=name", "score"]))
    header, *lines = csv.reader(io.StringIO(to_csv(table)))
    assert header[0] == "'=name"
    assert [line[0] for line in lines] == ["'=1+1", "'+1", "'-1", "'@SUM(A1)", "'\t=1", 'a"b', "fine"]
    assert {line[1] for line in lines} == {"-2.5"}  # a number is no text


def test_a_truth_value_is_no_number():
    frame = pd.DataFrame({"trial": [1, 2], "router_standardize": [True, False]}, dtype=object)
    table = Table("trials", "T", frame, formats={"router_standardize": "{:g}".format})
    assert [row[1].text for row in table.rows()] == ["True", "False"]


def test_a_seed_is_printed_as_it_is_given_and_a_count_with_commas():
    table = Table("t", "T", pd.DataFrame([["pt", 20260101, 20260101]], columns=["method", "seed", "examples"]))
    assert [entry.text for entry in table.rows()[0]] == ["pt", "20260101", "20,260,101"]


@pytest.mark.parametrize("label", ["[2pt]", "*", "*a", "[x"])
def test_a_label_in_latex_is_no_argument_of_the_command_before_it(label):
    rows = to_latex(Table("t", "T", pd.DataFrame({"method": [label, label], "score": [1, 2]}))).splitlines()
    after = [row for before, row in pairwise(rows) if re.search(r"\\\\$|rule$", before)]
    assert [row for row in after if re.match(r"\s*[*\[]", row)] == []
    assert sum(f"{label} & " in row for row in rows) == 2


def test_markdown_and_latex_show_a_name_as_it_is():
    table = Table("a", "a", pd.DataFrame({"method": ["a|b_c*<i>\n$x^2$ & 50 % #1 \\ {}"]}))
    line = to_markdown(table).splitlines()[4]
    assert line == r"| a\|b\_c\*&lt;i&gt; \$x^2\$ &amp; 50 % \#1 \\ {} |"
    assert (
        r"a\textbar{}b\_c*\textless{}i\textgreater{} \$x\textasciicircum{}2\$ \& 50 \% \#1 \textbackslash{} \{\} \\"
        in to_latex(table)
    )


def test_control_characters_are_written_out_where_a_table_is_printed_and_kept_in_its_data():
    """Words of a vocabulary of bytes hold them; a page may not, and LaTeX stops at them."""
    table = Table("a", "a", pd.DataFrame({"word": ["\x03 \x7f"]}))
    assert table.rows()[0][0].text == r"\x03 \x7f"
    assert r"| \\x03 \\x7f |" in to_markdown(table)
    assert r"\textbackslash{}x03 \textbackslash{}x7f \\" in to_latex(table)
    assert json.loads(to_json(table))["rows"] == [{"word": "\x03 \x7f"}]


def test_the_terminal_shows_methods_tasks_and_intervals_within_80_columns(folder, maths):
    for where in (folder, maths):
        lines = terminal(where, width=80).splitlines()
        assert max(map(len, lines)) <= 80
        assert any(re.match(r"\s*pt-moe\s+3,764\s.*±", line) for line in lines)
    assert any("1 failed" in line for line in lines) is (where == folder)


@pytest.mark.parametrize(("task", "label"), [("nano/mixed", "pt-moe-road"), ("svamp", "pt-moe-road rank=10")])
def test_no_number_is_cut_off_in_a_terminal_of_80_columns(task, label, tmp_path):
    for name in ("pt", label):
        write_cell(tmp_path, name, task, 0, method="pt", skill=0.99, parameters=9_000_000)
    lines = terminal(tmp_path, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[-1] for line in lines if "9,000,000" in line] == ["60", "60"]


def test_a_domain_that_is_called_as_another_column_is_a_column_of_its_own(tmp_path):
    write_cell(tmp_path, "pt", "nano/mixed", 0, skill=0.5, domains=("accuracy", "seconds", "minutes"))
    (scores,) = on_disk(tmp_path, "pt", "nano/mixed")
    parts = [scores["by_domain"][name]["accuracy"] for name in ("accuracy", "minutes", "seconds")]
    (row,) = re.findall("pt .*", terminal(tmp_path))
    numbers = re.sub(r"\[.*?\]", "", row).split()[2:]
    assert list(map(float, numbers)) == [
        pytest.approx(n, abs=0.051) for n in (scores["metrics"]["accuracy"], *parts, 60)
    ]


# Published figures


def test_the_papers_averages_follow_from_its_own_scores():
    for metric, table in paper()["tables"].items():
        for method, row in table["rows"].items():
            assert np.mean(list(row["scores"].values())) == pytest.approx(row["average"], abs=0.011), (metric, method)
    for method, types in paper()["by_domain"]["svamp"].items():
        svamp = paper()["tables"]["accuracy"]["rows"][method]["scores"]["svamp"]
        assert np.mean(list(types.values())) == pytest.approx(svamp, abs=0.011)


@pytest.mark.ci
def test_published_rows_stand_beside_the_same_tasks_and_say_in_what_they_differ(maths):
    comparison = read_comparison(maths)
    (board,) = boards(comparison)
    rows, differences = published_rows(comparison, board)
    average = pytest.approx((35.63 + 56.77 + 71.83) / 3)
    assert list(rows[-1].values()) == ["PT-MoE", "80k", 35.63, 56.77, 71.83, average]
    assert "another base: the paper tuned Llama-3.2-1B-Instruct, here it is nano" in differences
    assert any("gsm8k has 1,319 there, 61 here" in note for note in differences)
    page = Page(write_report(maths))
    sources = [row["source"] for row in json.loads(download(page, "application/json"))["rows"]]
    assert sources == ["this comparison"] * 2 + ["published: arXiv:2505.09519, Llama-3.2-1B-Instruct"] * 8


def test_nothing_published_stands_beside_tasks_of_our_own(comparison):
    (board,) = boards(comparison)
    assert published_rows(comparison, board) == ([], [])


# Figures


def test_a_learning_curve_is_the_mean_over_seeds_with_their_range(comparison):
    cells = comparison.of("pt", "nano/mixed")
    losses = np.array([[log.loss for log in cell.run.logs] for cell in cells])

    def curve(label, against):
        points = curve_points(comparison, against)
        return points[(points["method"] == label) & (points["trained on"] == "nano/mixed")]

    found = curve("pt", "step")
    assert list(found["at"]) == [log.step for log in cells[0].run.logs]
    assert list(found["mean loss"]) == pytest.approx(losses.mean(0))
    assert list(found["lowest seed"]) == pytest.approx(losses.min(0))
    assert list(found["highest seed"]) == pytest.approx(losses.max(0))
    assert set(found["seeds"]) == {3}
    by_second = curve("pt", "seconds")
    assert by_second["at"].iloc[-1] == pytest.approx(np.mean([cell.run.logs[-1].seconds for cell in cells]))
    assert list(by_second["mean loss"]) == list(found["mean loss"])
    assert curve("base", "step").empty


def test_a_figure_on_a_page_has_the_colours_of_both_modes_and_ids_of_its_own():
    looks = styles({"pt": "pt", "<b>": "lora"})
    scores = {(name, AVERAGE): Score(50.0, (0, 1), 48.0, 52.0, "seeds") for name in looks}
    board = Board("accuracy", True, (), scores, tuple(looks))
    with drawing():
        figure = score_by_parameters(board, {"pt": 80_000, "<b>": 90_000}, looks)
        svg = inline_svg(figure, "one", looks.values())
    for style in looks.values():
        assert f"light-dark({style.color}, {style.dark})" in svg
    assert not re.search(r"(?<!light-dark\()#1f2937", svg), "ink on a dark page"
    assert set(re.findall(r' id="(\w+)-', svg)) == {"one"}
    ids = set(re.findall(r' id="([^"]+)"', svg))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= ids
    assert "<b>" not in svg


def test_methods_without_a_colour_of_their_own_are_told_apart():
    methods = {label: label for label in ("dora", "vera", "ia3", "prefix-tuning")}
    looks = styles(methods).values()
    for column in zip(*looks, strict=True):
        assert len(set(column)) == 4


def test_sizes_of_one_method_have_colours_of_their_own():
    looks = styles({f"pt-moe N={experts}": "pt-moe" for experts in (1, 2, 4)})
    for column in zip(*looks.values(), strict=True):
        assert len(set(column)) == 3


# Nearest words


class Letters:
    """A tokenizer whose token i is the i-th letter."""

    def __len__(self):
        return 26

    def decode(self, ids):
        return chr(ord("a") + ids[0])


def test_the_nearest_words_are_those_of_the_highest_cosine():
    generator = torch.Generator().manual_seed(0)
    prompt, embedding = torch.randn(5, 8, generator=generator), torch.randn(32, 8, generator=generator)
    embedding[26:] = 100 * prompt[0]  # rows that no token has, as a padded embedding ends
    found = nearest_tokens(prompt, embedding.bfloat16(), Letters(), k=3)
    cosines = torch.cosine_similarity(prompt[:, None], embedding.bfloat16().float()[None, :26], dim=2)
    values, ids = cosines.topk(3)
    assert [[word for word, _ in row] for row in found] == [[chr(97 + i) for i in row] for row in ids.tolist()]
    assert np.allclose([[cosine for _, cosine in row] for row in found], values, atol=1e-5)


def test_prompts_that_are_made_of_the_input_have_no_nearest_words():
    for method, experts in {"pt": 1, "ept": 1, "attempt": 3, "id-spam": 0, "mept": 0}.items():
        model = attach(tiny_llama(), METHODS[method](num_virtual_tokens=2))
        assert len(nearest_words(model, Letters()).experts) == experts


def test_a_large_vocabulary_in_parts_gives_the_same_words(monkeypatch):
    prompt, embedding = torch.eye(4), torch.randn(26, 4, generator=torch.Generator().manual_seed(1))
    whole = nearest_tokens(prompt, embedding, Letters(), k=4)
    monkeypatch.setattr("ptmoe.evaluate.nearest_words.ROWS", 3)
    assert nearest_tokens(prompt, embedding, Letters(), k=4) == whole


def test_unfit_prompts_and_numbers_of_words_are_refused():
    embedding = torch.zeros(26, 4)
    with pytest.raises(PtmoeError, match=r"\(2, 3\) beside an embedding \(26, 4\)"):
        nearest_tokens(torch.zeros(2, 3), embedding, Letters())
    for k in (0, 27):
        with pytest.raises(PtmoeError, match=f"k={k}"):
            nearest_tokens(torch.zeros(2, 4), embedding, Letters(), k=k)
