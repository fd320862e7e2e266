"""The search for learning rates: what its trials train on and are scored on, what it keeps, and what it chooses."""

import json
from pathlib import Path

import pytest

from ptmoe.compare import prepare, read_plan
from ptmoe.compare import workers as workers_module
from ptmoe.compare.run import compare
from ptmoe.compare.watcher import Watcher
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.runs.records import EvaluationSummary, Result
from ptmoe.runs.searches import RateSearch
from ptmoe.tasks import TASKS, Problems, load_task
from ptmoe.train.examples import evaluation_examples, evaluation_split, training_examples
from ptmoe.train.options import TrainOptions

SHORT = {"max_steps": 6, "eval_examples": 10, "per_device_train_batch_size": 4, "max_examples": 16, "jobs": 1}
PLAN = {**SHORT, "methods": ["base", "pt", "dpt"], "budget": 900, "tasks": ["nano/mixed"], "seeds": 2, "search": True}


class Notes(Watcher):
    def __init__(self):
        self.notes, self.running = [], []

    def note(self, text):
        self.notes.append(text)

    def started(self, cell):
        self.running.append(cell)


@pytest.fixture
def trained(monkeypatch):
    """Cells that train nothing: a trial scores what `trained.score(method, rate, seed)` says, and it and the cells are
    listed."""

    class Trained(list):
        score = staticmethod(lambda method, rate, seed: 50.0)

        def run(self, options, progress, say):
            self.append(options)
            folder, rate = Path(options.output_dir), options.learning_rate
            folder.mkdir(parents=True)
            if options.validation_examples:
                score = self.score(options.method["name"], rate, options.seed)
                summary = EvaluationSummary(task="nano/mixed", examples=9, metrics={"accuracy": score})
                summary.write(folder / "eval" / "nano__mixed.validation.json")
            options.write(folder / "config.yaml")
            Result(name="x", method="x", trainable_parameters=7, train_seconds=1, steps=2).write(folder / "result.json")
            return 7

        @property
        def trials(self):
            found = [options for options in self if options.validation_examples]
            return [(options.method["name"], options.learning_rate, options.seed) for options in found]

        @property
        def cells(self):
            found = [options for options in self if not options.validation_examples]
            return [(options.method["name"], options.learning_rate, options.seed) for options in found]

    cells = Trained()
    monkeypatch.setattr(workers_module, "run_cell", cells.run)
    return cells


def prepared(folder, **changes):
    return prepare(read_plan(None, {**PLAN, "output_dir": str(folder), **changes}), say=lambda line: None)


def searches(folder):
    return {search.label: search for search in RateSearch.read_lines(folder / "search.jsonl")}


def peak_at(best):
    """Scores that are highest at a method's own rate of `best`."""
    return lambda method, rate, seed: 60.0 - 10 * abs(best[method] / rate - 1) + 0.1 * (seed % 10)


def test_the_best_mean_is_for_the_cells_and_the_whole_grid_is_kept(tmp_path, trained):
    usual = {name: METHODS[name].narrow_learning_rate for name in ("pt", "dpt")}
    threefold = float(f"{3 * usual['dpt']:.3g}")
    trained.score = peak_at({"pt": usual["pt"], "dpt": threefold})
    watcher = Notes()
    assert compare(prepared(tmp_path / "c"), watcher) == []
    assert len(trained.trials) == len(set(trained.trials)) == 2 * 5 * 3
    assert {seed for *_, seed in trained.trials} == {1000, 1001, 1002}
    assert {rate for name, rate, _ in trained.cells if name == "dpt"} == {threefold}
    assert {rate for name, rate, _ in trained.cells if name == "pt"} == {usual["pt"]}
    assert {rate for name, rate, _ in trained.cells if name == "base"} == {None}
    assert trained.index(next(o for o in trained if not o.validation_examples)) == 30, "all trials before any cell"
    found = searches(tmp_path / "c")
    assert {label: (search.given, search.chosen) for label, search in found.items()} == {
        "pt": (usual["pt"], usual["pt"]),
        "dpt": (usual["dpt"], threefold),
    }
    for label, search in found.items():
        assert search.rates == pytest.approx([usual[label] * factor for factor in (1 / 9, 1 / 3, 1, 3, 9)], rel=5e-3)
        written = {tuple(trial.settings.values()): trial.scores for trial in search.trials}
        assert written == {(r, s): [(2, trained.score(label, r, s))] for r in search.rates for s in search.seeds}
        assert search.edge is None
    assert (found["pt"].split, found["pt"].examples) == ("validation", 200)
    assert len(watcher.notes) == 2
    assert not [note for note in watcher.notes if "beyond" in note]
    assert not (tmp_path / "c" / "search").exists(), "the trials' own folders"


