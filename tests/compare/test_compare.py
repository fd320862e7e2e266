"""Comparisons: plans and their cells, budgets, and runs that survive interruptions and failures."""

import json
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import example, given, settings
from transformers import LlamaConfig

from ptmoe.compare import ComparePlan, fit_budget, parse_budget, prepare, read_plan
from ptmoe.compare import workers as workers_module
from ptmoe.compare.folder import ComparisonFolder
from ptmoe.compare.presets import NANO_BUDGET, PRESETS
from ptmoe.compare.run import compare
from ptmoe.compare.watcher import Watcher
from ptmoe.compare.workers import Workers
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS, PTMoEConfig
from ptmoe.models.attach import count_parameters
from ptmoe.report import read_comparison
from ptmoe.report.results import boards
from ptmoe.runs.folders import read_run
from ptmoe.settings import read_yaml
from ptmoe.tasks import Example
from ptmoe.train import TrainOptions
from ptmoe.train.examples import Fingerprint, evaluation_examples
from ptmoe.train.options import SharedOptions
from testing.bases import tiny

LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
DESIGN = {  # docs of the paper's sizes on it
    "ft": 1_235_814_400,
    "lora": 106_496,
    "hydralora": 278_528,
    "pt": 81_920,
    "dpt": 81_432,
    "smop": 86_016,
    "attempt": 90_112,
    "pt-moe": 80_706,
}
SHORT = {"max_steps": 4, "eval_examples": 10, "per_device_train_batch_size": 4, "max_examples": 16, "jobs": 1}
TWO = {**SHORT, "methods": ["pt", "dpt"], "budget": 900, "tasks": ["nano/mixed"], "seeds": 2}


@pytest.fixture(scope="module")
def llama_1b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "llama-1b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_1B))
    return str(folder)


@pytest.fixture
def trained(monkeypatch):
    """Cells that train nothing, and a list of the cells that were run; `trained.does` is called in each."""

    class Trained(list):
        does = staticmethod(lambda options: None)

        def run(self, options, progress, say):
            self.append((options.method["name"], options.task, options.seed))
            folder = Path(options.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text("half of a run")
            self.does(options)
            return 7

    cells = Trained()
    monkeypatch.setattr(workers_module, "run_cell", cells.run)
    return cells


def prepared(folder, **changes):
    return prepare(read_plan(None, {**TWO, "output_dir": str(folder), **changes}), say=lambda line: None)


def listed(comparison):
    return [(cell.variant.config.method, cell.task, cell.seed) for cell in comparison.cells]


# -- every method ------------------------------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.parametrize("part", range(4))
def test_every_method_goes_from_training_to_its_folder_an_evaluation_and_the_report(part, run, tmp_path):
    names = [*METHODS, "peft:hira"][part::4]
    methods = [word for name in names for word in ("--method", name)]
    (tmp_path / "known.txt").write_text("what the base could do before\n")
    few = ("--max-steps", 3, "--max-examples", 64, "--batch-size", 4, "--eval-examples", 4, "--seeds", 1, "--jobs", 1)
    texts = ("--forgetting", tmp_path / "known.txt")
    status, _, err = run(
        "compare",
        "--model",
        "nano",
        "--task",
        "nano/mixed",
        *methods,
        *few,
        *texts,
        "--strict",
        "--output-dir",
        tmp_path / "c",
    )
    assert status == 0, err
    report = (tmp_path / "c" / "report.html").read_text()
    assert [name for name in names if name not in report] == []
    runs = {read_yaml(path)["method"]["name"]: path.parent for path in (tmp_path / "c").rglob("config.yaml")}
    assert runs.keys() == set(names)
    for name, folder in runs.items():
        again = tmp_path / "e" / name
        status, _, err = run("eval", folder, "--task", "nano/mixed", "--examples", 4, "--output-dir", again)
        assert status == 0, (name, err)
        written = (root / "predictions" / "nano__mixed.jsonl" for root in (folder, again))
        trained, loaded = ([json.loads(line)["completion"] for line in path.open()] for path in written)
        assert trained == loaded, name


# -- budgets ---------------------------------------------------------------------------------------------------------


def test_a_budget_is_read_as_people_write_it():
    written = {"80k": 80_000, "1.5M": 1_500_000, "80_000": 80_000, "80,000": 80_000, "80000": 80_000, "2B": 2 * 10**9}
    assert {text: parse_budget(text) for text in written} == written
    assert parse_budget(3840) == 3840
    for text in ("", "k", "80q", "-5", "0", "1.5", "0.0001k", "1,5M", "80,00", ",5", "1,,000"):
        with pytest.raises(PtmoeError, match="needs a whole number"):
            parse_budget(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "architecture"),
    [*((method, "llama") for method in METHODS), *product(("pt-moe", "prefix-tuning", "lora"), ("gpt2", "opt"))],
)
def test_a_budget_picks_the_size_that_comes_closest_without_exceeding_it(method, architecture):
    base, config_class = tiny(architecture).config, METHODS[method]

    @settings(max_examples=6)
    @given(budget=st.integers(1, 6_000), tokens=st.sampled_from([None, 3, 17]))
    @example(budget=472, tokens=None)  # ept: 4 of rank are too much, 3 leave room for a second token
    def check(budget, tokens):
        fixed = {"num_virtual_tokens": tokens} if tokens and "num_virtual_tokens" in config_class.model_fields else {}
        try:
            picked = fit_budget(base, config_class, budget, fixed)
        except PtmoeError as error:
            smallest = dict.fromkeys(config_class.free_sizes, 1) | fixed
            try:
                assert count_parameters(base, config_class(**smallest)) > budget
            except PtmoeError as unfit:  # the base has no place for the method at all
                assert str(unfit) == str(error)  # noqa: PT017
            else:
                assert f"budget {budget:,} is below {method}'s" in str(error)  # noqa: PT017
            return
        assert count_parameters(base, picked) <= budget
        assert fixed.items() <= picked.model_dump().items()
        for name in config_class.free_sizes:
            if name in fixed:
                continue
            larger = picked.replace(**{name: getattr(picked, name) + 1})
            if name == "num_virtual_tokens" and larger.num_virtual_tokens > base.max_position_embeddings // 2:
                return
            with suppress(PtmoeError):  # as large as the base or the other sizes allow
                assert count_parameters(base, larger) > budget
            return

    check()


@settings(max_examples=25)
@given(budget=st.integers(300, 200_000), method=st.sampled_from(["pt", "dpt", "smop", "attempt", "pt-moe"]))
def test_no_size_at_all_is_closer_to_the_budget(budget, method):
    """Against every value of the free size, on a base that is wide enough for all of them."""
    base, config_class = LlamaConfig(hidden_size=96, max_position_embeddings=9000), METHODS[method]
    field = config_class.free_sizes[0]
    fitting = {}
    for size in range(1, 2200):
        try:
            count = count_parameters(base, config_class(**{field: size}))
        except PtmoeError:
            break
        if count > budget:
            break
        fitting[count] = size
    if fitting:
        assert getattr(fit_budget(base, config_class, budget), field) == fitting[max(fitting)]


