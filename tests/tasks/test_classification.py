"""Classification sets: every original format and label, splits that share no input, mixtures, macro-F1."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ptmoe
from ptmoe.tasks import TASKS, Problems, check_labels, load_task, stream_task, task_names
from ptmoe.tasks.base import Origin, folded, is_held_out
from ptmoe.tasks.labels import confusion, macro_f1, macro_f1_interval
from ptmoe.tasks.scoring import grade, summarise

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs the data sets' own files")
MIXTURE = "mixture/classification"
SETS = [name for name, task in TASKS.items() if task.labels]


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PTMOE_DATA_DIR", raising=False)


def tsv(*rows):
    return "".join("\t".join(row.split("|")) + "\n" for row in rows)


def json_lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


MNLI = "index|promptID|pairID|genre|sentence1_parse|sentence2_parse|sentence1|sentence2|label1|gold_label"

# Each original file with two records: what it is called, its text, the inputs without "\n=>", the answers.
ORIGINALS = {
    "glue/cola": (
        "CoLA/dev.tsv",
        tsv('gj04|1||"Our friends" won.', "gj04|0|*|They drank the pub."),
        ['"Our friends" won.', "They drank the pub."],
        ["acceptable", "unacceptable"],
    ),
    "glue/sst2": (
        "SST-2/dev.tsv",
        tsv("sentence|label", 'a "charming journey . |1', "unflinchingly bleak |0"),
        ['Text: a "charming journey .', "Text: unflinchingly bleak"],
        ["positive", "negative"],
    ),
    "glue/mrpc": (
        "MRPC/dev.tsv",
        "\ufeff" + tsv("Quality|#1 ID|#2 ID|#1 String|#2 String", "1|13|14|He said.|He did say.", "0|1|2|A|B"),
        ["sentence 1: He said.\nsentence 2: He did say.", "sentence 1: A\nsentence 2: B"],
        ["yes", "no"],
    ),
    "glue/qqp": (
        "QQP/dev.tsv",
        tsv("id|qid1|qid2|question1|question2|is_duplicate", "1|2|3|Why?|How?|0", "4|5|6|Who?|Who is it?|1"),
        ["question 1: Why?\nquestion 2: How?", "question 1: Who?\nquestion 2: Who is it?"],
        ["no", "yes"],
    ),
    "glue/mnli": (
        "MNLI/dev_matched.tsv",
        tsv(
            MNLI, "0|1|1n|f|( x )|( y )|Rain.|Wet.|neutral|neutral", "1|2|2c|f|x|y|Sun.|Dark.|entailment|contradiction"
        ),
        ["premise: Rain.\nhypothesis: Wet.", "premise: Sun.\nhypothesis: Dark."],
        ["maybe", "no"],
    ),
    "glue/qnli": (
        "QNLI/dev.tsv",
        tsv("index|question|sentence|label", "0|Who?|Ann did.|entailment", "1|Where?|Ann did.|not_entailment"),
        ["question: Who?\nsentence: Ann did.", "question: Where?\nsentence: Ann did."],
        ["yes", "no"],
    ),
    "glue/rte": (
        "RTE/dev.tsv",
        tsv("index|sentence1|sentence2|label", "0|A b.|A.|entailment", "1|A.|B.|not_entailment"),
        ["sentence 1: A b.\nsentence 2: A.", "sentence 1: A.\nsentence 2: B."],
        ["yes", "no"],
    ),
    "glue/wnli": (
        "WNLI/dev.tsv",
        tsv("index|sentence1|sentence2|label", "0|It fell.|The cup fell.|1", "1|It fell.|The sky fell.|0"),
        ["sentence 1: It fell.\nsentence 2: The cup fell.", "sentence 1: It fell.\nsentence 2: The sky fell."],
        ["yes", "no"],
    ),
    "superglue/boolq": (
        "BoolQ/val.jsonl",
        json_lines(
            {"question": "is it", "passage": "It -- is {so}.", "idx": 0, "label": True},
            {"question": "was it", "passage": "No.", "idx": 1, "label": False},
        ),
        ["question: is it\npassage: It -- is {so}.", "question: was it\npassage: No."],
        ["yes", "no"],
    ),
    "superglue/cb": (
        "CB/val.jsonl",
        json_lines(
            {"premise": "He may.", "hypothesis": "He can.", "label": "neutral", "idx": 0},
            {"premise": "He won't.", "hypothesis": "He will.", "label": "contradiction", "idx": 1},
        ),
        ["premise: He may.\nhypothesis: He can.", "premise: He won't.\nhypothesis: He will."],
        ["maybe", "no"],
    ),
    "superglue/copa": (
        "COPA/val.jsonl",
        json_lines(
            *(
                {"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": q, "label": n, "idx": n}
                for n, q in enumerate(("effect", "cause"))
            )
        ),
        [f"premise: It rained.\nquestion: {q}\nchoice 1: Wet.\nchoice 2: Dry." for q in ("effect", "cause")],
        ["first", "second"],
    ),
    "superglue/rte": (
        "RTE/val.jsonl",
        json_lines(
            {"premise": "A b.", "hypothesis": "A.", "label": "entailment", "idx": 0},
            {"premise": "A.", "hypothesis": "B.", "label": "not_entailment", "idx": 1},
        ),
        ["sentence 1: A b.\nsentence 2: A.", "sentence 1: A.\nsentence 2: B."],
        ["yes", "no"],
    ),
    "superglue/wic": (
        "WiC/val.jsonl",
        json_lines(
            {"word": "run", "sentence1": "I run.", "sentence2": "A run.", "start1": 2, "label": False, "idx": 0},
            {"word": "run", "sentence1": "I run.", "sentence2": "We run.", "start1": 2, "label": True, "idx": 1},
        ),
        ["word: run\nI run.\nA run.", "word: run\nI run.\nWe run."],
        ["no", "yes"],
    ),
    "agnews": (
        "ag_news_csv/test.csv",
        '"4","Chips, ""smart"" ones","They are\\small."\n"1","Talks","Held in Rome."\n',
        ['Title: Chips, "smart" ones\nText: They are\\small.', "Title: Talks\nText: Held in Rome."],
        ["science", "world"],
    ),
    "trec": (
        "TREC_10.label",
        "NUM:dist How far is a caf\xe9 ?\nLOC:city What city\xf0is it ?\n",
        ["How far is a caf\xe9 ?", "What city\xf0is it ?"],
        ["number", "location"],
    ),
}

# The names of the labels on the Hub in the order of their numbers, and the word that answers.
HUB_LABELS = {
    "glue/cola": ["unacceptable", "acceptable"],
    "glue/sst2": ["negative", "positive"],
    "glue/mrpc": ["no", "yes"],
    "glue/qqp": ["no", "yes"],
    "glue/mnli": ["yes", "maybe", "no"],
    "glue/qnli": ["yes", "no"],
    "glue/rte": ["yes", "no"],
    "glue/wnli": ["no", "yes"],
    "superglue/boolq": ["no", "yes"],
    "superglue/cb": ["yes", "no", "maybe"],
    "superglue/copa": ["first", "second"],
    "superglue/rte": ["yes", "no"],
    "superglue/wic": ["no", "yes"],
    "agnews": ["world", "sports", "business", "science"],
    "trec": ["abbreviation", "entity", "description", "human", "location", "number"],
}
HUB_COLUMNS = (
    "sentence sentence1 sentence2 question1 question2 premise hypothesis question passage word choice1 choice2 text"
).split()


def original(name, root):
    place, text, inputs, answers = ORIGINALS[name]
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1" if name == "trec" else "utf-8"))
    return path, inputs, answers


def test_every_set_is_tested_here():
    assert set(SETS) == set(ORIGINALS) == set(HUB_LABELS)
    for name in SETS:
        assert sorted(HUB_LABELS[name]) == sorted(TASKS[name].labels)


@pytest.mark.parametrize("name", SETS)
def test_the_original_files_are_found_in_their_folders_and_read(name, tmp_path):
    path, inputs, answers = original(name, tmp_path)
    examples = load_task(name, "test", tmp_path)
    assert [example.input for example in examples] == [f"{text}\n=>" for text in inputs]
    assert [example.target for example in examples] == [f" {answer}" for answer in answers]
    assert [example.references for example in examples] == [(answer,) for answer in answers]
    assert load_task(name, "test", path) == examples == list(stream_task(name, "test", path))
    assert len({example.id for example in examples}) == 2
    assert set(answers) <= set(TASKS[name].labels)
    for example, text in zip(examples, inputs, strict=True):
        start, end = example.context
        assert text[start:end] == max(text.split("\n"), key=len), "only the longest line may be cut"
    gold = ptmoe.score(name, [example.target for example in examples], examples)
    assert gold["accuracy"] == 100.0
    assert gold["macro_f1"] == pytest.approx(100 * 2 / len(TASKS[name].labels)), "labels that no example has score 0"
    assert ptmoe.score(name, ["?"] * 2, examples) == {"accuracy": 0.0, "macro_f1": 0.0}


@pytest.mark.parametrize("name", SETS)
def test_a_label_that_is_no_choice_is_named_by_file_and_line(name, tmp_path):
    path, _, answers = original(name, tmp_path)
    text = ORIGINALS[name][1]
    second = text.rstrip("\n").rpartition("\n")[2]
    if name == "agnews":
        broken = second.replace('"1"', '"5"')
    elif name == "trec":
        broken = second.replace("LOC", "PLACE")
    elif second.startswith("{"):
        broken = json.dumps({**json.loads(second), "label": 7})
    else:
        cells = second.split("\t")
        cells[{"glue/mrpc": 0, "glue/cola": 1}.get(name, -1)] = "7"
        broken = "\t".join(cells)
    assert broken != second
    path.write_bytes(text.replace(second, broken).encode("latin-1" if name == "trec" else "utf-8"))
    line = len(text.rstrip("\n").split("\n"))
    wanted = rf"{path.name}:{line}: the label '?\w+'? is no choice of {name}: needs one of .*\w"
    with pytest.raises(ptmoe.PtmoeError, match=wanted):
        load_task(name, "test", path)
    problems = Problems(skip=True)
    assert [e.references[0] for e in load_task(name, "test", path, problems=problems)] == answers[:1]
    assert problems.count == 1


@pytest.mark.parametrize("name", SETS)
def test_the_hubs_numbers_and_columns_give_the_same_words(name):
    task = TASKS[name]
    row = {column: f"the {column}" for column in HUB_COLUMNS}
    column = "coarse_label" if name == "trec" else "label"
    made = [
        task.hub.example({**row, column: number}, Origin(name, "test", number))
        for number in range(len(HUB_LABELS[name]))
    ]
    assert [example.references[0] for example in made] == HUB_LABELS[name]
    if name not in ("agnews", "trec"):  # whose fields the Hub joins, or calls otherwise
        form = [part.split(": ")[0] for part in ORIGINALS[name][2][0].split("\n") if ": " in part]
        assert [part.split(": ")[0] for part in made[0].input.split("\n") if ": " in part] == form


def test_a_copy_on_the_hub_is_read_through_datasets_also_where_it_was_a_script(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(repository, config=None, *, split, data_dir=None, revision=None):
        asked.append((repository, config, data_dir, split, revision))
        if revision is None and repository == "aps/super_glue":
            raise RuntimeError("Dataset scripts are no longer supported, but found super_glue.py")
        row = {"sentence": "good", "premise": "A b.", "hypothesis": "A.", "label": 1}
        return datasets.Dataset.from_list([{**row, "sentence": f"good {n}"} for n in range(40)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert {e.references for e in load_task("glue/sst2", "test")} == {("positive",)}
    assert load_task("superglue/cb", "test")[0].references == ("no",)
    train, validation = (load_task("glue/sst2", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 40
    assert asked == [
        ("nyu-mll/glue", "sst2", None, "validation", None),
        ("aps/super_glue", "cb", None, "validation", None),
        ("aps/super_glue", None, "cb", "validation", "refs/convert/parquet"),
        ("nyu-mll/glue", "sst2", None, "train", None),
        ("nyu-mll/glue", "sst2", None, "train", None),
    ]


def test_other_forms_in_circulation_give_the_same_examples(tmp_path):
    path, inputs, answers = original("agnews", tmp_path)
    plain = load_task("agnews", "test", path)
    path.write_text("Class Index,Title,Description\n" + ORIGINALS["agnews"][1])
    assert load_task("agnews", "test", path) == plain
    numbered = tmp_path / "TREC.test.all"
    numbered.write_bytes(b"5 How far is a caf\xe9 ?\n\n4 What city\xf0is it ?\n0 What is an atom ?\n")
    examples = load_task("trec", "test", numbered)
    assert [e.references[0] for e in examples] == ["number", "location", "description"]
    assert [e.input for e in examples[:2]] == [f"{text}\n=>" for text in ORIGINALS["trec"][2]]
    for encoding in ("utf-8", "utf-8-sig"):  # as an editor saves the copy
        numbered.write_text(numbered.read_bytes().decode("latin-1" if encoding == "utf-8" else "utf-8"), encoding)
        assert load_task("trec", "test", numbered) == examples
    listed = tmp_path / "agnews" / "test.json"
    listed.parent.mkdir()
    names = {"science": "Science or Technology", "world": "World"}
    records = [{"sentence": f"{text}\n", "label": names[word]} for text, word in zip(inputs, answers, strict=True)]
    listed.write_text(json.dumps(records))
    assert load_task("agnews", "test", listed) == plain
    listed.write_text(json.dumps([{**records[0], "label": "4"}]))
    with pytest.raises(ptmoe.PtmoeError, match=r"test\.json:1: the label '4' is no choice of agnews"):
        load_task("agnews", "test", listed)


def test_damage_is_named_by_file_and_line(tmp_path):
    for name, text, message in (
        (
            "glue/rte",
            tsv("index|sentence1|sentence2|label", "0|A|B|entailment", "1|A|B"),
            ":3: 3 fields, the header has 4",
        ),
        ("glue/sst2", tsv("sentence|label", "good|1", " |0"), ":3: 'sentence' is empty"),
        ("glue/cola", tsv("gj04|1||A b.", "gj04|1"), ":2: 2 fields, the header has 4"),
        ("agnews", '"1","a","b"\n"1","a"\n', ":2: 2 fields, the header has 3"),
        ("trec", "NUM:date When ?\nNUM:date\n", r":2: 'NUM:date' is no question after a label and a space"),
        ("superglue/wic", json_lines({"word": "a", "sentence1": "b", "label": True}), ":1: lacks the key 'sentence2'"),
    ):
        path = tmp_path / "file"
        path.write_text(text)
        with pytest.raises(ptmoe.PtmoeError, match=f"file{message}"):
            load_task(name, "test", path)
    path.write_text(ORIGINALS["glue/sst2"][1])
    with pytest.raises(ptmoe.PtmoeError, match="looks like SST-2's TSV, and glue/qqp needs QQP's TSV, a list of"):
        load_task("glue/qqp", "test", path)
    with pytest.raises(ptmoe.PtmoeError, match="looks like SST-2's TSV, and glue/cola needs"):
        load_task("glue/cola", "test", path)


# ---- splits ----------------------------------------------------------------------------------------------------------


def numbered_sst2(root, count):
    """As many training records, each input twice, in another case."""
    (root / "SST-2").mkdir(parents=True, exist_ok=True)
    rows = [f"a film number {n // 2}|{n % 2}".replace("film", "Film" if n % 2 else "film") for n in range(count)]
    (root / "SST-2" / "train.tsv").write_text(tsv("sentence|label", *rows))


def test_validation_is_a_tenth_of_train_and_shares_no_input_with_the_rest(tmp_path):
    numbered_sst2(tmp_path, 2000)
    train, validation = (load_task("glue/sst2", split, tmp_path) for split in ("train", "validation"))
    assert len(train) + len(validation) == 2000
    assert 140 < len(validation) < 260
    assert not {folded(e.input) for e in train} & {folded(e.input) for e in validation}
    assert all(is_held_out(e.input.upper()) for e in validation)
    assert {e.id for e in validation}.isdisjoint(e.id for e in train)


def test_problems_in_several_splits_are_left_out_of_the_earlier_ones(tmp_path):
    (tmp_path / "mawps").mkdir()
    splits = {"train": ["A?", "b ?", "C?", "d?"], "valid": ["a?", "e?", "C?"], "test": ["B  ?", "E?"]}
    for number, (split, questions) in enumerate(splits.items()):
        records = [{"iIndex": 10 * number + n, "sQuestion": q, "lSolutions": [n]} for n, q in enumerate(questions)]
        (tmp_path / "mawps" / f"{split}.json").write_text(json.dumps(records))
    said = []
    loaded = {
        split: [e.id for e in load_task("mawps", split, tmp_path, say=said.append)]
        for split in ("train", "validation", "test")
    }
    assert loaded == {"train": ["3"], "validation": ["10", "12"], "test": ["20", "21"]}
    assert said == [
        "mawps, train: left out 3 problem(s) that stand in a later split, too",
        "mawps, validation: left out 1 problem(s) that stand in a later split, too",
    ]
    assert len(load_task("mawps", "train", tmp_path / "mawps" / "train.json")) == 4, "a single file is read as it is"


@pytest.mark.parametrize(("trained", "kept"), [("a", "d"), ("a/mawps/train.json", "bcd"), (None, "d")])
@pytest.mark.parametrize("tested", ["b", "b/mawps/test.json"])
def test_what_is_tested_in_another_place_is_left_out_as_well(trained, kept, tested, tmp_path, monkeypatch):
    for name, questions in {"a/mawps/train": "abcd", "a/mawps/valid": "cAB", "b/mawps/test": "A"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        records = [{"iIndex": q, "sQuestion": f"{q}?", "lSolutions": [1]} for q in questions]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    monkeypatch.setenv("PTMOE_DATA_DIR", str(tmp_path / "a"))
    places = {"data_dir": trained and tmp_path / trained, "eval_data_dir": tmp_path / tested}
    for load in (load_task, stream_task):
        assert "".join(example.id for example in load("mawps", "train", **places)) == kept
    if trained != "a/mawps/train.json":
        assert [example.id for example in load_task("mawps", "validation", **places)] == ["c", "B"]


def test_a_mixture_leaves_out_what_any_of_its_tasks_is_tested_on(tmp_path):
    for task in ("mawps", "asdiv-a", "gsm8k"):
        (tmp_path / task).mkdir()
    for split, questions in {"train": ["a?", "b?"], "test": ["c?"]}.items():
        records = [{"iIndex": n, "sQuestion": q, "lSolutions": [n]} for n, q in enumerate(questions)]
        (tmp_path / "mawps" / f"{split}.json").write_text(json.dumps(records))
    for split, questions in {"train": ["C ?", "d?"], "test": ["A?"]}.items():
        records = [{"@ID": q, "Body": "", "Question": q.replace(" ", ""), "Answer": "1"} for q in questions]
        (tmp_path / "asdiv-a" / f"{split}.json").write_text(json.dumps(records))
    (tmp_path / "gsm8k" / "train.jsonl").write_text(json.dumps({"question": "a?", "answer": "#### 1"}))
    said = []
    found = load_task("mawps,asdiv-a,gsm8k", "train", tmp_path, say=said.append)
    assert {example.id for example in found} == {"mawps:1", "asdiv-a:d?", "gsm8k:train-0"}, (
        "gsm8k is not known to share any"
    )
    assert sorted(said) == [
        f"{task}, train: left out 1 problem(s) that stand in a later split, too" for task in ("asdiv-a", "mawps")
    ]
    assert len(load_task("mawps,asdiv-a", "test", tmp_path)) == 2
    assert len(load_task("mawps", "train", tmp_path)) == len(load_task("asdiv-a", "train", tmp_path)) == 2


def test_asdiv_a_is_a_task_of_its_own(tmp_path):
    record = {"@ID": "nluds-1", "@Grade": "1", "Body": "Two cups.", "Question": "How many?", "Answer": "2 (cups)"}
    path = tmp_path / "test.json"
    path.write_text(json.dumps([record]))
    (example,) = load_task("asdiv-a", "test", path)
    assert (example.id, example.input) == ("nluds-1", "Question: Two cups. How many?\nAnswer:")
    assert ptmoe.score("asdiv-a", ["#### 2"], [example]) == {"accuracy": 100.0}
    with pytest.raises(ptmoe.PtmoeError, match=r"looks like ASDiv-A's JSON.*give it to --task asdiv-a"):
        load_task("asdiv", "test", path)


# ---- mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """A folder with a list of 30 records for each part of the mixture, in both splits; one part has only 10."""
    names = {"no": "False", "yes": "True", "positive": "Good", "negative": "Bad", "science": "Science or Technology"}
    for part in TASKS[MIXTURE].parts:
        labels = ("entailment", "contradiction") if part.endswith("rte") else TASKS[part].labels
        (tmp_path / part.rpartition("/")[2]).mkdir()
        for split in ("train", "test"):
            records = [
                {
                    "sentence": f"{part} {split} {n}",
                    "label": names.get(labels[n % len(labels)], labels[n % len(labels)]),
                }
                for n in range(10 if part == "trec" else 30)
            ]
            (tmp_path / part.rpartition("/")[2] / f"{split}.json").write_text(json.dumps(records))
    return tmp_path


def test_the_mixture_is_one_task_whose_parts_alternate_as_domains(mixed):
    assert task_names(MIXTURE) == [MIXTURE]
    parts = TASKS[MIXTURE].parts
    examples = load_task(MIXTURE, "test", mixed)
    assert Counter(example.domain for example in examples) == {part: 10 if part == "trec" else 30 for part in parts}
    assert all(example.task == example.domain for example in examples)
    assert [example.domain for example in examples[:12]] == [*parts, *parts]
    for size in (6, 7, 59):
        counts = Counter(example.domain for example in load_task(MIXTURE, "test", mixed, max_examples=size))
        assert max(counts.values()) - min(counts.values()) <= 1
    whole = {split: {e.input for e in load_task(MIXTURE, split, mixed)} for split in ("train", "validation")}
    assert whole["train"].isdisjoint(whole["validation"])
    assert len(whole["train"] | whole["validation"]) == 160


def test_a_sample_smaller_than_its_parts_is_refused(mixed):
    for name, least in ((MIXTURE, 6), ("agnews,trec", 2), (f"{MIXTURE},gsm8k", 7)):
        with pytest.raises(
            ptmoe.PtmoeError, match=rf"{least - 1} examples of {name}, which mixes {least} tasks: .*{least}"
        ):
            load_task(name, "test", mixed, max_examples=least - 1)
    with pytest.raises(ptmoe.PtmoeError, match=r"6 tasks \(agnews, .*\) and one file .*: give the folder of them all"):
        load_task(MIXTURE, "test", mixed / "agnews" / "test.json")


def test_choices_need_labels():
    check_labels([TASKS[MIXTURE], TASKS["trec"]])
    with pytest.raises(ptmoe.PtmoeError, match=r"which gsm8k, svamp lacks.*--score answers"):
        check_labels([TASKS["trec"], TASKS["gsm8k"], TASKS["svamp"]])


# ---- macro-F1 --------------------------------------------------------------------------------------------------------


def f1_by_hand(labels, gold, predicted):
    """`sklearn.metrics.f1_score(gold, predicted, labels=labels, average="macro", zero_division=0)`."""
    scores = []
    for label in labels:
        true = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        precision = true / max(1, sum(p == label for p in predicted))
        recall = true / max(1, sum(g == label for g in gold))
        scores.append(2 * precision * recall / (precision + recall) if true else 0.0)
    return 100 * sum(scores) / len(scores)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", "d", "", " a "])), min_size=1))
@pytest.mark.slow
def test_macro_f1_is_the_formula(pairs):
    gold, predicted = [g for g, _ in pairs], [p.strip() for _, p in pairs]
    counts = confusion("abc", [(p, (g,)) for g, p in pairs])
    assert counts.sum() == len(pairs)
    assert float(macro_f1(counts)) == pytest.approx(f1_by_hand("abc", gold, predicted))
    low, high = macro_f1_interval([counts])
    assert 0 <= low <= high <= 100


def test_the_interval_is_the_bootstraps():
    rng = np.random.default_rng(1)
    gold = rng.choice(list("aab"), 80)
    predicted = [g if rng.random() < 0.7 else "b" for g in gold]
    slow = []
    for _ in range(2000):
        drawn = rng.integers(0, 80, 80)
        slow.append(f1_by_hand("ab", [gold[i] for i in drawn], [predicted[i] for i in drawn]))
    fast = macro_f1_interval([confusion("ab", [(p, (g,)) for g, p in zip(gold, predicted, strict=True)])])
    assert fast == pytest.approx(np.quantile(slow, (0.025, 0.975)), abs=1.5)


def test_a_mixtures_macro_f1_is_the_mean_of_its_parts_and_answers_that_are_no_label_are_counted(mixed):
    examples = load_task(MIXTURE, "test", mixed, max_examples=60)
    rng = np.random.default_rng(0)
    texts = [rng.choice([*TASKS[e.domain].labels, "nothing"]) for e in examples]
    summary = summarise(
        TASKS[MIXTURE],
        "test",
        grade(MIXTURE, texts, examples),
        [(text, e.references) for text, e in zip(texts, examples, strict=True)],
        [e.domain for e in examples],
    )
    by_part = []
    for part in TASKS[MIXTURE].parts:
        inside = [n for n, e in enumerate(examples) if e.domain == part]
        gold, predicted = [examples[n].references[0] for n in inside], [texts[n] for n in inside]
        by_part.append(f1_by_hand(TASKS[part].labels, gold, predicted))
        assert summary["by_domain"][part]["macro_f1"] == pytest.approx(by_part[-1])
    assert summary["metrics"]["macro_f1"] == pytest.approx(np.mean(by_part))
    assert summary["mean_of_domains"]["macro_f1"] == pytest.approx(np.mean(by_part))
    assert summary["no_label"] == texts.count("nothing") > 0
    low, high = summary["interval"]["macro_f1"]
    assert low < summary["metrics"]["macro_f1"] < high
    assert ptmoe.score(MIXTURE, texts, examples) == summary["metrics"]
    gold = [e.target for e in examples]
    assert ptmoe.score(MIXTURE, gold, examples)["accuracy"] == 100.0


# ---- the real files --------------------------------------------------------------------------------------------------

REAL = {  # the labels of test, and the sizes of train and validation together
    "agnews": ({"world": 1900, "sports": 1900, "business": 1900, "science": 1900}, 4000),
    "superglue/boolq": ({"yes": 2033, "no": 1237}, 2000),
    "superglue/rte": ({"yes": 146, "no": 131}, 2000),
    "glue/rte": ({"yes": 146, "no": 131}, 2000),
    "glue/sst2": ({"positive": 444, "negative": 428}, 2000),
    "superglue/wic": ({"yes": 319, "no": 319}, 2000),
    "trec": ({"description": 138, "number": 113, "entity": 94, "location": 81, "human": 65, "abbreviation": 9}, 5452),
}


@needs_data
@pytest.mark.parametrize("name", REAL)
@pytest.mark.ci
def test_the_real_files_load_completely_and_their_gold_answers_score_100(name):
    labels, trained = REAL[name]
    loaded = {split: load_task(name, split, DATA / "mixture") for split in ("train", "validation", "test")}
    assert Counter(e.references[0] for e in loaded["test"]) == labels
    assert len(loaded["train"]) + len(loaded["validation"]) == trained
    assert 0.08 * trained < len(loaded["validation"]) < 0.12 * trained
    gold = ptmoe.score(name, [e.target for e in loaded["test"]], loaded["test"])
    assert gold == {"accuracy": 100.0, "macro_f1": 100.0}
    if name == "trec":
        years = [e for e in loaded["train"] if e.input.startswith("When did ")]
        assert years
        assert {e.references[0] for e in years} == {"number"}, "5, not 4, is a number"


@needs_data
def test_the_real_mixture_is_balanced():
    counts = Counter(e.domain for e in load_task(MIXTURE, "train", DATA / "mixture", max_examples=6000))
    assert set(counts.values()) == {1000}


@needs_data
def test_real_word_problems_share_none_between_their_splits():
    for name, sizes in (("mawps", (1556, 198, 199)), ("asdiv-a", (974, 122, 122))):
        loaded = {split: load_task(name, split, DATA) for split in ("train", "validation", "test")}
        assert tuple(map(len, loaded.values())) == sizes
        texts = [{folded(e.input) for e in examples} for examples in loaded.values()]
        assert not texts[0] & (texts[1] | texts[2])
        assert not texts[1] & texts[2]
        gold = ptmoe.score(name, [e.target for e in loaded["test"]], loaded["test"])
        assert gold == {"accuracy": 100.0}
