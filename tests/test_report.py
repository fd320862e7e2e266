"""Reports: every number comes from the run folders, the page needs nothing else, and what is missing is named."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from matplotlib.image import imread
from rich.console import Console

from ptmoe.errors import PtmoeError
from ptmoe.report import comparison_table, read_run, read_runs, write_report
from ptmoe.report.figures import DARK, LIGHT, learning_curves, routing_figures, routing_heat_map, score_by_domain
from ptmoe.report.html import summary
from ptmoe.report.runs import labels

DOMAINS = ("harbor", "market", "garden", "castle")
ONE_EACH = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.91, 0.09, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
ALL_ON_SECOND = [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]


def routing(use, mean_gate=None):
    return {
        "num_experts": len(use[0]),
        "use": dict(zip(DOMAINS, use, strict=True)),
        "mean_gate": dict(zip(DOMAINS, mean_gate or use, strict=True)),
        "entropy": 1.25,
        "mutual_information": 0.87,
        "prompt_similarity": [[1.0 if i == j else 0.37 for j in range(len(use[0]))] for i in range(len(use[0]))],
    }


def write_run(folder, method="pt-moe", accuracy=71.4, parts=(70.1, 72.3, 73.5, 69.7), *, domains=DOMAINS, **options):
    """A run folder. Options: use, mean_gate, name, fields (of the method), interval, trained, task, sizes."""
    (folder / "eval").mkdir(parents=True)
    method_fields = {"name": method, **options.get("fields", {})}
    (folder / "config.yaml").write_text(yaml.safe_dump({"method": method_fields, "seed": 3, "learning_rate": 0.0123}))
    environment = {
        "versions": {"python": "3.11.7", "torch": "2.99.1", "peft": None},
        "commit": "c0ffee1234",
        "seed": 3,
        "hardware": {"processor": "Abacus 9000", "cores": 2, "accelerator": None},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    trained = options.get("trained", 3764)
    result = {
        "name": options.get("name", method),
        "method": method,
        "trainable_parameters": trained,
        "train_seconds": 61.27,
        "steps": 30,
        "examples": 8000,
    }
    (folder / "result.json").write_text(json.dumps(result))
    task = options.get("task", "nano/mixed")
    sizes = options.get("sizes", [250] * len(domains))
    use = options.get("use")
    evaluation = {
        "task": task,
        "examples": sum(sizes),
        "metrics": {"accuracy": accuracy},
        "interval": {"accuracy": options.get("interval", [accuracy - 2.5, accuracy + 2.5])},
        "by_domain": {
            domain: {"examples": size, "accuracy": part}
            for domain, part, size in zip(domains, parts, sizes, strict=True)
        },
        "routing": routing(use, options.get("mean_gate")) if use else None,
        "seconds": 4.0,
    }
    (folder / "eval" / (task.replace("/", "__") + ".json")).write_text(json.dumps(evaluation))
    if method != "base":
        lines = [{"step": step, "seconds": step / 7, "loss": 3.0 - step / 20} for step in (10, 20, 30)]
        if use:
            lines = [{**line, "expert_use": [0.25] * 4, "routing_confidence": 0.6, "hardness": 0.0} for line in lines]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def three(tmp_path):
    """The untouched base, pt and pt-moe."""
    return [
        read_run(write_run(tmp_path / "base", "base", 3.2, (1.1, 2.2, 6.3, 3.4), trained=0)),
        read_run(write_run(tmp_path / "pt", "pt", 29.3, (0.5, 99.5, 9.6, 7.7), trained=3840)),
        read_run(write_run(tmp_path / "pt-moe", use=ONE_EACH)),
    ]


class Page(HTMLParser):
    """A report's tags, the addresses in them, and its tables as rows of cell texts."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.addresses, self.tables, self.bold = "", [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href", "action", "data")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.best = ("class", "best") in attrs

    def handle_endtag(self, tag):
        if tag == "td" and self.best:
            self.bold.append(self.tables[-1][-1][-1])
        if tag == "table":
            self.tables.append([["outside"]])

    def handle_data(self, data):
        if self.lasttag != "style":
            self.text += data
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data.strip()