def test_a_method_that_changes_weights_is_counted_only_a_few_times(monkeypatch):
    """Each count builds the base without weights, which is slow for a large base."""
    import ptmoe.models.attach

    counts = []
    original = ptmoe.models.attach.count_parameters
    monkeypatch.setattr(ptmoe.models.attach, "count_parameters", lambda *each: counts.append(each) or original(*each))
    picked = fit_budget(LlamaConfig(**LLAMA_1B), METHODS["lora"], 50_000_000)
    assert picked.rank == 50_000_000 // DESIGN["lora"]
    assert len(counts) <= 4


@pytest.mark.parametrize(
    ("method", "fixed", "free"),
    [
        ("dpt", {"rank": 8}, "num_virtual_tokens"),
        ("pt-moe", {"rank": 8, "projection_seed": 5000}, "num_virtual_tokens"),
        ("compacter", {"rank": 3}, "width"),
        ("nora", {"inner_rank": 5}, "rank"),
    ],
)
def test_a_budget_leaves_a_given_size_the_room_that_it_needs(method, fixed, free):
    base, config_class = tiny().config, METHODS[method]
    needed = next(iter(fixed.values()))
    counts = {size: count_parameters(base, config_class(**fixed, **{free: size})) for size in range(needed, needed + 3)}
    for size, count in counts.items():
        assert fit_budget(base, config_class, count, fixed) == config_class(**fixed, **{free: size})
    with pytest.raises(PtmoeError, match=rf"smallest size \(.*{free}={needed}.*\) on this base, {counts[needed]:,}"):
        fit_budget(base, config_class, counts[needed] - 1, fixed)
    with pytest.raises(PtmoeError, match=r"40 exceeds|more than half"):
        fit_budget(base, config_class, 10**6, dict.fromkeys(fixed, 40))


def test_pt_moe_loses_tokens_only_where_rank_1_exceeds_the_budget():
    base = LlamaConfig(**LLAMA_1B)
    picked = fit_budget(base, PTMoEConfig, 80_000, {"num_virtual_tokens": 40, "num_experts": 2})
    assert (picked.rank, count_parameters(base, picked)) == (35, 78_578)
    least = fit_budget(base, PTMoEConfig, 6_170)
    assert (least.rank, least.num_virtual_tokens, count_parameters(base, least)) == (1, 12, 6_170)


@pytest.mark.parametrize(
    ("method", "given"), [("pt-moe", {"rank": 8}), ("dpt", {"rank": 8}), ("nora", {"inner_rank": 3})]
)
def test_a_size_that_a_given_one_bounds_from_below_is_picked_too(method, given):
    base, config_class = tiny("llama").config, METHODS[method]
    (given_name, least), (free,) = *given.items(), [name for name in config_class.free_sizes if name not in given]
    smallest = count_parameters(base, config_class(**given, **{free: least}))
    for more in (0, 5):
        budget = count_parameters(base, config_class(**given, **{free: least + more}))
        picked = fit_budget(base, config_class, budget, given)
        assert (getattr(picked, given_name), getattr(picked, free)) == (least, least + more)
    below = rf"is below {method}'s smallest size \(.*{free}={least}.* {smallest:,}: raise"
    with pytest.raises(PtmoeError, match=below):
        fit_budget(base, config_class, smallest - 1, given)


@pytest.mark.slow
def test_params_shows_what_a_budget_picks(run, llama_1b):
    status, out, _ = run("params", "--budget", "3840")
    assert status == 0
    assert "num_virtual_tokens=40, num_experts=2, rank=12" in out
    assert "95.1 %" in out
    assert "budget 3,840 is below hydralora's smallest size (rank=1) on this base, 7,680" in out
    status, out, _ = run("params", "--model", llama_1b, "--method", "pt-moe", "--budget", "80k")
    assert "78,578" in out
    assert "98.2 %" in out
    status, _, err = run("params", "--model", llama_1b, "--method", "lora", "--budget", "80k")
    assert (status, "below lora's smallest size (rank=1) on this base, 106,496" in err) == (2, True)


# -- plans -----------------------------------------------------------------------------------------------------------


def test_options_and_a_yaml_file_are_equivalent_and_options_take_precedence(run, tmp_path, monkeypatch):
    written = {
        "methods": ["pt", {"name": "pt-moe", "num_experts": 4}],
        "tasks": "nano/mixed",
        "seeds": 3,
        "max_steps": 9,
    }
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump({**written, "budget": "3.84k", "vary": {"router_noise": [0, 0.1]}})
    )
    monkeypatch.chdir(tmp_path)
    from_file = run("compare", "plan.yaml", "--dry-run", "--output-dir", "c", "--seeds", "0,4")
    flags = "--method pt --method pt-moe:num_experts=4 --task nano/mixed --seeds 0,4 --max-steps 9 --budget 3840"
    from_flags = run("compare", *flags.split(), "--vary", "router_noise=0,0.1", "--dry-run", "--output-dir", "c")
    assert from_file == from_flags
    status, out, _ = from_file
    assert status == 0
    for word in ("pt-moe router_noise=0.1", "num_virtual_tokens=40, num_experts=4, rank=8", "seeds 0, 4", "4 cells"):
        assert word in out
    assert "left out: pt router_noise=0: pt has no 'router_noise' to vary" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml"], "a dry run writes nothing"


def test_a_yaml_file_may_hold_what_the_options_hold(tmp_path):
    texts = {
        "methods": ["pt", "lora:rank=2,target_modules=[q_proj,k_proj]"],
        "vary": ["router_noise=0,0.1", "seed=1"],
        "seeds": "0,4",
        "learning_rate": ["0.01"],
        "budget": "3.84k",
    }
    values = {
        "methods": [{"name": "pt"}, {"name": "lora", "rank": 2, "target_modules": ["q_proj", "k_proj"]}],
        "vary": {"router_noise": [0, 0.1], "seed": [1]},
        "seeds": [0, 4],
        "learning_rate": 0.01,
        "budget": [3840],
    }
    plans = []
    for written in (texts, values):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"tasks": ["nano/mixed"], **written}))
        plans.append(read_plan(tmp_path / "plan.yaml"))
    assert plans[0] == plans[1]
    by_name = read_plan(None, {"tasks": "nano/mixed", "learning_rate": ["pt=0.01", "lora=0.1"]})
    assert by_name.learning_rate == {"pt": 0.01, "lora": 0.1}


def test_train_and_compare_share_their_common_options():
    shared = SharedOptions.model_fields.keys()
    common = TrainOptions.model_fields.keys() & ComparePlan.model_fields.keys()
    assert common - shared == {"learning_rate"}, "which for a comparison may differ by method"


def test_the_resolved_plan_is_complete_and_gives_the_same_cells(tmp_path, trained):
    first = prepared(tmp_path / "c", learning_rate={"pt": 0.5})
    compare(first)
    again = prepare(read_plan(tmp_path / "c"))
    assert again.plan.replace(jobs=1) == first.plan
    assert again.cells == first.cells
    assert again.plan.methods[0]["learning_rate"] == 0.5
    assert again.plan.methods[1]["learning_rate"] == METHODS["dpt"].narrow_learning_rate
    assert again.plan.methods[1]["rank"] == 3