def test_the_plan_stays_as_it_is_and_its_folder_keeps_what_was_chosen(tmp_path, trained):
    first = prepared(tmp_path / "c")
    assert len(first.trials) == 30
    compare(first)
    written = (tmp_path / "c" / "comparison.yaml").read_text()
    assert {entry["name"]: entry["learning_rate"] for entry in read_plan(tmp_path / "c").methods} == {
        "base": None,
        "pt": METHODS["pt"].narrow_learning_rate,
        "dpt": METHODS["dpt"].narrow_learning_rate,
    }
    again = prepare(read_plan(tmp_path / "c"))
    assert (again.trials, again.unfinished) == ([], [])
    trained.clear()
    kept = (tmp_path / "c" / "search.jsonl").read_bytes()
    trained.score = peak_at({"pt": 1.0, "dpt": 1.0})
    compare(prepared(tmp_path / "c", seeds=3, methods=["pt", "smop"]))
    assert {name for name, *_ in trained.trials} == {"smop"}, "a search that has ended is not repeated"
    assert [cell for cell in trained.cells if cell[0] == "pt"] == [("pt", searches(tmp_path / "c")["pt"].chosen, 2)]
    assert (tmp_path / "c" / "search.jsonl").read_bytes().startswith(kept)
    assert "search: true" in written
    with pytest.raises(PtmoeError, match=r"holds another comparison .search was True, is False"):
        prepared(tmp_path / "c", search=False)


@pytest.mark.parametrize("which", ["lowest", "highest"])
def test_a_rate_at_the_edge_is_warned_of(tmp_path, trained, which):
    sign = {"lowest": -1, "highest": 1}[which]
    trained.score = lambda method, rate, seed: 50 + sign * rate
    watcher = Notes()
    compare(prepared(tmp_path / "c", methods=["pt"]), watcher)
    (note,) = watcher.notes
    assert f"It is the {which} of its grid, and a better one may lie beyond: widen --search-factors" in note
    assert searches(tmp_path / "c")["pt"].edge == which


def interrupted_at_the_eighth(trained, folder):
    """A comparison whose search has seven trials."""

    def score(method, rate, seed):
        if len(trained) == 8:
            raise KeyboardInterrupt
        return 50.0

    trained.score = score
    with pytest.raises(KeyboardInterrupt):
        compare(prepared(folder))


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path, trained):
    interrupted_at_the_eighth(trained, tmp_path / "c")
    assert not trained.cells
    assert len(prepared(tmp_path / "c").trials) == 30 - 7
    trained.score = lambda method, rate, seed: 50.0
    compare(prepared(tmp_path / "c"))
    assert len(trained.trials) == 31
    assert len(set(trained.trials)) == 30


