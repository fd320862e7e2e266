"""A run's page: the same as a comparison's, of one cell; it needs nothing else, and what is missing is named."""

import io
import json
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from ptmoe.cli.console import Console
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.report import comparison_summary, read_comparison, routing_figures, write_report, write_run_report
from ptmoe.report.comparison import COLUMN_NAMES, single_run
from ptmoe.report.figures import (
    INK,
    ON_DARK,
    PAPER,
    curve_points,
    drawing,
    learning_curves,
    plain,
    routing_heat_map,
    show_legend,
    similarity_heat_map,
    styles,
)
from ptmoe.runs.folders import read_run
from ptmoe.runs.records import LogLine
from ptmoe.tasks import TASKS
from testing.folders import ALL_ON_SECOND, DOMAINS, ONE_EACH, write_cell, write_plan, write_run
from testing.pages import Page


def printed(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


# The page of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    words = [[[["sea", 0.8], [" port", 0.7]]] * 10] * 4
    folder = tmp_path_factory.mktemp("runs") / "run"
    return write_run(folder, seed=3, use=ONE_EACH, nearest=words, fields={"rank": 10})


@pytest.fixture(scope="module")
def page(run):
    return Page(write_run_report(run))


@pytest.mark.ci
def test_a_run_has_the_page_of_a_comparison_of_one_cell(run, page):
    summary = read_run(run).evaluations["nano/mixed"]
    low, high = summary.interval["accuracy"]
    assert page.tables[0] == [
        ["method", "trainableparameters", "nano/mixed", "seeds"],
        ["pt-moe", "3,764", f"{summary.score:.1f}[{low:.1f}, {high:.1f}]", "1"],
    ]
    domains = next(table for table in page.tables if set(DOMAINS) <= set(table[0]))
    for name, text in zip(*domains, strict=True):
        if name in DOMAINS:
            assert text == f"{summary.by_domain[name]['accuracy']:.1f}"
    assert f"pt-moe reaches accuracy {summary.score:.1f} %" in page.text
    assert page.bold == [], "one of one is not the best"


def test_a_runs_page_has_its_curves_routing_words_configuration_and_command(run, page):
    assert sorted(path.stem for path in (run / "figures").glob("*.png")) == [
        "accuracy-on-nano-mixed-by-domain",
        "loss-by-second-on-nano-mixed",
        "loss-by-step-on-nano-mixed",
        "prompt-similarity-of-pt-moe",
        "routing-of-pt-moe-on-nano-mixed",
        "routing-of-pt-moe-over-training",
    ]
    for image in (run / "figures").glob("*.png"):
        assert len(np.unique(imread(image)[..., :3] @ [1, 1000, 1_000_000])) > 20, image.name
    for shown in (
        "c0ffee1234",
        "2.99.1",
        "Abacus 9000",
        "learning_rate",
        "0.0123",
        "rank: 10",
        "sea 0.80",
        "␣port 0.70",
    ):
        assert shown in page.text
    assert f"ptmoe train {run}/config.yaml" in page.text


@pytest.mark.slow
def test_words_that_inspect_found_are_in_the_report(tmp_path, monkeypatch, capsys):
    """By the commands: the words are written where the page looks for them."""
    import sys

    import ptmoe
    from ptmoe.cli import main
    from ptmoe.models.bases import load_base

    folder = write_run(tmp_path / "run", use=ONE_EACH)
    ptmoe.attach(load_base("nano")[0], ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=3)).save_pretrained(
        folder / "adapter"
    )
    assert "virtual tokens lie near" not in Page(write_run_report(folder)).text
    monkeypatch.setattr(sys, "argv", ["ptmoe", "inspect", str(folder), "--task", "nano/mixed", "--examples", "8"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "report.html" in "".join(capsys.readouterr().out.split())  # a long path is wrapped
    page = Page(folder / "report.html")
    assert "What the virtual tokens lie near" in page.text
    first = json.loads((folder / "inspect" / "nearest.json").read_text())["experts"][0][0][0]
    shown = first[0].replace(" ", "␣").replace("\n", "⏎") or "(nothing)"
    assert f"{shown} {first[1]:.2f}" in page.text


def test_a_run_that_was_not_evaluated_is_still_reported(tmp_path):
    folder = write_run(tmp_path / "a", tasks=[], logs=[])
    page = Page(write_run_report(folder))
    assert "Nothing was evaluated" in page.text
    assert page.tags.count("img") == 0
    assert "3,764" in page.text


def test_a_folder_without_a_finished_run_has_no_page(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "result.json").unlink()
    assert write_run_report(folder) is None
    assert not (folder / "report.html").exists()


def test_the_page_of_a_base_names_no_command_that_trains_it(tmp_path):
    assert "ptmoe train" not in Page(write_run_report(write_run(tmp_path / "a", "base"))).text


def test_a_run_that_was_evaluated_on_training_examples_says_so_and_how_many(tmp_path, monkeypatch):
    monkeypatch.setattr("ptmoe.report.page.sections", lambda *_: [])
    costs = {"examples": 3000, "examples_evaluated": 1200}
    page = Page(write_run_report(write_run(tmp_path / "a", tasks=["nano/mixed", "nano/facts"], costs=costs)))
    assert "Training examples are evaluated as well." in page.text
    assert "nano/mixed: 1,200 of 3,000." in page.text
    assert page.source.count('class="warning"') == 1
    page = Page(write_run_report(write_run(tmp_path / "b", costs={"examples": 3000})))
    assert 'class="warning"' not in page.source


def test_a_task_with_domains_and_any_metric_is_reported(tmp_path):
    page = Page(write_run_report(write_run(tmp_path / "a", metric="rouge_l")))
    assert "pt-moe reaches rouge l" in page.text
    assert any(set(DOMAINS) <= set(table[0]) for table in page.tables)


def test_without_matplotlib_training_says_so_in_a_line_and_goes_on(tmp_path, monkeypatch):
    import sys

    from ptmoe.cli.evaluation import report_run

    for name in [name for name in sys.modules if name.startswith("ptmoe.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    console = Console(record=True, file=io.StringIO(), width=200)
    report_run(write_run(tmp_path / "a"), console)
    lines = console.export_text().splitlines()
    assert lines == ["no report: a report needs jinja2 and matplotlib: pip install 'ptmoe[report]'"]


@pytest.mark.slow
def test_hostile_names_are_shown_and_not_run(tmp_path):
    bad = "<script>alert(1)</script>"
    domains = (bad, "$\\frac{$", "_b", "[bold]")
    folder = write_run(tmp_path / "a", name='"><img src=x>', task="<i>t</i>", domains=domains, use=ONE_EACH)
    page = Page(write_run_report(folder))
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert page.tags.count("h1") == 1
    assert any(bad in table[0] for table in page.tables)
    assert page.addresses.count("x") == 0
    assert "[bold]" in printed(comparison_summary(single_run(folder)), width=200)


def test_domains_that_are_called_as_a_table_calls_its_columns_stay_apart(tmp_path):
    domains = (*COLUMN_NAMES, "all examples low")
    folder = write_run(tmp_path / "a", domains=domains)
    write_run_report(folder)
    written = json.loads((folder / "tables" / "domains-accuracy-nano-mixed.json").read_text())["rows"][0]
    summary = read_run(folder).evaluations["nano/mixed"]
    assert written["method"] == "pt-moe"
    assert written["all examples"] == pytest.approx(summary.score)
    parts = [value for key, value in written.items() if key not in ("method", "all examples", "mean of domains")]
    expected = [part["accuracy"] for part in summary.by_domain.values()]
    assert [value for value in parts if value in expected] == expected
    assert written["all examples low (interval)"] == pytest.approx(summary.interval["accuracy"][0])


@pytest.mark.slow
def test_a_collapse_is_told_with_the_expert_and_its_share(tmp_path):
    fields = {"router_standardize": False, "routing_anneal": True}
    text = Page(write_run_report(write_run(tmp_path / "a", use=ALL_ON_SECOND, fields=fields, examples=80))).text
    assert "expert 1 takes 97.5 % of the inputs" in text
    assert "meant against it: router_standardize." in text


@pytest.mark.slow
def test_one_expert_by_the_routers_test_is_told_and_is_no_collapse(tmp_path):
    use = [[0.0, 1.0]] * len(DOMAINS)
    folder = write_run_report(write_run(tmp_path / "a", use=use, one_expert=True, examples=80))
    text = Page(folder).text
    assert "One expert serves all inputs." in text
    assert "1 of 1 seeds" in text
    assert "Routing collapsed" not in text


def test_routing_that_uses_its_experts_raises_no_warning(page):
    assert "Routing collapsed" not in page.text
    assert "One expert serves all inputs" not in page.text


# Figures


def test_curves_show_the_logged_losses_by_step_and_by_second(tmp_path):
    logs = [LogLine(step=step, seconds=step / 7, loss=3.0 - step / 20) for step in (10, 20, 30)]
    comparison = single_run(write_run(tmp_path / "a", logs=logs))
    looks = styles({"pt-moe": "pt-moe"})
    for against, places in (("step", [10, 20, 30]), ("seconds", [10 / 7, 20 / 7, 30 / 7])):
        (line,) = learning_curves(curve_points(comparison, against), looks).axes[0].lines
        assert line.get_xdata() == pytest.approx(places)
        assert line.get_ydata() == pytest.approx([2.5, 2.0, 1.5])


def test_a_loss_that_diverged_does_not_break_the_curves(tmp_path):
    logs = [LogLine(step=1, loss=2.0), LogLine(step=2, loss=float("nan")), LogLine(step=3)]
    folder = write_run(tmp_path / "a", logs=logs)
    points = curve_points(single_run(folder), "step")
    assert list(points["mean loss"]) == [2.0]
    write_run_report(folder)
    rows = json.loads((folder / "tables" / "learning-curves.json").read_text())["rows"]
    assert [(row["by"], row["at"], row["mean loss"]) for row in rows] == [("step", 1, 2.0)]


def test_a_heat_map_prints_each_share_at_its_place():
    axes = routing_heat_map(dict(zip(DOMAINS, ONE_EACH, strict=True))).axes[0]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown[(1, 1)] == "90%"
    assert shown[(2, 1)] == "10%"
    assert shown[(3, 2)] == "100%"
    assert [label.get_text() for label in axes.get_yticklabels()] == list(DOMAINS)


def test_routing_figures_take_what_an_evaluation_wrote(run):
    routing = read_run(run).evaluations["nano/mixed"].routing
    assert set(routing_figures(routing)) == {"routing", "prompt_similarity"}
    assert set(routing_figures(routing.model_copy(update={"prompt_similarity": None}))) == {"routing"}


def contrast(one, other):
    """Of two colours, as WCAG 2 defines it."""
    linear = [
        np.where((c := np.array(to_rgb(color))) <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        for color in (one, other)
    ]
    low, high = sorted(float(channels @ [0.2126, 0.7152, 0.0722]) for channels in linear)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [{}.get, ON_DARK.get])
def test_each_number_of_a_heat_map_stands_out_from_what_covers_the_page_below_it(mode):
    values = np.linspace(-1, 1, 41)
    axes = similarity_heat_map([values]).axes[0]
    for box, text in zip(axes.patches, axes.texts, strict=True):
        color, paper, ink = (
            np.array(to_rgb(mode(name) or name)) for name in (to_hex(box.get_facecolor()), PAPER, text.get_color())
        )
        covered = box.get_alpha() * color + (1 - box.get_alpha()) * paper
        assert contrast(covered, ink) > 3.2, text.get_text()


def test_every_method_has_a_colour_that_stands_out_in_both_modes():
    methods = {name: name for name in ("base", *METHODS)}
    light, dark, _ = zip(*styles(methods).values(), strict=True)
    for colors, ink, paper in ((light, INK, PAPER), (dark, ON_DARK[INK], ON_DARK[PAPER])):
        assert len(set(colors)) == len(methods)
        for color in (*colors, ink):
            assert contrast(color, paper) >= 3


def test_a_method_brings_its_own_colour_and_marker(monkeypatch):
    class Own:
        figure_color = ("#102030", "#a0b0c0")
        figure_marker = "8"

    monkeypatch.setitem(METHODS, "own", Own)
    methods = {"own": "own", "pt": "pt"}
    assert styles(methods)["own"] == ("#102030", "#a0b0c0", "8")


@pytest.mark.parametrize("name", ["_private", "$\\frac{$ and $", "pt-moe"])
def test_a_legend_shows_any_name_as_it_is(tmp_path, name):
    comparison = single_run(write_run(tmp_path / "a", name=name))
    with drawing():
        figure = learning_curves(curve_points(comparison, "step"), styles({name: "pt-moe"}))
        figure.savefig(tmp_path / "a.png")
    (entry,) = figure.axes[0].get_legend().get_texts()
    assert entry.get_text().strip() == name


def test_a_long_legend_leaves_room_for_the_plot(recwarn):
    with drawing():
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")
        axes = figure.subplots()
        for number in range(20):
            axes.plot([0, 1], [number, number], label=plain(f"a method with a long name, {number}"))
        show_legend(axes)
        figure.savefig(io.BytesIO(), format="png")
    assert not recwarn.list
    assert axes.get_position().height * figure.get_figheight() > 1.5  # inches


# The terminal


def test_one_tasks_domains_are_in_the_terminals_table_at_80_columns(tmp_path):
    for label, skill in (("base", 0.1), ("pt", 0.3), ("pt-moe", 0.97)):
        write_cell(tmp_path, label, "nano/mixed", 0, skill=skill, examples=1000)
    write_plan(tmp_path, methods=["base", "pt", "pt-moe"], seeds=[0])
    lines = printed(comparison_summary(tmp_path)).splitlines()
    assert max(map(len, lines)) <= 80
    summary = read_comparison(tmp_path).of("pt-moe")[0].run.evaluations["nano/mixed"]
    (row,) = [line for line in lines if line.strip().startswith("pt-moe")]
    low, high = summary.interval["accuracy"]
    scores = [f"{part['accuracy']:.1f}" for part in summary.by_domain.values()]
    assert row.split() == ["pt-moe", "3,764", f"{summary.score:.1f}", f"[{low:.1f},", f"{high:.1f}]", *scores, "60"]
    assert all(any(domain in line for line in lines) for domain in DOMAINS)
    assert "accuracy on nano/mixed, %" in lines[0]


def test_many_domains_are_rows_so_that_80_columns_suffice(tmp_path):
    domains = [f"settlement-{number}" for number in range(11)]
    comparison = single_run(write_run(tmp_path / "a", domains=domains))
    lines = printed(comparison_summary(comparison)).splitlines()
    assert max(map(len, lines)) <= 80
    part = comparison.cells[0].run.evaluations["nano/mixed"].by_domain["settlement-10"]
    assert ["settlement-10", f"{part['accuracy']:.1f}"] in [line.split() for line in lines]


@pytest.mark.parametrize(("labels", "tasks"), [(2, 1), (2, 2), (3, 3), (4, 5), (4, 6), (8, 12)])
@pytest.mark.ci
def test_the_terminal_shows_every_score_whole_at_80_columns(tmp_path, labels, tasks):
    for number in range(labels):
        names = [name for name, task in TASKS.items() if "test" in task.splits][:tasks]
        write_cell(
            tmp_path,
            f"method {number}",
            "gsm8k",
            0,
            method="pt",
            skill=0.9,
            tasks=names,
            metric="accuracy",
            examples=20,
        )
    lines = printed(comparison_summary(tmp_path)).splitlines()
    assert max(map(len, lines)) <= 80
    words = [word for line in lines for word in line.split()]
    for cell in read_comparison(tmp_path).cells:
        for summary in cell.run.evaluations.values():
            assert f"{summary.score:.1f}" in words
    assert "average" in words or tasks == 1


def test_no_finished_run_is_an_error(tmp_path):
    with pytest.raises(PtmoeError, match="no cell at all"):
        write_report(tmp_path)
    with pytest.raises(PtmoeError, match=re.escape(f"{tmp_path / 'none'} is not a folder")):
        single_run(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