def printed(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_table_holds_the_numbers_of_the_run_folders(three, tmp_path):
    page = Page(write_report(tmp_path / "report", three, "three runs"))
    header, *rows = page.tables[0]
    assert header[3:7] == list(DOMAINS)
    assert rows == [
        ["base", "0", "3.2[0.7, 5.7]", "1.1", "2.2", "6.3", "3.4", "61.3"],
        ["pt", "3,840", "29.3[26.8, 31.8]", "0.5", "99.5", "9.6", "7.7", "61.3"],
        ["pt-moe", "3,764", "71.4[68.9, 73.9]", "70.1", "72.3", "73.5", "69.7", "61.3"],
    ]


def test_the_table_can_be_downloaded_with_the_numbers_as_they_are(three, tmp_path):
    page = Page(write_report(tmp_path / "report", three, "three runs"))
    address = next(address for address in page.addresses if address.startswith("data:application/json"))
    (_, pt, moe) = json.loads(base64.b64decode(address.partition(",")[2]))["rows"]
    assert (pt["method"], pt["accuracy"], pt["accuracy low"], pt["harbor"]) == ("pt", 29.3, 26.8, 0.5)
    assert (moe["trainable parameters"], moe["seconds of training"]) == (3764, 61.27)
    kept = tmp_path / "report" / "tables" / "accuracy-on-nano-mixed"
    assert [row["castle"] for row in csv.DictReader(kept.with_suffix(".csv").open())] == ["3.4", "7.7", "69.7"]
    assert "| **71.4** [68.9, 73.9] |" in kept.with_suffix(".md").read_text()
    assert r"\textbf{71.4} [68.9, 73.9]" in kept.with_suffix(".tex").read_text()


def test_words_near_the_virtual_tokens_are_shown_where_they_were_looked_for(tmp_path):
    folder = write_run(tmp_path / "a", use=ONE_EACH)
    (folder / "routing").mkdir()
    (folder / "routing" / "nearest.json").write_text('{"experts": [[[["sea", 0.8]], [[" port", 0.7]]]]}')
    text = Page(write_report(tmp_path / "report", [read_run(folder)], "words")).text
    assert "sea 0.80" in text
    assert "␣port 0.70" in text


def test_the_best_of_each_accuracy_is_bold_and_nothing_else(three, tmp_path):
    page = Page(write_report(tmp_path / "report", three, "three runs"))
    assert page.bold == ["99.5", "71.4[68.9, 73.9]", "70.1", "73.5", "69.7"]


def test_nothing_is_bold_where_all_runs_are_level(tmp_path):
    runs = [read_run(write_run(tmp_path / name, name)) for name in ("pt", "dpt")]
    assert Page(write_report(tmp_path / "report", runs, "level")).bold == []


def test_the_page_needs_nothing_beside_itself(three, tmp_path):
    page = Page(write_report(tmp_path / "report", three, "three runs"))
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses if address[0] != "#")
    assert not re.search(r"https?://|@import|url\(", page.source)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_every_figure_comes_in_both_colour_modes(three, tmp_path):
    page = Page(write_report(tmp_path / "report", three, "three runs"))
    drawn = [address for address in page.addresses if address.startswith("data:image/svg+xml;base64,")]
    assert len(set(drawn)) == len(drawn) == page.tags.count("img") == 2 * page.tags.count("figure") > 0


def test_hostile_names_are_shown_and_not_run(tmp_path):
    bad = "<script>alert(1)</script>"
    folder = write_run(
        tmp_path / "a", name='"><img src=x>', domains=(bad, "$\\frac{$", "_b", "[bold]"), task="<i>t</i>"
    )
    runs = [read_run(folder)]
    page = Page(write_report(tmp_path / "report", runs, "<h1>title", "echo '</pre><script>'"))
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert page.tags.count("h1") == 1
    assert bad in page.tables[0][0]
    assert page.addresses.count("x") == 0
    assert "[bold]" in printed(comparison_table(runs), width=200)