@pytest.mark.parametrize(
    ("written", "edited", "said"),
    [
        ("search_steps: null", "search_steps: 1", "max_steps was 2, is 1"),
        ("search_seeds: 3", "search_seeds: 1", r"seeds was \[1000, 1001, 1002\], is \[1000\]"),
        ("learning_rate: 0.03", "learning_rate: 0.3", "given was 0.03, is 0.3"),
        ("per_device_train_batch_size: 4", "per_device_train_batch_size: 2", "per_device_train_batch_size was 4, is 2"),
    ],
)
@pytest.mark.ci
def test_trials_that_have_ended_do_not_pass_for_those_of_a_plan_that_was_edited(
    written, edited, said, tmp_path, trained
):
    interrupted_at_the_eighth(trained, tmp_path / "c")
    plan = tmp_path / "c" / "comparison.yaml"
    text = plan.read_text()
    assert written in text
    plan.write_text(text.replace(written, edited))
    with pytest.raises(PtmoeError, match=f"was searched otherwise than the plan says .*{said}"):
        prepare(read_plan(tmp_path / "c"))
    plan.write_text(text)
    assert len(prepare(read_plan(tmp_path / "c")).trials) == 30 - 7
    before, _, after = text.rpartition("learning_rate: 0.03")  # of dpt, of which no trial has ended
    plan.write_text(f"{before}learning_rate: 0.3{after}")
    asked = prepare(read_plan(tmp_path / "c")).trials
    assert {trial.rate for trial in asked if trial.variant.label == "dpt"} == {0.0333, 0.1, 0.3, 0.9, 2.7}


def test_a_cell_that_has_another_rate_than_was_chosen_is_not_taken_for_finished(tmp_path, trained):
    trained.score = peak_at({name: METHODS[name].narrow_learning_rate for name in ("pt", "dpt")})
    compare(prepared(tmp_path / "c"))
    assert prepared(tmp_path / "c").unfinished == []
    (config,) = (tmp_path / "c").glob("cells/pt/*/seed-1/config.yaml")
    config.write_text(config.read_text().replace("learning_rate: 0.03", "learning_rate: 0.01"))
    with pytest.raises(PtmoeError, match=r"seed-1 was trained otherwise than the plan says .learning_rate was 0.01"):
        prepared(tmp_path / "c")


@pytest.mark.parametrize("line", [0, 59])
@pytest.mark.ci
def test_an_interrupted_search_does_not_go_on_with_other_data(line, tmp_path, trained):
    """Neither with other validation examples, the first of this file, nor with others to train on."""

    def interrupted(method, rate, seed):
        if len(trained) == 8:
            raise KeyboardInterrupt
        return 50.0

    lines = [json.dumps({"prompt": f"{n} =>", "completion": f" {n}"}) for n in range(60)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines))
    asked = {"tasks": [str(file)], "eval_tasks": ["nano/mixed"], "search_examples": 20, "max_examples": None}
    trained.score = interrupted
    with pytest.raises(KeyboardInterrupt):
        compare(prepared(tmp_path / "c", **asked))
    assert prepared(tmp_path / "c", **asked, data_dir=str(tmp_path)).trials  # named otherwise, and the same
    file.write_text("\n".join(text.replace("=>", "+") if place == line else text for place, text in enumerate(lines)))
    with pytest.raises(PtmoeError, match=r"holds a search on other data than .*mine\.jsonl"):
        compare(prepared(tmp_path / "c", **asked))
    assert len(trained.trials) == 8
    file.write_text("\n".join(lines))
    trained.score = lambda method, rate, seed: 50.0
    compare(prepared(tmp_path / "c", **asked))
    assert len(set(trained.trials)) == 30
    (tmp_path / "c" / "cells" / "dpt" / "mine" / "seed-1" / "cell.json").unlink()
    only = {**asked, "methods": ["dpt"]}
    assert len(prepared(tmp_path / "c", **only).unfinished) == 1
    file.write_text("\n".join(text.replace("=>", "+") if place == line else text for place, text in enumerate(lines)))
    with pytest.raises(PtmoeError, match=r"holds a search on other data than .*mine\.jsonl"):
        prepared(tmp_path / "c", **only)  # whose trials have ended