def test_all_methods_are_trained_and_evaluated_on_equal_terms(tmp_path):
    own = {"method", "learning_rate"}
    terms = [cell.options.model_dump(exclude=own) for cell in prepared(tmp_path / "c").cells if cell.seed == 1]
    assert len(terms) == 2
    assert terms[0] == terms[1]
    assert terms[0]["eval_task"] == "nano/mixed"


def test_a_whole_table_of_the_first_seed_comes_before_the_second(tmp_path):
    comparison = prepared(tmp_path / "c", methods=["pt-moe", "pt"], budget=None, seeds=[3, 1])
    assert [(cell.seed, cell.variant.label) for cell in comparison.cells] == [
        (3, "pt"),
        (3, "pt-moe"),
        (1, "pt"),
        (1, "pt-moe"),
    ]


def test_learning_rates_and_recipes_can_be_varied(tmp_path):
    asked = {"methods": ["pt", "pt-moe"], "budget": None}
    rates = prepared(tmp_path / "c", **asked, vary={"learning_rate": [0.1, 0.01]}).variants
    assert [variant.label for variant in rates[:2]] == ["pt learning_rate=0.1", "pt learning_rate=0.01"]
    assert [variant.learning_rate for variant in rates] == [0.1, 0.01, 0.1, 0.01]
    recipes = prepared(tmp_path / "c", **asked, vary={"recipe": ["default", "paper"]})
    assert [variant.config.routing_anneal for variant in recipes.variants] == [True, False]
    assert [left_out.what for left_out in recipes.left_out] == ["pt recipe=default", "pt recipe=paper"]


@pytest.mark.parametrize("rate", ["0.25", 0.25, 0, -1, "x", float("nan")])
def test_a_rate_in_a_methods_entry_or_varied_is_the_one_that_trains_or_is_refused(rate, tmp_path):
    for changes in ({"methods": [{"name": "pt", "learning_rate": rate}]}, {"vary": {"learning_rate": [rate]}}):
        try:
            (variant,) = {cell.variant for cell in prepared(tmp_path / "c", **{"methods": ["pt"], **changes}).cells}
        except PtmoeError as error:
            assert rate not in ("0.25", 0.25), changes
            assert f"learning_rate={rate!r}" in str(error)  # noqa: PT017
        else:
            assert (rate in ("0.25", 0.25), variant.learning_rate) == (True, 0.25), changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vary": ["num_virtual_tokens=4", "num_virtual_tokens=8"]}, "vary 'num_virtual_tokens' is given twice"),
        ({"learning_rate": ["0.01", "0.02"]}, "learning_rate '0.02' after 0.01: give one number"),
        ({"learning_rate": ["pt=0.01", "pt=0.02"]}, "learning_rate 'pt=0.02' after 0.01: give one number"),
        ({"search": True, "search_factors": "0.1,1,1.0001"}, "1.0 and 1.0001 are too close"),
        ({"train": {"validation_examples": 5}}, "with 'validation_examples' no cell is evaluated on what is compared"),
        ({"train": {"trainer": 3}}, "trainer=3: input should be a valid dictionary"),
        ({"seeds": [2**32]}, "seeds.0=4294967296: input should be less than 4294967296"),
        ({"tasks": ["train.jsonl"], "eval_tasks": []}, "is a file to train on: name the tasks to evaluate on"),
    ],
)
def test_what_would_be_lost_in_silence_is_refused(changes, message, tmp_path):
    with pytest.raises(PtmoeError, match=message.replace(".", r"\.")):
        prepare(read_plan(None, {**TWO, "output_dir": str(tmp_path / "c"), **changes}), data=False)


def test_labels_are_unique_and_folders_safe(tmp_path):
    both = [{"name": "pt", "num_virtual_tokens": 3}, {"name": "pt", "num_virtual_tokens": 4}]
    variants = prepared(tmp_path / "c", methods=both, budget=None).variants
    rate = METHODS["pt"].narrow_learning_rate
    assert [variant.label for variant in variants] == ["pt", f"pt num_virtual_tokens=4 learning_rate={rate}"]
    assert len(prepared(tmp_path / "c", methods=[both[0], both[0]], budget=None).variants) == 1
    assert prepared(tmp_path / "c", methods=[{"name": "pt", "label": None}]).variants[0].label == "pt"
    named = [{**entry, "label": "a/b"} for entry in both]
    place = prepared(tmp_path / "c", methods=named[:1]).cells[0].place
    assert place.parts == ("cells", "a__b", "nano__mixed", "seed-0")
    for label in ("../x", "", " ", "/.jsonl", "a\nb", "\\"):
        with pytest.raises(PtmoeError, match="cannot name a folder"):
            prepared(tmp_path / "c", methods=[{"name": "pt", "label": label}])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_on_nano(preset, tmp_path):
    asked = {"preset": preset, "model": "nano", "seeds": 2, "output_dir": str(tmp_path / "c")}
    comparison = prepare(read_plan(None, asked))
    assert not comparison.left_out
    trained = [variant for variant in comparison.variants if not variant.is_base]
    assert len(comparison.cells) == 2 * len(trained) + (preset == "quickstart") >= 4
    assert all(cell.task.startswith("nano/") and cell.options.max_steps <= 400 for cell in comparison.cells)
    allowed = {"ft", "hydralora"}  # over the budget in the paper, too
    for variant in comparison.variants:
        assert variant.trainable_parameters <= NANO_BUDGET or variant.config.method in allowed


@pytest.mark.parametrize("preset", ["paper-qa", "paper-math"])
def test_the_papers_presets_have_its_sizes_and_tasks_on_its_model(preset, llama_1b, tmp_path):
    asked = {"preset": preset, "model": llama_1b, "output_dir": str(tmp_path / "c")}
    comparison = prepare(read_plan(None, asked), data=False)
    assert {variant.label: variant.trainable_parameters for variant in comparison.variants} == DESIGN
    assert len(comparison.cells[0].eval_tasks) == {"paper-qa": 12, "paper-math": 5}[preset]
    assert comparison.jobs == 1


def test_the_papers_ablations_keep_the_budget_of_its_standard_form(llama_1b):
    def sizes(preset, *fields):
        variants = prepare(read_plan(None, {"preset": preset, "model": llama_1b}), data=False).variants
        return [tuple(getattr(variant.config, field) for field in fields) for variant in variants]

    assert sizes("ablate-length", "num_virtual_tokens", "rank") == [(20, 20), (40, 36), (60, 35), (80, 35)]
    assert sizes("ablate-experts", "num_experts", "rank") == [(1, 38), (2, 36), (4, 33), (8, 27)]
    assert sizes("ablate-noise", "router_noise", "rank") == [(0, 36), (0.05, 36), (0.1, 36), (0.2, 36)]
    assert len(set(sizes("ablate-routing", "selective", "probationary"))) == 4


def test_a_rate_that_is_asked_for_replaces_those_of_a_preset():
    def rates(*asked):
        plan = read_plan(None, {"preset": "paper-math", "model": "nano", "learning_rate": list(asked)})
        return {entry["name"]: entry.get("learning_rate") for entry in plan.methods}

    usual = {name: rate for name, rate in rates().items() if rate is not None}
    assert usual["ft"] == 0.001
    assert usual["attempt"] == 0.1
    assert set(rates("0.5").values()) == {None}, "the plan's rate holds for all"
    assert rates("lora=0.5") == rates() | {"lora": None}