def test_configuration_versions_commit_hardware_and_command_are_shown(three, tmp_path):
    command = "ptmoe quickstart --task nano/mixed --seed 3"
    text = Page(write_report(tmp_path / "report", three, "three runs", command)).text
    for shown in (command, "c0ffee1234", "2.99.1", "Abacus 9000", "learning_rate", "0.0123", "method.name"):
        assert shown in text


def test_without_a_command_each_trained_run_is_repeated_from_its_own_config(three, tmp_path):
    text = Page(write_report(tmp_path, three, "three runs")).text
    assert "ptmoe train pt/config.yaml\nptmoe train pt-moe/config.yaml" in text
    assert "base/config.yaml" not in text


def test_a_collapse_is_told_with_the_expert_and_its_share(tmp_path):
    fields = {"router_standardize": False, "routing_anneal": True}
    run = read_run(write_run(tmp_path / "a", use=ALL_ON_SECOND, fields=fields))
    text = Page(write_report(tmp_path / "report", [run], "collapsed")).text
    assert "expert 1 takes 97.5 % of the inputs" in text
    assert "meant against it: router_standardize." in text


def test_routing_that_uses_its_experts_raises_no_warning(three, tmp_path):
    assert "Routing collapsed" not in Page(write_report(tmp_path / "report", three, "three runs")).text


def test_a_collapse_is_judged_over_inputs_and_not_over_domains(tmp_path):
    use = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    few = read_run(write_run(tmp_path / "few", use=use, sizes=[330, 330, 330, 10]))
    many = read_run(write_run(tmp_path / "many", use=use, sizes=[10, 10, 10, 970]))
    even = read_run(write_run(tmp_path / "even", use=use))
    assert [run.collapsed_expert("nano/mixed") for run in (few, many, even)] == [0, 1, None]


def test_one_expert_alone_cannot_collapse(tmp_path):
    run = read_run(write_run(tmp_path / "a", use=[[1.0]] * 4))
    assert run.collapsed_expert("nano/mixed") is None


def test_a_gate_that_mixes_all_experts_is_judged_by_its_weights(tmp_path):
    soft = read_run(
        write_run(tmp_path / "a", use=[[1.0, 0.0]] * 4, mean_gate=[[1.0, 1.0]] * 4, fields={"selective": False})
    )
    assert soft.overall_shares("nano/mixed") == [0.5, 0.5]
    assert soft.collapsed_expert("nano/mixed") is None


@pytest.mark.parametrize("missing", ["result.json", "config.yaml", "environment.json"])
def test_a_missing_file_is_named(tmp_path, missing):
    folder = write_run(tmp_path / "a")
    (folder / missing).unlink()
    with pytest.raises(PtmoeError, match=re.escape(str(folder / missing))):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "result.json",
            '{"name": "a", "method": "pt", "train_seconds": 1, "steps": 2}',
            "trainable_parameters is missing",
        ),
        ("result.json", "{", "JSON"),
        ("config.yaml", "seed: 1", "method.name is missing"),
        ("config.yaml", "a: [", "not YAML"),
        ("metrics.jsonl", '{"step": 1}\n{"step": "many"}', "line 2: step"),
        ("eval/nano__mixed.json", '{"task": "t", "examples": 1, "metrics": {}}', "metrics has no accuracy"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, name, content, said):
    folder = write_run(tmp_path / "a")
    (folder / name).write_text(content)
    with pytest.raises(PtmoeError, match=said) as caught:
        read_run(folder)
    assert str(folder / name) in str(caught.value)


