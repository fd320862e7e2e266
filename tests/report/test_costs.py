"""A report's costs, its search for learning rates, and the front of its chart of sizes."""

import csv

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ptmoe.methods import METHODS
from ptmoe.report import read_comparison, write_report
from ptmoe.report.costs import bytes_text
from ptmoe.report.figures import LARGEST, SMALLEST, drawing, pareto_front, score_by_parameters, styles
from ptmoe.report.results import boards
from ptmoe.runs.folders import read_run
from testing.folders import write_cell, write_plan, write_search
from testing.pages import Page

LOST = {"texts": 200, "tokens": 900, "base_loss": 0.5}
SIZES = {"pt": 1920, "dpt": 3700, "lora": 106_496, "prefix-tuning": 15_360}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("league")
    write_cell(folder, "base", "nano/mixed", 0, skill=0.1)
    for place, (label, count) in enumerate(SIZES.items()):
        for seed in range(2):
            costs = {"adapter_bytes": 4 * count + 80, "peak_memory": 10**9 + seed, "forgetting": LOST}
            costs["forgetting"] = {**LOST, "loss": 0.5 + 0.25 * place + 0.1 * seed}
            write_cell(
                folder, label, "nano/mixed", seed, skill=[0.4, 0.6, 0.8, 0.5][place], parameters=count, costs=costs
            )
    write_search(folder, "pt", {0.00333: [10, 20, 30], 0.01: [40, 50, 60], 0.03: [80, 70, 60], 0.09: [None, 99, 99]})
    write_search(folder, "lora", {0.001: [10, 20, 30], 0.003: [20, 30, 40.3]}, given=0.001)
    write_plan(folder, methods=["base", *SIZES], seeds=[0, 1], search=True)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page(write_report(folder))


def rows(folder, name):
    with (folder / "tables" / f"{name}.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.mark.ci
def test_what_a_method_costs_is_what_its_runs_recorded(folder, page):
    found = rows(folder, "cost")
    assert list(found) == ["base", *SIZES]
    for place, (label, count) in enumerate(SIZES.items()):
        row, runs = found[label], [cell.run for cell in read_comparison(folder).of(label)]
        assert float(row["adapter bytes"]) == 4 * count + 80 == runs[0].result.adapter_bytes
        assert float(row["peak memory"]) == 10**9 + 0.5
        assert float(row["forgetting"]) == pytest.approx(0.25 * place + 0.05)
        steps = [(run.logs[-1].seconds - run.logs[0].seconds) / 190 for run in runs]
        assert float(row["seconds a step"]) == pytest.approx(sum(steps) / 2)
    assert found["base"]["forgetting"] == found["base"]["adapter bytes"] == ""
    assert "7.8 kB" in page.text
    assert "+0.300" in page.text


def test_a_batch_is_shared_by_what_neither_changes_layers_nor_fills_the_cache(folder, page):
    shares = {label: row["rows share a batch"] for label, row in rows(folder, "cost").items()}
    assert shares == {"base": "yes", "pt": "yes", "dpt": "yes", "lora": "no", "prefix-tuning": "no"}
    for label in SIZES:
        config = METHODS[label]
        assert (shares[label] == "no") == (config.changes_layers or config.fills_cache)


@pytest.mark.ci
def test_a_folder_that_records_no_costs_has_no_empty_columns(tmp_path):
    write_cell(tmp_path, "pt", "nano/mixed", 0)
    write_report(tmp_path)
    header = (tmp_path / "tables" / "cost.csv").read_text().splitlines()[0]
    assert header == (
        "method,trainable parameters,seconds a step,optimiser steps,seconds of training,cells,rows share a batch"
    )


def test_the_whole_grid_stands_with_what_was_chosen_and_its_edge_is_warned_of(folder, page):
    found = rows(folder, "learning-rates")
    assert {name: found["pt"][f"rate {name}"] for name in ("÷ 9", "÷ 3", "× 1", "× 3")} == {
        "÷ 9": "20.0",
        "÷ 3": "50.0",
        "× 1": "70.0",
        "× 3": "",
    }
    assert (found["pt"]["chosen"], found["lora"]["chosen"]) == ("0.03", "0.003")
    assert "lora on nano/mixed: 0.003, the highest of 0.001 to 0.003" in page.text
    assert "pt on nano/mixed: 0.03" not in page.text
    with (folder / "tables" / "search.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == 12 + 6
    assert [trial["state"] for trial in trials].count("diverged") == 1
    assert {trial["score"] for trial in trials if trial["method"] == "lora"} == {"10.0", "20.0", "30.0", "40.3"}


def test_a_folder_without_a_search_says_nothing_of_one(tmp_path):
    write_cell(tmp_path, "pt", "nano/mixed", 0)
    assert "Learning rates" not in Page(write_report(tmp_path)).text


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=9))
def test_the_front_holds_what_nothing_beats_with_as_few_parameters(points):
    front = pareto_front(points)
    trained = {label: point for label, point in points.items() if point[0]}
    best = {
        (count, score)
        for count, score in trained.values()
        if not any((c <= count and s >= score) and (c, s) != (count, score) for c, s in trained.values())
    }
    assert [points[label] for label in front] == sorted(best)


def drawn(folder):
    comparison = read_comparison(folder)
    (board,) = boards(comparison)
    counts = {cell.label: cell.trainable_parameters for cell in comparison.cells}
    with drawing():
        figure = score_by_parameters(board, counts, styles(comparison.methods))
        figure.draw_without_rendering()
    return figure.axes[0], pareto_front({name: (counts[name], board.scores[name, "average"].mean) for name in counts})


def test_the_chart_goes_from_1k_to_300k_and_names_the_front_beside_its_points(folder):
    axes, front = drawn(folder)
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] <= SMALLEST
    assert axes.get_xlim()[1] >= LARGEST
    assert [text.get_text() for text in axes.texts] == front == ["pt", "dpt", "lora"]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not [one for place, one in enumerate(boxes) for other in boxes[:place] if one.overlaps(other)]


def test_names_of_points_that_lie_close_do_not_meet_and_stay_on_the_figure(tmp_path):
    for place in range(6):
        label = f"a method with a long name {place}"
        write_cell(tmp_path, label, "nano/mixed", 0, method="pt", skill=0.3 + 0.1 * place, parameters=3800 + place)
    axes, front = drawn(tmp_path)
    assert axes.get_xlim()[1] < LARGEST, "sizes that are nearly one are looked at closely"
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(front) > 3
    assert not [one for place, one in enumerate(boxes) for other in boxes[:place] if one.overlaps(other)]
    whole = axes.get_figure(root=True).bbox
    assert not [box for box in boxes if box.x0 < whole.x0 or box.x1 > whole.x1 or box.y1 > whole.y1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (15_400, "15.4 kB"), (2.5e6, "2.5 MB"), (4.9e12, "4,900.0 GB")],
)
def test_bytes_are_printed_as_people_write_them(value, text):
    assert bytes_text(value) == text


def test_a_run_folder_of_an_earlier_version_is_read(folder):
    run = read_run(next((folder / "cells" / "base").rglob("seed-0")))
    assert (run.result.adapter_bytes, run.result.peak_memory, run.result.forgetting) == (None, None, None)