@pytest.mark.parametrize(
    ("written", "asked", "found"),
    [
        ("0.01", "lora=0.5", {"pt": 0.01, "lora": 0.5}),
        ("{pt: 0.01, lora: 0.02}", "lora=0.5", {"pt": 0.01, "lora": 0.5}),
        ("{lora: 0.02}", "pt=0.5", {"lora": 0.02, "pt": 0.5}),
        ("[pt=0.01]", "lora=0.5", {"pt": 0.01, "lora": 0.5}),
        ("{pt: 0.01, lora: 0.02}", "0.5", 0.5),
    ],
)
def test_a_rate_that_is_asked_for_by_name_leaves_those_of_a_file_for_other_methods(written, asked, found, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(f"tasks: nano/mixed\nmethods: [pt, lora]\nlearning_rate: {written}\n")
    assert read_plan(path, {"learning_rate": [asked]}).learning_rate == found
    alone = read_plan(path, {"learning_rate": [asked.replace("lora", "pt")], "methods": ["pt"]}).learning_rate
    assert alone == ({"pt": 0.5} if "=" in asked else 0.5), "no rate of a method that is not compared"


def test_learning_rates_follow_the_width_of_the_base(tmp_path, llama_1b):
    def rates(model):
        found = prepared(tmp_path / "c", model=model, methods=["pt", "dpt", "pt-moe", "lora"], budget=None).variants
        return [variant.learning_rate for variant in found]

    assert rates("nano") == [0.03, 0.03, 0.03, 0.01]
    assert rates(llama_1b) == [0.1, 0.1, 0.1, 0.0032]


def test_a_preset_can_be_narrowed_and_given_another_budget(llama_1b):
    asked = {"preset": "paper-math", "model": llama_1b, "methods": ["pt", "pt-moe"], "budget": ["40k"]}
    comparison = prepare(read_plan(None, {**asked, "num_train_epochs": 1}), data=False)
    assert [(variant.label, variant.trainable_parameters) for variant in comparison.variants] == [
        ("pt", 38_912),
        ("pt-moe", 38_146),
    ]
    assert comparison.variants[1].config.num_virtual_tokens == 40
    epochs = read_plan(None, {"preset": "paper-math", "model": "nano", "num_train_epochs": 1})
    assert epochs.max_steps == -1, "or the preset's steps would override the epochs that were asked for"


def test_the_help_names_every_preset(run):
    status, out, _ = run("compare", "--help")
    assert status == 0
    assert not [name for name in PRESETS if name.removeprefix("ablate") not in out]


MISTAKES = {
    ("--preset", "paper-maths"): "unknown preset 'paper-maths'; did you mean 'paper-math'?",
    (): "nothing to compare on: give a --task, or a --preset (quickstart, paper-qa",
    ("nowhere.yaml",): "no plan nowhere.yaml",
    ("--task", "nano/mixd"): "unknown task 'nano/mixd'; did you mean 'nano/mixed'?",
    ("--task", "nano/mixed", "--method", "ptmoe"): "unknown method 'ptmoe'; did you mean 'pt-moe'?",
    ("--task", "nano/mixed", "--method", "dpt:rnk=3"): "unknown key 'rnk'; did you mean 'rank'?",
    ("--task", "nano/mixed", "--method", "dpt:rank"): "'rank' is not FIELD=VALUE",
    ("--task", "nano/mixed", "--vary", "rank"): "needs FIELD=VALUE,VALUE",
    ("--task", "nano/mixed", "--seeds", "x"): "needs how many, as 5, or which, as 0,3,5",
    ("--task", "nano/mixed", "--seeds", "0"): "seeds=0: needs at least one",
    ("--task", "nano/mixed", "--budget", "80q"): "budget '80q': needs a whole number of parameters",
    ("--task", "nano/mixed", "--learning-rate", "x"): "needs a number, or METHOD=NUMBER",
    ("--preset", "quickstart", "--learning-rate", "x"): "needs a number, or METHOD=NUMBER",
    ("--task", "nano/mixed", "--learning-rate", "dpt=1"): "learning_rate of 'dpt', which is not compared",
    ("--task", "nano/mixed", "--model", "./nowhere"): "no model folder './nowhere'",
    (
        "--task",
        "nano/mixed",
        "--model",
        "nowhere",
    ): "unknown model 'nowhere': needs nano, smollm2, a folder, a GGUF file, or",
    ("--task", "nano/mixed", "--max-steps", "0"): "max_steps=0",
    ("--task", "nano/mixed", "--eval-task", "svamp", "--data-dir", "."): "holds no test split of svamp",
    ("--task", "nano/mixed", "--on", "spark"): "on 'spark': needs processes, ray, ray://auto for the cluster",
    ("--task", "nano/mixed", "--gpus-per-cell", "1.5"): "1.5 GPUs: needs a fraction of one, or whole ones",
    ("--task", "nano/mixed", "--gpus-per-cell", "0.5"): "gpus_per_cell=0.5 is for --on ray: processes share the GPU",
    ("--task", "math_problems"): "no cell is left: math_problems: math_problems has no train split",
    ("--task", "nano/mixed", "--budget", "100"): "pt: budget 100 is below pt's smallest size (num_virtual_tokens=1)",
    (
        "--task",
        "nano/mixed",
        "--budget",
        "300",
        "--strict",
    ): "strict, and this cannot be run: pt-moe: budget 300 is below pt-moe's smallest",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_stops_before_any_cell_with_a_helpful_error(arguments, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run("compare", *arguments)
    assert status == 2
    assert MISTAKES[arguments] in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "adamw"}, "optim='adamw': no such optimizer"),
        ({"lr_scheduler_type": "linaer"}, "linaer is not a valid SchedulerType"),
        ({"report_to": "nologger"}, "report_to='nologger'"),
        ({"trainer": {"adam_beta1": 2.0}}, "Invalid beta parameter"),
        ({"trainer": {"dataloader_num_workers": -1}}, "num_workers option should be non-negative"),
        ({"trainer": {"optm": "sgd"}}, "trainer: unknown key 'optm'"),
    ],
)
@pytest.mark.ci
def test_what_no_cell_could_be_trained_with_is_refused_before_the_first(options, message, tmp_path, trained):
    with pytest.raises(PtmoeError, match=message):
        prepared(tmp_path / "c", train=options)
    compare(prepared(tmp_path / "c"))
    assert len(trained) == 4, "and what is fit runs"


def test_what_does_not_fit_is_named_and_left_out(tmp_path):
    asked = {"methods": ["pt", "pt-moe", "dpt"], "budget": 300, "tasks": ["nano/mixed", "math-out"]}
    comparison = prepared(tmp_path / "c", **asked, eval_tasks=["nano/mixed"])
    assert {(method, task) for method, task, _ in listed(comparison)} == {("pt", "nano/mixed"), ("dpt", "nano/mixed")}
    named = [str(left_out) for left_out in comparison.left_out]
    assert named[0].startswith("math-out: ")
    assert "has no train split: it can only be evaluated on" in named[0]
    assert named[1].startswith("pt-moe: budget 300 is below pt-moe's smallest size")
    too_long = prepared(tmp_path / "c", methods=["pt"], budget=None, vary={"num_virtual_tokens": [4, 2048]})
    assert [str(left_out) for left_out in too_long.left_out] == [
        "pt num_virtual_tokens=2048: 2048 virtual tokens leave no room for an input: the base has 2048 positions"
    ]