def test_routing_of_the_wrong_size_is_refused(tmp_path):
    folder = write_run(tmp_path / "a", use=ONE_EACH)
    path = folder / "eval" / "nano__mixed.json"
    path.write_text(path.read_text().replace('"num_experts": 4', '"num_experts": 3'))
    with pytest.raises(PtmoeError, match="num_experts=3"):
        read_run(folder)


def test_no_finished_run_is_an_error(tmp_path):
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(PtmoeError, match="no finished run in"):
        read_runs([tmp_path])
    for show in (comparison_table, lambda runs: write_report(tmp_path / "report", runs, "none")):
        with pytest.raises(PtmoeError, match="no runs"):
            show([])
    assert not (tmp_path / "report").exists()


def test_a_folder_of_runs_gives_its_finished_ones(tmp_path):
    write_run(tmp_path / "b")
    write_run(tmp_path / "a", "pt")
    write_run(tmp_path / "c")
    (tmp_path / "c" / "result.json").unlink()
    assert [run.folder.name for run in read_runs([tmp_path])] == ["a", "b"]
    assert [run.folder.name for run in read_runs([tmp_path / "b"])] == ["b"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("seed-0", "seed-1")]
    other = write_run(tmp_path / "elsewhere" / "seed-1")
    names = labels(read_runs([*folders, other]))
    assert names[0] == "pt-moe (seed-0)"
    assert len(set(names)) == 3


def test_each_png_shows_something(three, tmp_path):
    write_report(tmp_path / "report", three, "three runs")
    images = sorted((tmp_path / "report" / "figures").glob("*.png"))
    assert [image.stem for image in images] == [
        "accuracy-on-nano-mixed",
        "loss-by-second",
        "loss-by-step",
        "prompt-similarity-of-pt-moe",
        "routing-of-pt-moe-on-nano-mixed",
        "routing-of-pt-moe-over-training",
    ]
    for image in images:
        pixels = imread(image)[..., :3]
        assert len(np.unique(pixels @ [1, 1000, 1_000_000])) > 20, image.name


def test_curves_show_the_logged_losses_by_step_and_by_second(three):
    for against, places in (("step", [10, 20, 30]), ("seconds", [10 / 7, 20 / 7, 30 / 7])):
        lines = learning_curves(three, against).axes[0].lines
        assert len(lines) == 2  # the base was not trained
        assert lines[0].get_xdata() == pytest.approx(places)
        assert lines[0].get_ydata() == pytest.approx([2.5, 2.0, 1.5])


def test_bars_are_as_long_as_the_accuracies(three):
    axes = score_by_domain(three, "nano/mixed").axes[0]
    widths = [[bar.get_width() for bar in group] for group in axes.containers if hasattr(group, "patches")]
    assert widths == [[3.2, 1.1, 2.2, 6.3, 3.4], [29.3, 0.5, 99.5, 9.6, 7.7], [71.4, 70.1, 72.3, 73.5, 69.7]]


def test_a_heat_map_prints_each_share_at_its_place():
    axes = routing_heat_map(dict(zip(DOMAINS, ONE_EACH, strict=True))).axes[0]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown[(1, 1)] == "91%"
    assert shown[(2, 1)] == "9%"
    assert shown[(3, 2)] == "100%"
    assert [label.get_text() for label in axes.get_yticklabels()] == list(DOMAINS)


def test_routing_figures_take_what_an_evaluation_wrote():
    assert set(routing_figures(routing(ONE_EACH))) == {"routing", "prompt_similarity"}
    assert set(routing_figures({**routing(ONE_EACH), "prompt_similarity": None})) == {"routing"}


def test_every_method_has_a_colour_that_stands_out_in_both_modes():
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (LIGHT, DARK):
        assert len(set(theme.methods.values())) == len(theme.methods)
        for color in (*theme.methods.values(), theme.other, theme.ink):
            low, high = sorted((luminance(color), luminance(theme.surface)))
            assert (high + 0.05) / (low + 0.05) >= 3