def test_a_rate_that_diverges_is_out_and_a_trial_that_fails_holds_its_cells_up(tmp_path, trained):
    usual = METHODS["pt"].narrow_learning_rate

    def broken(method, rate, seed):
        if rate > 2 * usual and seed == 1001:
            raise PtmoeError("the loss became nan at step 3, and no checkpoint holds earlier weights")
        if method == "dpt" and rate == METHODS["dpt"].narrow_learning_rate and seed == 1000:
            raise RuntimeError("out of memory")
        return 50 + rate

    trained.score = broken
    failed = compare(prepared(tmp_path / "c"))
    found = searches(tmp_path / "c")
    assert found["pt"].chosen == usual, "the highest of those with which no seed diverged"
    assert [trial.state for trial in found["pt"].trials].count("diverged") == 2
    assert found["dpt"].chosen is None
    assert {(failure.label, failure.seed) for failure in failed} == {("dpt", 0), ("dpt", 1)}
    assert "its search: 1 trial(s) failed, and the same command runs them again: RuntimeError: out of memory" in (
        failed[0].error
    )
    assert {name for name, *_ in trained.cells} == {"base", "pt"}
    trained.clear()
    trained.score = lambda method, rate, seed: 50 + rate
    assert compare(prepared(tmp_path / "c")) == []
    assert trained.trials == [("dpt", METHODS["dpt"].narrow_learning_rate, 1000)]
    assert [seed for *_, seed in trained.cells] == [0, 1]


def test_a_method_that_diverges_at_every_rate_fails_in_words(tmp_path, trained):
    def broken(method, rate, seed):
        raise PtmoeError("the loss became inf at step 1; stopped with nothing")

    trained.score = broken
    failed = compare(prepared(tmp_path / "c", methods=["pt"], seeds=1))
    assert [failure.error for failure in failed] == [
        "its search: at every learning rate the loss became NaN or infinite with some seed: lower --search-factors"
    ]


# -- what a trial trains on and is scored on ---------------------------------------------------------------------------


def options(**changes):
    return TrainOptions(**{"task": "nano/mixed", "validation_examples": 20, **changes})


def both(options):
    problems = Problems(skip=options.skip_bad, at_once=options.data is None)
    return list(training_examples(options, problems, print)), evaluation_examples(options, print)


@pytest.mark.parametrize("task", ["nano/mixed", "nano/words,nano/facts"])
@pytest.mark.ci
def test_a_task_with_a_validation_split_is_validated_on_it_and_trains_on_everything(task):
    trained, scored = both(options(task=task))
    assert evaluation_split(options(task=task)) == "validation"
    assert sum(map(len, scored.values())) == 20
    assert len(trained) == 8000 * len(scored)
    for name, examples in scored.items():
        assert examples == load_task(name, "validation", max_examples=20 // len(scored))
        assert not {example.input for example in examples} & {e.input for e in load_task(name, "test")}


@pytest.mark.parametrize("limit", [None, 25, 30])
def test_without_one_the_first_of_the_training_split_are_held_out(tmp_path, limit):
    lines = [json.dumps({"prompt": f"{n} =>", "completion": f" {n}"}) for n in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    for source in ({"task": str(tmp_path / "train.jsonl")}, {"task": None, "data": str(tmp_path / "train.jsonl")}):
        asked = options(**source, max_examples=limit)
        trained, scored = both(asked)
        (held_out,) = scored.values()
        assert evaluation_split(asked) == "train"
        assert [example.input for example in held_out] == [f"{n} =>" for n in range(20)]
        assert [example.input for example in trained] == [f"{n} =>" for n in range(20, 20 + (limit or 40))]
        assert len(both(asked.replace(validation_examples=None, eval_task="nano/mixed"))[0]) == (limit or 60)


def test_a_named_task_without_one_is_held_out_of_its_training_split(tmp_path):
    gsm = [json.dumps({"question": f"{n} and 1?", "answer": f"#### {n + 1}"}) for n in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(gsm))
    asked = options(task="gsm8k", data_dir=str(tmp_path), validation_examples=10)
    trained, scored = both(asked)
    assert evaluation_split(asked) == "train"
    assert [len(part) for part in scored.values()] == [10]
    assert {example.id for example in scored["gsm8k"]}.isdisjoint(example.id for example in trained)


def test_what_repeats_a_held_out_input_is_not_trained_on(tmp_path, capsys):
    lines = [json.dumps({"prompt": prompt, "completion": " x"}) for prompt in ("a b", "b", "c", "A  b", "b", "d", "c")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    asked = options(task=None, data=str(tmp_path / "train.jsonl"), validation_examples=2)
    trained, scored = both(asked)
    assert [example.input for part in scored.values() for example in part] == ["a b", "b"]
    assert [example.input for example in trained] == ["c", "d", "c"]
    assert "left out 2 training example(s) with the input of one to validate on" in capsys.readouterr().out
    assert len(both(asked.replace(max_examples=2))[0]) == 2
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:1] * 4))
    with pytest.raises(PtmoeError, match="no example is left to train on"):
        both(asked)


