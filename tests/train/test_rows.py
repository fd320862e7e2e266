"""Tokenised rows and the files that keep them: the same rows from memory, from new files and from old ones."""

import json
import os
import pickle
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import ptmoe
from ptmoe.files import cache_folder
from ptmoe.models.bases import load_tokenizer
from ptmoe.tasks.base import Example
from ptmoe.tasks.tokens import encode_completion, encode_prompt
from ptmoe.train import TrainOptions, train
from ptmoe.train import data as fitting
from ptmoe.train import rows as storing
from ptmoe.train.data import collate, fit
from ptmoe.train.rows import Block


@pytest.fixture
def tokenizer():
    return load_tokenizer("nano")[0]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where tokens are kept; blocks are of few examples."""
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storing, "BLOCK", 400)
    return tmp_path / "cache" / "tokens"


def example(number, words=3):
    text = f"How much is {number} and {words}? " * words
    return Example(f"e{number}", text, f" {number + words}", ("",), "task")


EXAMPLES = [example(number, 1 + number % 5) for number in range(40)]


def listed(rows):
    return [{name: values.tolist() for name, values in row.items()} for row in rows]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def counted(monkeypatch):
    """The ids of the examples that are tokenised from now on."""
    seen = []

    def encode(example, *arguments, **options):
        seen.append(example.id)
        return encode_completion(example, *arguments, **options)

    monkeypatch.setattr(fitting, "encode_completion", encode)
    return seen


# ---- the same rows ---------------------------------------------------------------------------------------------------

SOME_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(SOME_TEXT, SOME_TEXT), min_size=1, max_size=12),
    st.sampled_from(["left_out", "cut"]),
    st.booleans(),
    st.sampled_from([20, 60, 2000]),
)
def test_rows_are_the_same_from_memory_and_from_files_and_those_of_each_example_alone(texts, truncation, chat, length):
    tokenizer = load_tokenizer("nano")[0]
    examples = [Example(str(i), prompt, target, ("",), "task") for i, (prompt, target) in enumerate(texts)]
    expected, left_out, cut = [], 0, 0
    for item in examples:
        prompt, end = encode_prompt(item, tokenizer, chat=chat).ids, encode_completion(item, tokenizer, chat=chat)
        room = length - len(end)
        if len(prompt) > room and (truncation == "left_out" or room <= 0):
            left_out += 1
            continue
        cut += len(prompt) > room
        prompt = prompt[-room:]
        expected.append({"input_ids": prompt + end, "labels": [-100] * len(prompt) + end})
    for cache in (False, True, True):
        if not expected:
            with pytest.raises(ptmoe.PtmoeError, match=f"none of the {left_out} examples fits"):
                fit(examples, tokenizer, length, truncation, chat=chat, cache=cache)
            continue
        rows = fit(iter(examples), tokenizer, length, truncation, chat=chat, cache=cache)
        assert listed(rows) == expected
        assert (rows.cut, rows.left_out) == (cut, left_out)
        assert rows.lengths.tolist() == [len(row["input_ids"]) for row in expected]
        assert len(rows) == len(expected)
        assert all(values.dtype == np.int32 for values in rows[0].values())


def test_rows_are_a_sequence_and_belong_to_whoever_asks(tokenizer):
    fit(EXAMPLES, tokenizer, 2000, cache=True)
    rows = fit(EXAMPLES, tokenizer, 2000, cache=True)
    assert listed([rows[-1]]) == listed([rows[len(rows) - 1]])
    for beyond in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            rows[beyond]
    before = listed(rows)
    for row in rows:
        row["input_ids"][:] = row["labels"][:] = 7
    assert listed(rows) == before


@pytest.mark.slow
def test_training_from_files_is_training_from_memory_to_the_bit_and_tells_of_the_same_bad_records(tmp_path, folder):
    lines = [json.dumps({"prompt": item.input, "completion": item.target}) for item in EXAMPLES]
    lines[3], lines[30] = "{", json.dumps({"prompt": "alone"})
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    method = {"name": "pt-moe", "num_virtual_tokens": 4, "rank": 2, "num_experts": 2}
    chosen = {"data": str(tmp_path / "data.jsonl"), "skip_bad": True, "max_steps": 4, "per_device_train_batch_size": 8}
    adapters, reports = [], []
    for name, cache in (("memory", False), ("new", True), ("old", True)):
        messages = []
        run = TrainOptions(**chosen, method=method, output_dir=str(tmp_path / name), token_cache=cache)
        result = train(run, say=messages.append).result
        adapters.append([path.read_bytes() for path in sorted((tmp_path / name / "adapter").glob("*.safetensors"))])
        reports.append((messages, result.examples))
        assert bool(files(folder)) is cache
    assert adapters[0] == adapters[1] == adapters[2] != []
    assert reports[0] == reports[1] == reports[2]
    assert "data.jsonl:4: not JSON" in reports[0][0][0]
    assert "data.jsonl:31: lacks the key 'completion'" in reports[0][0][0]


# ---- when a file serves ----------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_tokenised_and_nothing_is_written(tokenizer, folder, monkeypatch):
    fit(EXAMPLES, tokenizer, 2000, cache=True)
    written = {path: path.stat().st_ino for path in folder.iterdir()}
    assert len(written) > 5
    seen = counted(monkeypatch)
    # Neither what an example is called nor how the tokenizer was used before is in the tokens.
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    fit([replace(item, id="x", references=("y",)) for item in EXAMPLES], tokenizer, 2000, cache=True)
    assert seen == []
    assert {path: path.stat().st_ino for path in folder.iterdir()} == written


def test_a_tokenizer_is_known_wherever_it_is_loaded_from(tokenizer, folder, tmp_path):
    fit(EXAMPLES, tokenizer, 2000, cache=True)
    before = files(folder)
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = type(tokenizer).from_pretrained(tmp_path / "copy")
    copy.init_kwargs |= {"is_local": False, "local_files_only": True}  # as from the Hub, offline
    fit(EXAMPLES, copy, 2000, cache=True)
    assert files(folder) == before


def test_more_examples_add_blocks_to_those_that_are_there(tokenizer, monkeypatch):
    fit(EXAMPLES[:30], tokenizer, 2000, cache=True)
    seen = counted(monkeypatch)
    more = fit(EXAMPLES, tokenizer, 2000, cache=True)
    assert {item.id for item in EXAMPLES[30:]} <= set(seen) <= {item.id for item in EXAMPLES[24:]}
    assert listed(more) == listed(fit(EXAMPLES, tokenizer, 2000))


def test_small_data_makes_no_file(tokenizer, folder):
    assert len(fit(EXAMPLES[:2], tokenizer, 2000, cache=True)) == 2
    assert not folder.exists()


CHAT = ({"role": "user", "content": "What is in the box? " * 20},)
ONE = Example("1", "A box holds a key. " * 30, " a key", ("",), "task", context=(0, 200), answer=(14, 17))
CHANGES = {
    "input": replace(ONE, input=ONE.input + "!"),
    "target": replace(ONE, target=" two keys"),
    "context": replace(ONE, context=(0, 199)),
    "answer": replace(ONE, answer=None),
    "messages": replace(ONE, messages=CHAT),
    "border of input and target": replace(ONE, input=ONE.input + " a", target=" key"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_example_that_is_another_has_another_file(what, tokenizer, folder):
    for changed in (ONE, CHANGES[what], replace(CHANGES[what], id="2")):
        fit([changed], tokenizer, 2000, cache=True)
    assert len(files(folder)) == 2


def test_a_conversation_whose_parts_are_others_has_another_file(tokenizer, folder):
    for role in ("user", "system"):
        fit([replace(ONE, messages=({**CHAT[0], "role": role},))], tokenizer, 2000, cache=True)
    assert len(files(folder)) == 2


def changed_source(tokenizer, monkeypatch):
    read = storing.inspect.getsource
    monkeypatch.setattr(storing.inspect, "getsource", lambda code: read(code) + "# another version")


TOKENIZERS = {
    "a token more": lambda tokenizer, _: tokenizer.add_tokens(["key. A"]),
    "the end token": lambda tokenizer, _: setattr(tokenizer, "eos_token", "a"),
    "the chat template": lambda tokenizer, _: setattr(tokenizer, "chat_template", tokenizer.chat_template + " "),
    "another transformers": lambda _, monkeypatch: monkeypatch.setattr(storing.transformers, "__version__", "0"),
    "other code": changed_source,
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_tokenizer_that_is_another_has_other_files(what, tokenizer, folder, monkeypatch):
    fit([ONE], tokenizer, 2000, cache=True)
    TOKENIZERS[what](tokenizer, monkeypatch)
    again = fit([ONE], tokenizer, 2000, cache=True)
    assert len(files(folder)) == 2
    assert listed(again) == listed(fit([ONE], tokenizer, 2000))


def test_every_option_has_its_own_files(tokenizer, folder):
    for options in ({}, {"max_length": 1999}, {"truncation": "cut"}, {"chat": True}):
        fit([ONE], tokenizer, **({"max_length": 2000} | options), cache=True)
    assert len(files(folder)) == 4


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
@pytest.mark.slow
def test_a_file_cut_short_or_with_a_changed_byte_is_noticed_and_made_again(data):
    folder = cache_folder() / "tokens"
    tokenizer = load_tokenizer("nano")[0]
    expected = listed(fit(EXAMPLES, tokenizer, 2000, cache=True))
    before = files(folder)
    name = data.draw(st.sampled_from(sorted(before)))
    content = before[name]
    place = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from(["cut", "changed", "zeros", "longer"]))
    damaged = {
        "cut": content[:place],
        "changed": content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :],
        "zeros": bytes(len(content)),
        "longer": content + bytes(1 + place % 8),
    }[damage]
    # As a fault of the disk would, but not in the file that is mapped.
    (folder / "damaged").write_bytes(damaged)
    (folder / "damaged").rename(folder / name)
    assert Block.read(folder / name) is None
    assert listed(fit(EXAMPLES, tokenizer, 2000, cache=True)) == expected
    assert files(folder) == before


@pytest.mark.parametrize("at", ["tofile", "replace"])
def test_a_run_killed_while_it_writes_leaves_nothing_that_is_trusted(at, tokenizer, folder, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    class Numbers(np.ndarray):
        def tofile(self, path):
            Path(path).write_bytes(self.tobytes()[:100])
            killed()

    class KilledBlock(Block):
        def write(self, path):
            self.numbers = self.numbers.view(Numbers)
            super().write(path)

    with monkeypatch.context() as patched:
        if at == "replace":
            patched.setattr(Path, "replace", killed)
        else:
            patched.setattr(storing, "Block", KilledBlock)
        with pytest.raises(KeyboardInterrupt):
            fit(EXAMPLES, tokenizer, 2000, cache=True)
    assert files(folder) == {}
    assert listed(fit(EXAMPLES, tokenizer, 2000, cache=True)) == listed(fit(EXAMPLES, tokenizer, 2000))


def test_what_a_run_could_not_clear_away_is_not_read(tokenizer, folder):
    fit(EXAMPLES, tokenizer, 2000, cache=True)
    before = files(folder)
    for path in list(folder.iterdir()):
        path.rename(path.with_name(f"{path.name}.0123.part"))
    fit(EXAMPLES, tokenizer, 2000, cache=True)
    assert {name: content for name, content in files(folder).items() if not name.endswith(".part")} == before


def test_several_may_write_the_same_file_while_others_read_it(tokenizer, folder):
    block = Block.of((encode_prompt(item, tokenizer), encode_completion(item, tokenizer)) for item in EXAMPLES)
    path, stop, found = folder / "one.tokens", threading.Event(), []
    block.write(path)

    def read():
        while not stop.is_set():
            found.append(Block.read(path) is not None)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=lambda: [block.write(path) for _ in range(50)]) for _ in range(4)]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert found
    assert all(found)
    assert files(folder) == {path.name: block.numbers.tobytes()}


def test_a_folder_that_cannot_be_written_is_reported_once_and_rows_stay_in_memory(tokenizer, folder, monkeypatch):
    expected = listed(fit(EXAMPLES, tokenizer, 2000))
    folder.parent.write_text("a file, not a folder")
    messages, seen = [], counted(monkeypatch)
    rows = fit(EXAMPLES, tokenizer, 2000, cache=True, say=messages.append)
    assert listed(rows) == expected
    assert len(messages) == 1
    assert str(folder) in messages[0]
    assert seen == [item.id for item in EXAMPLES], "each once"


def test_a_tokenizer_that_cannot_be_saved_trains_without_files(tokenizer, folder, monkeypatch):
    def unable(folder):
        raise NotImplementedError("no vocabulary file")

    expected, messages = listed(fit(EXAMPLES, tokenizer, 2000)), []
    monkeypatch.setattr(tokenizer, "save_pretrained", unable)
    assert listed(fit(EXAMPLES, tokenizer, 2000, cache=True, say=messages.append)) == expected
    assert len(messages) == 1
    assert "TokenizersBackend cannot be saved: no vocabulary file" in messages[0]
    assert files(folder) == {}


def test_a_bad_example_is_refused_each_time(tokenizer, folder):
    tokenizer.chat_template = "{{ messages | length }}"
    for _ in range(2):
        with pytest.raises(ptmoe.PtmoeError, match="chat template"):
            fit(EXAMPLES, tokenizer, 2000, chat=True, cache=True)
    assert files(folder) == {}


# ---- what it takes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tokenizer, monkeypatch):
    monkeypatch.setattr(storing, "BLOCK", 20_000)

    def peak(count, first, cache=True):
        examples = (example(first + number, 60) for number in range(count))
        tracemalloc.start()
        rows = fit(examples, tokenizer, 2000, cache=cache)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(rows) == count
        return used

    peak(60, 1000)  # what is imported and compiled once
    new = peak(60, 2000), peak(600, 3000)
    old = peak(60, 2000), peak(600, 3000)
    tokens = 4 * fit([example(3000, 60)], tokenizer, 2000).lengths.sum() * 540
    for small, large in (new, old):
        assert large - small < tokens / 20
    assert peak(600, 3000, cache=False) - new[0] > tokens / 2


def test_files_are_mapped_and_none_is_kept_open(tokenizer, folder):
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    fit(EXAMPLES, tokenizer, 2000, cache=True)
    before = len(os.listdir("/proc/self/fd"))
    rows = fit(EXAMPLES, tokenizer, 2000, cache=True)
    assert len(os.listdir("/proc/self/fd")) == before
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert {str(folder / name) for name in files(folder)} <= mapped
    assert len(rows) == 40


def test_a_data_loaders_workers_share_the_files(tokenizer, folder):
    rows = fit(EXAMPLES, tokenizer, 2000, cache=True)
    alone = [collate([row]) for row in rows]
    for number, batch in enumerate(DataLoader(rows, batch_size=1, num_workers=2, collate_fn=collate)):
        assert all(batch[name].equal(alone[number][name]) for name in batch)
    sent = pickle.dumps(rows)
    assert len(sent) < sum(map(len, files(folder).values())) / 2, "names of files, not their tokens"
    assert listed(pickle.loads(sent)) == listed(rows)
    for path in folder.iterdir():
        path.unlink()
    assert listed(pickle.loads(pickle.dumps(rows))) == listed(rows)


def test_the_files_used_least_recently_make_room_and_nothing_else_does(tokenizer, folder, monkeypatch):
    for age, word in ((300, "old"), (200, "used"), (100, "new")):
        fit([replace(item, input=word + item.input) for item in EXAMPLES], tokenizer, 2000, cache=True)
        for path in folder.iterdir():
            if path.stat().st_mtime > 1e9:
                os.utime(path, (1e9 - age, 1e9 - age))
    (folder / "notes.txt").write_text("not ours")
    os.utime(folder / "notes.txt", (0, 0))
    ages = {path: path.stat().st_mtime for path in folder.iterdir()}
    fit([replace(item, input="used" + item.input) for item in EXAMPLES], tokenizer, 2000, cache=True)
    monkeypatch.setattr(storing, "LIMIT", sum(path.stat().st_size for path in folder.glob("*.tokens")) * 3 // 4)
    own = fit(EXAMPLES, tokenizer, 2000, cache=True)
    gone = {age for path, age in ages.items() if not path.exists()}
    assert {1e9 - 300} <= gone <= {1e9 - 300, 1e9 - 100}, "neither what is no file of tokens, nor what was used since"
    assert sum(path.stat().st_size for path in folder.glob("*.tokens")) <= storing.LIMIT
    monkeypatch.setattr(storing, "LIMIT", 0)
    rows = fit([*EXAMPLES, *EXAMPLES[::-1]], tokenizer, 2000, cache=True)
    assert len(list(folder.glob("*.tokens"))) == len({block.path for block in rows._blocks}), "only its own"
    assert listed(own) == listed(rows)[:40], "files removed while they are mapped"