def test_what_the_folders_plan_has_and_does_not_fit_any_more_is_named_as_it_leaves_the_plan(tmp_path, trained):
    compare(prepared(tmp_path / "c", **{**TWO, "methods": ["dpt"], "budget": 900}))
    plan = tmp_path / "c" / "comparison.yaml"
    written = yaml.safe_load(plan.read_text())
    written["methods"].append({"name": "pt", "label": "long", "num_virtual_tokens": 4000})
    plan.write_text(yaml.safe_dump(written))
    extended = prepared(tmp_path / "c", **{**TWO, "methods": ["dpt", "smop"]}, strict=True)
    assert [str(left_out) for left_out in extended.left_out] == [
        "long: 4000 virtual tokens leave no room for an input: the base has 2048 positions"
    ]


def test_a_presets_evaluation_without_data_is_left_out_and_a_requested_evaluation_stops(llama_1b, tmp_path):
    line = json.dumps({"question": "2 and 2?", "answer": "#### 4"}) + "\n"
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(line)
    asked = {"preset": "paper-math", "model": llama_1b, "data_dir": str(tmp_path), "output_dir": str(tmp_path / "c")}
    comparison = prepare(read_plan(None, {**asked, "methods": ["pt"]}))
    assert "gsm8k" in comparison.cells[0].eval_tasks
    assert "asdiv" not in comparison.cells[0].eval_tasks
    assert any("evaluation on asdiv: " in str(left_out) for left_out in comparison.left_out)
    with pytest.raises(PtmoeError, match="strict, and this cannot be run: evaluation on"):
        prepare(read_plan(None, {**asked, "methods": ["pt"], "strict": True}))
    with pytest.raises(PtmoeError, match="holds no test split of asdiv"):
        prepare(read_plan(None, {**asked, "preset": None, "tasks": ["gsm8k"], "eval_tasks": ["asdiv"]}))


# -- runs ------------------------------------------------------------------------------------------------------------


def test_several_tasks_are_not_read_from_one_file(tmp_path):
    """All of MRQA has one format, so that each would pass for the others."""
    file = tmp_path / "dev.jsonl"
    question = {"qid": "q", "question": "Where?", "answers": ["here"], "detected_answers": []}
    file.write_text(json.dumps({"context": "It is here.", "qas": [question]}))
    message = r"2 tasks \(mrqa/squad, mrqa/newsqa\) and one file"
    for options in (
        {"tasks": ["nano/mixed"], "eval_tasks": ["mrqa/squad,mrqa/newsqa"], "eval_data_dir": str(file)},
        {"tasks": ["mrqa/squad", "mrqa/newsqa"], "eval_tasks": ["nano/mixed"], "data_dir": str(file)},
    ):
        with pytest.raises(PtmoeError, match=message):
            prepared(tmp_path / "c", **options)
    asked = TrainOptions(task="nano/mixed", eval_task="mrqa/squad,nano/mixed", eval_data_dir=str(file))
    assert evaluation_examples(asked, print).keys() == {"mrqa/squad", "nano/mixed"}
    with pytest.raises(PtmoeError, match=message):
        evaluation_examples(asked.replace(eval_task="mrqa/squad,nano/mixed,mrqa/newsqa"), print)


def test_an_interrupted_comparison_continues_with_what_is_missing(tmp_path, trained):
    comparison = prepared(tmp_path / "c")

    def interrupted(options):
        if len(trained) == 3:
            raise KeyboardInterrupt

    trained.does = interrupted
    with pytest.raises(KeyboardInterrupt):
        compare(comparison)
    half = tmp_path / "c" / comparison.cells[2].place
    assert (half / "config.yaml").exists()
    assert not (half / "cell.json").exists()

    trained.does = lambda options: None
    assert compare(prepared(tmp_path / "c")) == []
    assert trained[3:] == listed(comparison)[2:], (
        "the half-written cell anew and the last; the finished ones never twice"
    )
    compare(prepare(read_plan(tmp_path / "c")))
    assert len(trained) == 5
    assert json.loads((half / "cell.json").read_text()) == {
        "label": comparison.cells[2].variant.label,
        "method": comparison.cells[2].variant.config.method,
        "size": {"num_virtual_tokens": 4} if trained[2][0] == "pt" else {"num_virtual_tokens": 40, "rank": 3},
        "task": "nano/mixed",
        "eval_tasks": ["nano/mixed"],
        "seed": 1,
        "trainable_parameters": 7,
    }


PT_MOE = {"name": "pt-moe", "num_virtual_tokens": 4, "rank": 2}