def test_every_task_of_a_mixture_has_its_share_of_what_is_held_out(tmp_path):
    """Also one that is a mixture itself, whose examples go by the names of its parts."""
    gsm = [json.dumps({"question": f"{n} and 1?", "answer": f"#### {n + 1}"}) for n in range(40)]
    written = {"gsm8k/train.jsonl": "\n".join(gsm)}
    for part in TASKS["mixture/classification"].parts:
        label = "Good" if part == "glue/sst2" else TASKS[part].labels[0]
        records = [{"sentence": f"{part} {n}", "label": label} for n in range(40)]
        written[f"{part.rpartition('/')[2]}/train.json"] = json.dumps(records)
    for name, text in written.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    _, scored = both(options(task="mixture/classification,gsm8k", data_dir=str(tmp_path), validation_examples=24))
    assert {name: len(part) for name, part in scored.items()} == {"mixture/classification": 12, "gsm8k": 12}


def test_too_few_examples_to_hold_any_out_are_refused(tmp_path):
    lines = [json.dumps({"prompt": f"{n} =>", "completion": f" {n}"}) for n in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    for changes, count in (({"validation_examples": 8}, 12), ({"validation_examples": 5, "max_examples": 3}, 8)):
        asked = options(task=str(tmp_path / "train.jsonl"), **changes)
        with pytest.raises(PtmoeError, match=f"{count} examples, and {asked.validation_examples} of them are to val"):
            both(asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search_factors": "1"}, "search_factors '1': needs two at least"),
        ({"search_factors": "1,x"}, "search_factors '1,x': needs numbers, as 0.1,1,10"),
        ({"search_factors": [0, 1]}, "search_factors.0=0"),
        ({"search": False, "search_steps": 3}, "search_steps=3 is for --search, which is not asked for"),
        ({"vary": ["learning_rate=0.1,0.01"]}, "search chooses the learning rate, and vary tries several"),
        ({"search_examples": 400, "tasks": ["file"]}, "24 examples, and 400 of them are to validate on"),
    ],
)
def test_a_mistake_is_refused_before_a_trial(tmp_path, changes, message):
    lines = [json.dumps({"prompt": f"{n} =>", "completion": f" {n}"}) for n in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    if changes.get("tasks"):
        changes = {**changes, "tasks": [str(tmp_path / "train.jsonl")], "eval_tasks": ["nano/mixed"]}
    with pytest.raises(PtmoeError, match=message.replace(".", r"\.")):
        prepared(tmp_path / "c", **changes)
    assert not (tmp_path / "c").exists()


def test_the_command_says_how_many_trials_there_are(run, tmp_path):
    flags = "--task nano/mixed --method pt --method dpt --max-steps 400 --search --search-factors 0.1,1,10 --dry-run"
    status, out, err = run("compare", *flags.split(), "--output-dir", tmp_path / "c")
    assert status == 0, err
    text = " ".join(out.split())
    assert "search: 3 learning rates × 3 seeds × 2 (method, size, task), 18 trials of 134 steps scored" in text
    assert "18 to run" in text
    usual = METHODS["pt"].narrow_learning_rate
    assert f"{usual / 10:g} to {usual * 10:g}" in text
    assert not (tmp_path / "c").exists()