def test_the_summary_claims_a_lead_only_where_the_intervals_part(tmp_path):
    first = read_run(write_run(tmp_path / "a", "pt", 50.0, interval=[48.0, 52.0], trained=3840))
    apart = read_run(write_run(tmp_path / "b", "pt-moe", 60.0, interval=[57.0, 63.0]))
    close = read_run(write_run(tmp_path / "c", "dpt", 52.0, interval=[50.0, 54.0]))
    level = read_run(write_run(tmp_path / "d", "smop", 50.0, interval=[48.0, 52.0]))
    said = summary([first, apart], "nano/mixed")
    assert "pt-moe answers 60.0 % [57.0, 63.0] right with 3,764 trained parameters, the most of 2 runs" in said
    assert "pt answers 50.0 % [48.0, 52.0] right with 3,840 trained parameters" in said
    assert "do not overlap" in said
    assert "do not tell the two apart" in summary([first, close], "nano/mixed")
    assert "the most" not in summary([first, level], "nano/mixed")


def test_a_run_without_logs_or_evaluation_is_still_reported(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").unlink()
    (folder / "eval" / "nano__mixed.json").unlink()
    runs = [read_run(folder)]
    page = Page(write_report(tmp_path / "report", runs, "bare"))
    assert "No run was evaluated" in page.text
    assert page.tags.count("img") == 0
    assert "3,764" in printed(comparison_table(runs))


def test_a_loss_that_diverged_does_not_break_the_curves(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3}\n')
    (line,) = learning_curves([read_run(folder)]).axes[0].lines
    assert list(line.get_ydata()) == [2.0]
    write_report(tmp_path / "report", [read_run(folder)], "diverged")


def test_the_terminal_table_is_readable_at_80_columns(three):
    lines = printed(comparison_table(three)).splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line.split() for line in lines if line.strip().startswith("pt-moe")]
    assert row == ["pt-moe", "3,764", "71.4", "70.1", "72.3", "73.5", "69.7", "61"]
    assert all(any(domain in line for line in lines) for domain in DOMAINS)


def test_many_domains_stand_in_rows_so_that_80_columns_suffice(tmp_path):
    domains = [f"settlement-{number}" for number in range(11)]
    folder = write_run(tmp_path / "a", parts=[float(number) for number in range(11)], domains=domains)
    lines = printed(comparison_table([read_run(folder)])).splitlines()
    assert max(map(len, lines)) <= 80
    assert ["settlement-10", "10.0"] in [line.split() for line in lines]


def test_several_tasks_are_compared_by_their_overall_accuracies(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "a", "pt", 41.5)),
        read_run(write_run(tmp_path / "b", "dpt", 42.5, task="nano/words")),
    ]
    lines = [line.split() for line in printed(comparison_table(runs)).splitlines()]
    assert ["pt", "3,764", "41.5", "–", "61"] in lines
    assert ["dpt", "3,764", "–", "42.5", "61"] in lines
    with pytest.raises(PtmoeError, match="no run was evaluated on nano/facts"):
        comparison_table(runs, "nano/facts")


@pytest.mark.parametrize("name", ["_private", "$\\frac{$ and $", "pt-moe"])
def test_a_legend_shows_any_name_as_it_is(tmp_path, name):
    figure = learning_curves([read_run(write_run(tmp_path / "a", name=name))])
    figure.savefig(tmp_path / "a.png")
    (entry,) = figure.axes[0].get_legend().get_texts()
    assert entry.get_text().strip().replace(r"\$", "$") == name


def test_a_long_legend_leaves_room_for_the_plot(recwarn):
    from ptmoe.report.figures import one_plot, put_legend

    figure, axes = one_plot(LIGHT, height=3.1)
    for number in range(20):
        axes.plot([0, 1], [number, number], label=f"a method with a long name, {number}")
    put_legend(axes, LIGHT)
    figure.savefig(io.BytesIO(), format="png")
    assert not recwarn.list
    assert axes.get_position().height * figure.get_figheight() > 1.5  # inches