class StopsAt(Watcher):
    """Ends the comparison at a step of its cell, and notes the steps and the messages."""

    def __init__(self, last=None):
        self.last, self.steps, self.messages = last, [], []

    def step(self, cell, done, steps, loss):
        self.steps.append(done)
        if done == self.last:
            raise KeyboardInterrupt

    def message(self, cell, text):
        self.messages.append(text)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("method", "spoilt"),
    [
        *((PT_MOE, spoilt) for spoilt in (None, "another plan", "a damaged checkpoint", "no record", "no checkpoint")),
        ({"name": "lora", "rank": 1}, None),  # whose modules the run chooses
        ({"name": "vera", "rank": 8}, None),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else str(value),
)
def test_an_interrupted_cell_goes_on_from_its_checkpoint_or_starts_over_and_says_why(tmp_path, method, spoilt):
    plan = {"methods": [method], "budget": None, "seeds": 1, "train": {"save_steps": 2}}
    whole, half = prepared(tmp_path / "whole", **plan), prepared(tmp_path / "half", **plan)
    assert compare(whole) == []
    with pytest.raises(KeyboardInterrupt):
        compare(half, StopsAt(3))
    place = half.folder.run_folder(half.cells[0])
    if spoilt == "another plan":
        record = json.loads((place / "environment.json").read_text())
        record["options"]["warmup_steps"] = 3
        (place / "environment.json").write_text(json.dumps(record))
    elif spoilt == "a damaged checkpoint":
        (place / "checkpoints" / "checkpoint-2" / "optimizer.safetensors").write_bytes(b"")
    elif spoilt == "no record":
        (place / "environment.json").unlink()
    elif spoilt == "no checkpoint":
        shutil.rmtree(place / "checkpoints")
    (place / "left").touch()
    again = StopsAt()
    assert compare(prepared(tmp_path / "half", **plan), again) == []
    assert again.steps[0] == (2 if spoilt is None else 0)
    assert any("starts over: " in message for message in again.messages) == (spoilt not in (None, "no checkpoint"))
    assert (place / "left").exists() == (spoilt is None), "a cell that starts over has a folder of its own"
    assert not (place / "checkpoints").exists(), "nothing goes on from a finished cell"
    first, second = (each.folder.run_folder(each.cells[0]) for each in (whole, half))
    for file in ("adapter/adapter_model.safetensors", "predictions/nano__mixed.jsonl", "cell.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_a_failed_cell_is_reported_and_the_others_still_run(tmp_path, trained):
    def broken(options):
        if (options.method["name"], options.seed) == ("dpt", 0):
            raise RuntimeError("out of memory")
        if (options.method["name"], options.seed) == ("pt", 1):
            raise PtmoeError("the loss became nan")

    trained.does = broken
    failed = compare(prepared(tmp_path / "c"))
    assert len(trained) == 4
    assert sorted((*failure.cell, failure.error) for failure in failed) == [
        ("dpt", "nano/mixed", 0, "RuntimeError: out of memory"),
        ("pt", "nano/mixed", 1, "the loss became nan"),
    ]
    assert "in broken" in (tmp_path / "c" / "log.txt").read_text(), "the traceback of an unforeseen error"
    lines = (tmp_path / "c" / "failed.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [failure.model_dump() for failure in failed]

    trained.does = lambda options: None
    assert compare(prepared(tmp_path / "c")) == []
    assert sorted(trained[4:]) == [("dpt", "nano/mixed", 0), ("pt", "nano/mixed", 1)]
    assert not (tmp_path / "c" / "failed.jsonl").exists()


def test_more_seeds_methods_and_tasks_extend_a_comparison(tmp_path, trained):
    compare(prepared(tmp_path / "c"))
    more = {"seeds": 3, "tasks": ["nano/words", "nano/mixed"], "methods": ["smop", "dpt"]}
    compare(prepared(tmp_path / "c", **more, budget=[900, 1200]))
    plan = read_plan(tmp_path / "c")
    assert plan.seeds == [0, 1, 2]
    assert plan.tasks == ["nano/mixed", "nano/words"]
    labels = ["pt", "dpt", "smop budget=900", "smop budget=1200", "dpt budget=1200"]
    assert [entry["label"] for entry in plan.methods] == labels
    assert len(trained) == 4 + 4 * 2 * 3 - 2, "dpt at 900 kept its label and its two cells"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"budget": [400, 900]}, {"budget": ["1500"]}),
        ({"vary": ["num_virtual_tokens=2,4"], "budget": None}, {"budget": ["1500"]}),
        ({"vary": ["learning_rate=0.01,0.1"]}, {"learning_rate": ["0.3"]}),
    ],
)
def test_no_label_says_what_an_option_has_replaced(first, then, tmp_path, trained):
    compare(prepared(tmp_path / "c", methods=["pt"], **first))
    asked = prepare(read_plan(tmp_path / "c", then), say=lambda line: None)
    assert [(variant.label, str(left_out)) for variant in asked.variants for left_out in asked.left_out or [""]] == [
        ("pt", "")
    ]


@pytest.mark.slow
def test_the_untouched_base_is_one_cell_for_each_task_whatever_seeds_budgets_and_sweeps(tmp_path, trained):
    compare(prepared(tmp_path / "c", seeds=[3, 5]))
    assert ("base", "nano/mixed", 0) not in trained
    before = len(trained)
    compare(prepared(tmp_path / "c", methods=["base"], seeds=[3, 5], vary={"rank": [1, 2]}))
    assert trained[before:] == [("base", "nano/mixed", 0)], "added to what is there"
    with_base = {"methods": ["base", "pt"], "seeds": [3, 5, 7], "tasks": ["nano/mixed", "nano/words"]}
    compare(prepared(tmp_path / "c", **with_base))
    assert [cell for cell in trained if cell[0] == "base"] == [("base", "nano/mixed", 0), ("base", "nano/words", 0)]
    compare(prepare(read_plan(tmp_path / "c")))
    assert len(set(trained)) == len(trained), "no cell twice"
    assert [entry["label"] for entry in read_plan(tmp_path / "c").methods] == ["pt", "dpt", "base"]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_the_base_is_a_row_of_the_report_that_nothing_was_trained_for(run, tmp_path, jobs):
    pytest.importorskip("matplotlib")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**TWO, "methods": ["pt"], "jobs": jobs}))
    arguments = ("compare", tmp_path / "plan.yaml", "--with-base", "--output-dir", tmp_path / "c")
    status, out, _ = run(*arguments)
    assert status == 0
    assert "3 cells (seeds 0, 1), 3 to run" in out
    place = tmp_path / "c" / "cells" / "base" / "nano__mixed" / "seed-0"
    assert (read_run(place).result.steps, read_run(place).result.trainable_parameters) == (0, 0)
    assert not (place / "adapter").exists()
    assert not (place / "metrics.jsonl").exists()
    options = ("--task", "nano/mixed", "--examples", 10, "--output-dir", tmp_path / "alone")
    assert run("eval", "--model", "nano", *options)[0] == 0
    alone, here = (folder / "predictions" / "nano__mixed.jsonl" for folder in (tmp_path / "alone", place))
    assert here.read_text() == alone.read_text()
    comparison = read_comparison(tmp_path / "c")
    assert next(board for board in boards(comparison) if board.ranks).scores.keys() >= {
        ("base", "average"),
        ("pt", "average"),
    }
    assert [comparison.of(label)[0].trainable_parameters for label in comparison.labels] == [0, 768]
    assert run(*arguments, "--dry-run")[1].count("0 to run") == 1


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"max_steps": 5}, "max_steps was 4, is 5"),
        ({"eval_tasks": ["nano/words"]}, r"eval_tasks was None, is \['nano/words'\]"),
        ({"per_device_train_batch_size": 8, "eval_examples": 9}, "eval_examples was 10, is 9; per_device_train"),
    ],
)
def test_another_comparisons_folder_is_refused_with_the_differences(change, difference, tmp_path, trained):
    compare(prepared(tmp_path / "c"))
    with pytest.raises(PtmoeError, match=f"holds another comparison .{difference}"):
        prepared(tmp_path / "c", **change)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(PtmoeError, match="holds something other than a comparison"):
        prepared(tmp_path / "other")


@pytest.mark.ci
def test_a_comparison_goes_on_where_its_data_was_moved_to_and_not_with_other_data(tmp_path):
    def numbers(first):
        lines = ({"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(first, first + 12))
        return "".join(f"{json.dumps(line)}\n" for line in lines)

    own = {"methods": ["base", "pt"], "tasks": ["gsm8k"], "max_steps": 1, "max_examples": 8, "eval_examples": 2}
    own |= {"max_new_tokens": 2, "forgetting": str(tmp_path / "known.txt")}
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (tmp_path / "known.txt").write_text("what the base could do before\n")
    (here / "train.jsonl").write_text(numbers(100))
    (here / "test.jsonl").write_text(numbers(200))
    assert not compare(prepared(tmp_path / "c", **own, seeds=1, data_dir=str(here)))
    here.rename(there)
    moved = own | {"seeds": 2, "data_dir": str(there)}
    comparison = prepared(tmp_path / "c", **moved)
    assert [cell.seed for cell in comparison.unfinished] == [1]

    assert not compare(prepared(tmp_path / "c", **moved | {"seeds": 1}))
    assert read_plan(tmp_path / "c").data_dir == str(there)

    trained = r"c.cells.pt.gsm8k.seed-0 was trained on other examples of gsm8k than there are now: put the data back"
    evaluated = r"c.cells.base.gsm8k.seed-0 was evaluated on other examples of gsm8k than"
    known = r"c.cells.pt.gsm8k.seed-0 was evaluated on other examples of forgetting than"
    for path, refusal in (
        (there / "train.jsonl", trained),
        (there / "test.jsonl", evaluated),
        (tmp_path / "known.txt", known),
    ):
        text = path.read_text()
        path.write_text(text.replace("1", "7", 1).replace("what", "that"))
        with pytest.raises(PtmoeError, match=refusal):
            prepared(tmp_path / "c", **moved)
        # Where nothing is left to be run, nothing is read, unless it lies elsewhere.
        assert not prepared(tmp_path / "c", **moved | {"seeds": 1}).unfinished
        with pytest.raises(PtmoeError, match=refusal):
            prepared(tmp_path / "c", **moved | {"seeds": 1, "data_dir": f"{there}/"})
        path.write_text(text)
    assert not compare(prepared(tmp_path / "c", **moved))


def test_the_fingerprint_of_examples_is_the_same_with_every_version_of_python():
    """Which print characters of a new emoji as they are, or escaped."""
    example = Example("1", "café \U0001fae8", " 1", ("1",), "gsm8k")
    assert str(Fingerprint([example])) == "d24210c279fdd30d"


def test_cells_of_an_earlier_version_which_recorded_no_examples_are_told_of(tmp_path):
    own = {"methods": ["base"], "tasks": ["nano/words"], "eval_examples": 1, "max_new_tokens": 1}
    compare(prepared(tmp_path / "c", **own))
    place, said = tmp_path / "c" / "cells" / "base" / "nano__words" / "seed-0", []
    record = json.loads((place / "environment.json").read_text())
    del record["trained_on"], record["evaluated_on"]
    (place / "environment.json").write_text(json.dumps(record))
    prepare(read_plan(tmp_path / "c", {"methods": ["base", "pt"]}), say=said.append)
    assert said == [f"{place} records no fingerprint of its examples: whether they are those of now is not known"]


def test_a_folder_in_which_forgetting_is_measured_otherwise_is_refused(tmp_path, trained):
    (tmp_path / "known.txt").write_text("what the base could do before\n")
    known = str(tmp_path / "known.txt")
    compare(prepared(tmp_path / "with", forgetting=known))
    with pytest.raises(PtmoeError, match=r"forgetting was '.*known.txt', is None"):
        prepared(tmp_path / "with")
    compare(prepared(tmp_path / "without"))
    with pytest.raises(PtmoeError, match=r"forgetting was None, is '.*known.txt'"):
        prepared(tmp_path / "without", forgetting=known)


def test_a_file_to_train_on_that_is_named_otherwise_does_not_take_the_place_of_finished_cells(
    tmp_path, trained, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.jsonl").write_text('{"prompt": "1 =>", "completion": " 1"}\n' * 20)
    own = {"eval_tasks": ["nano/mixed"], "methods": ["pt"]}
    compare(prepared(tmp_path / "c", **own, tasks=["a/mine.jsonl"]))
    for name in ("b/mine.jsonl", str(tmp_path / "a" / "mine.jsonl")):
        with pytest.raises(PtmoeError, match=f"two tasks are called 'mine', a/mine.jsonl and {name}: rename one"):
            prepared(tmp_path / "c", **own, tasks=[name])
    assert len(trained) == 2
    assert not prepare(read_plan(tmp_path / "c")).unfinished


def test_a_cell_whose_record_is_damaged_or_of_another_size_is_run_again(tmp_path, trained):
    comparison = prepared(tmp_path / "c")
    compare(comparison)
    damaged, other, whole, _ = (tmp_path / "c" / cell.place / "cell.json" for cell in comparison.cells)
    damaged.write_text("{")
    other.write_text(whole.read_text())
    compare(prepared(tmp_path / "c"))
    assert trained[4:] == listed(comparison)[:2]


def test_two_commands_do_not_work_in_one_folder(tmp_path, trained):
    comparison = prepared(tmp_path / "c")
    with ComparisonFolder(tmp_path / "c").held(), pytest.raises(PtmoeError, match="another ptmoe compare is running"):
        compare(comparison)
    compare(comparison)
    assert len(trained) == 4
    with ComparisonFolder(tmp_path / "killed").held():
        pass
    prepared(tmp_path / "killed")  # a command that ended before it wrote its plan leaves a folder that can be used


@pytest.mark.parametrize("change", [{"methods": ["smop"]}, {"max_steps": 9}, {"seeds": 5}])
def test_a_plan_that_another_command_has_changed_meanwhile_is_not_overwritten(change, tmp_path, trained):
    late, early = prepared(tmp_path / "c", **change), prepared(tmp_path / "c")
    compare(early)
    plan = (tmp_path / "c" / "comparison.yaml").read_text()
    with pytest.raises(PtmoeError, match=r"another command has changed .*comparison\.yaml: give the command again"):
        compare(late)
    assert (tmp_path / "c" / "comparison.yaml").read_text() == plan
    assert trained == listed(early)
    compare(early)  # which has changed it itself


def test_a_title_stays_until_another_one_is_given(tmp_path, trained):
    titles = []
    for title in ("Mine", None, "Ours"):
        compare(prepared(tmp_path / "c", title=title))
        titles.append(read_plan(tmp_path / "c").title)
    assert titles == ["Mine", "Mine", "Ours"]


@pytest.mark.parametrize(
    ("written", "edited", "said"),
    [
        ("max_steps: 4", "max_steps: 8", "max_steps was 4, is 8"),
        ("learning_rate: 0.03", "learning_rate: 0.05", "learning_rate was 0.03, is 0.05"),
        ("init: vocabulary", "init: random", "init was 'vocabulary', is 'random'"),
        ("max_new_tokens: null", "max_new_tokens: 5", "max_new_tokens was None, is 5"),
        ("train: {}", "train: {trainer: {adam_beta1: 0.5}}", "trainer was .*, is .*'adam_beta1': 0.5"),
    ],
)
def test_a_plan_that_was_edited_in_its_folder_does_not_pass_for_what_was_trained(
    written, edited, said, tmp_path, trained
):
    trained.does = lambda options: options.write(Path(options.output_dir) / "config.yaml")
    compare(prepared(tmp_path / "c"))
    plan = tmp_path / "c" / "comparison.yaml"
    text = plan.read_text()
    assert written in text
    plan.write_text(text.replace(written, edited))
    with pytest.raises(PtmoeError, match=f"was trained otherwise than the plan says .*{said}"):
        prepare(read_plan(tmp_path / "c"))
    plan.write_text(text)
    assert prepare(read_plan(tmp_path / "c")).unfinished == []


def test_every_finished_cell_is_as_the_plan_says(tmp_path, trained):
    trained.does = lambda options: options.write(Path(options.output_dir) / "config.yaml")
    comparison = prepared(tmp_path / "c")
    compare(comparison)
    for cell in comparison.cells:
        config = tmp_path / "c" / cell.place / "config.yaml"
        text = config.read_text()
        config.write_text(text.replace("max_steps: 4", "max_steps: 8"))
        with pytest.raises(PtmoeError, match=f"{cell.place} was trained otherwise than the plan says .max_steps was 8"):
            prepared(tmp_path / "c")
        config.write_text(text)
    assert prepared(tmp_path / "c").unfinished == []


def test_cells_of_an_earlier_version_which_wrote_no_checkpoints_are_as_planned(tmp_path, trained):
    def without(options):
        trainer = {**options.trainer, "save_strategy": "no"}
        options.replace(trainer=trainer).write(Path(options.output_dir) / "config.yaml")

    trained.does = without
    compare(prepared(tmp_path / "c"))
    assert prepared(tmp_path / "c").unfinished == []


def test_what_a_run_decided_for_itself_is_no_edit(tmp_path, trained):
    def resolved(options):
        method = {**options.method, "target_modules": ["q_proj", "v_proj"]}
        options.replace(method=method, chat=False).write(Path(options.output_dir) / "config.yaml")

    trained.does = resolved
    methods = ["lora", "lora:target_modules=[v_proj,q_proj]"]
    asked = {"methods": methods, "budget": None}
    compare(prepared(tmp_path / "c", **asked))
    assert prepared(tmp_path / "c", **asked).unfinished == prepare(read_plan(tmp_path / "c")).unfinished == []
    plan = tmp_path / "c" / "comparison.yaml"
    plan.write_text(plan.read_text().replace("- q_proj", "- o_proj"))
    with pytest.raises(PtmoeError, match=r"target_modules was \['q_proj', 'v_proj'\], is \['o_proj', 'v_proj'\]"):
        prepare(read_plan(tmp_path / "c"))


def test_what_could_not_be_read_again_stops_before_a_cell_is_trained(tmp_path, trained, monkeypatch):
    comparison = prepared(tmp_path / "c")
    size = len(comparison.whole.text().encode())
    monkeypatch.setattr("ptmoe.compare.run.LARGEST_YAML", size - 1)
    with pytest.raises(PtmoeError, match=f"would have {size:,} bytes, and none with more than {size - 1:,} is read"):
        prepared(tmp_path / "c")
    monkeypatch.setattr("ptmoe.compare.run.LARGEST_YAML", size)
    prepared(tmp_path / "c")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "failed.jsonl").write_text("{\n")
    with pytest.raises(PtmoeError, match=r"failed.jsonl, line 1"):
        compare(comparison)
    assert trained == []


@pytest.mark.slow
def test_a_cell_is_a_run_folder_and_the_command_reports(run, tmp_path):
    """End to end, in this process; one of the methods diverges."""
    pytest.importorskip("matplotlib")
    plan = {**TWO, "seeds": 1, "methods": ["pt", {"name": "pt-moe", "rank": 2, "num_virtual_tokens": 4}]}
    plan["methods"].append({"name": "dpt", "learning_rate": 1e30})
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    status, out, _ = run("compare", tmp_path / "plan.yaml", "--output-dir", tmp_path / "c", "--jobs", 1)
    assert status == 1
    assert "failed: dpt on nano/mixed, seed 0: the loss became" in out
    assert "1 of 3 cells failed" in out
    assert f"report: {tmp_path / 'c' / 'report.html'}" in out
    assert (tmp_path / "c" / "report.html").exists()
    place = tmp_path / "c" / "cells" / "pt-moe" / "nano__mixed" / "seed-0"
    cell = read_run(place)
    assert cell.result.steps == 4
    assert cell.evaluations["nano/mixed"].examples == 10
    assert json.loads((place / "cell.json").read_text())["trainable_parameters"] == cell.result.trainable_parameters
    status, out, _ = run("compare", tmp_path / "c", "--dry-run")
    assert status == 0
    assert "3 cells (seeds 0), 1 to run" in out


@pytest.mark.slow
def test_cells_in_processes_give_what_they_give_in_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # one thread for each process, as here
    watched = []

    class Steps(Watcher):
        def step(self, cell, done, steps, loss):
            watched.append((cell.variant.label, done, steps))

    one, two = prepared(tmp_path / "one", seeds=1), prepared(tmp_path / "two", seeds=1, jobs=2)
    assert compare(one) == compare(two, Steps()) == []
    assert {("pt", 4, 4), ("dpt", 4, 4)} <= set(watched)
    for cell in one.cells:
        for file in ("adapter/adapter_model.safetensors", "predictions/nano__mixed.jsonl", "cell.json"):
            first, second = (tmp_path / name / cell.place / file for name in ("one", "two"))
            assert first.read_bytes() == second.read_bytes(), file


def test_a_process_that_is_killed_fails_its_cell_and_another_takes_over(tmp_path, monkeypatch):
    """With a stand-in that says what a cell says, and nothing heavy."""
    script = (
        "import sys, json\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'step': 1, 'steps': 2, 'loss': None}), flush=True)\n"
        "    if json.loads(line)['seed'] == 13: sys.stdin.read()\n"  # until it is killed
        "    if json.loads(line)['seed'] == 14: sys.exit(3)\n"
        "    print(json.dumps({'trainable': 384}), flush=True)\n"
    )
    monkeypatch.setattr(Workers, "command", (sys.executable, "-S", "-c", script))
    workers = Workers(2, tmp_path / "log.txt")
    steps = []

    def kill(*step):
        for process in workers.alive:
            process.kill()

    def run(seed, progress):
        return workers.run(TrainOptions(task="nano/mixed", seed=seed), progress, print)

    try:
        assert run(1, lambda *step: steps.append(step)) == 384
        with pytest.raises(PtmoeError, match="its process was ended by SIGKILL"):
            run(13, kill)
        with pytest.raises(PtmoeError, match=r"its process ended with status 3; .*log.txt has what it printed last"):
            run(14, lambda *step: None)
        assert run(2, lambda *step: steps.append(step)) == 384
        assert steps == [(1, 2, None)] * 2
        assert len(workers.alive) == 3, "one served two cells, and each that died has a successor"
    finally:
        workers.stop()
    assert all(process.poll() is not None for process in workers.alive)


@pytest.mark.ci
def test_a_process_that_is_stopped_may_write_a_checkpoint_first(tmp_path, monkeypatch):
    """With stand-ins: one writes its checkpoint when it is told to end, another never ends."""
    script = (
        "import sys, json, signal, time\n"
        "seed = json.loads(sys.stdin.readline())['seed']\n"
        "def end(*_):\n"
        f"    if seed == 1: open({str(tmp_path / 'checkpoint')!r}, 'w').close(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print(json.dumps({'step': 1, 'steps': 2, 'loss': None}), flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    monkeypatch.setattr(Workers, "command", (sys.executable, "-S", "-c", script))
    monkeypatch.setattr(workers_module, "GRACE_SECONDS", 2.0)
    workers = Workers(2, tmp_path / "log.txt")
    both = threading.Barrier(3)

    def run(seed):
        with pytest.raises(PtmoeError, match="its process"):
            workers.run(TrainOptions(task="nano/mixed", seed=seed), lambda *step: both.wait(20), print)

    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(run, seed) for seed in (1, 2)]
        both.wait(20)
        workers.stop()
        for end in ends:
            end.result(20)
    assert (tmp_path / "checkpoint").exists()
    assert sorted(process.returncode for process in workers.alive) == [-signal.SIGKILL, 0]
