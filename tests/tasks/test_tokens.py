"""The tokens say what the user wrote: with tokenizers of every habit, and in every chat template that trl ships."""

import datetime
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as rendering
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import ptmoe
from ptmoe.models.bases import load_tokenizer
from ptmoe.tasks import Problems
from ptmoe.tasks.base import Example
from ptmoe.tasks.problems import BadRecordError
from ptmoe.tasks.tokens import changed_text, encode_completion, encode_prompt, prompt_text, token_texts, usable
from ptmoe.train.data import fit


def example(prompt, completion, **fields):
    return Example("1", prompt, completion, ("",), "task", **fields)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---- the user's text -------------------------------------------------------------------------------------------------


def wrapped(inner, end=False):
    """With what Llama's tokenizers put before a text and, where `end`, T5's behind it."""
    single = "<s> $A </s>" if end else "<s> $A"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def pieces(space):
    """Letters, some words, and bytes for everything else."""
    words = [f"{space}a", f"{space}the", "the", "12", f"{space}12", *"abcdefghijklmnopqrstuvwxyz0123456789=>:?.", space]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -5.0) for piece in words + bytes_)]


def sentencepiece(scheme):
    """As Llama 2 and Mistral: a space before every text (`always`), or before the first (`first`), or none."""
    inner = Tokenizer(models.Unigram(pieces("▁"), unk_id=0, byte_fallback=True))
    if scheme == "normalizer":  # as they were converted at first
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    inner.decoder = decoders.Sequence(parts)
    return inner


def byte_level(add_prefix_space):
    """As GPT-2 and RoBERTa."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    inner.decoder = decoders.ByteLevel()
    return inner


TOKENIZERS = {
    "nano": load_tokenizer("nano")[0],
    "bytes": wrapped(byte_level(False)),
    "bytes with a space": wrapped(byte_level(True)),
    "bytes with an end": wrapped(byte_level(False), end=True),
    **{f"pieces, {scheme}": wrapped(sentencepiece(scheme)) for scheme in ("always", "first", "never", "normalizer")},
    "pieces with an end": wrapped(sentencepiece("always"), end=True),
}
TEXTS = st.text(st.sampled_from("a b5=>\n.é中12 :"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60)
@given(TEXTS, TEXTS, st.sampled_from(sorted(TOKENIZERS)))
def test_prompt_and_completion_are_the_text_that_was_written(prompt, completion, name):
    tokenizer = TOKENIZERS[name]
    asked = encode_prompt(example(prompt, completion), tokenizer).ids
    begin = [tokenizer.bos_token_id] * (name != "nano")
    assert asked[: len(begin)] == begin
    answer = encode_completion(example(prompt, completion), tokenizer)
    assert answer[-1] == tokenizer.eos_token_id
    assert answer.count(tokenizer.eos_token_id) == 1
    whole = decoded(tokenizer, asked[len(begin) :] + answer[:-1])
    # Whether a text begins with a space is what a tokenizer that adds one cannot say.
    assert prompt + completion in (whole, f" {whole}", whole.removeprefix(" "))
    assert changed_text([example(prompt, completion)], tokenizer) == ""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_that_the_prompt_holds_are_there_once(name):
    tokenizer = TOKENIZERS[name]
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    ids = encode_prompt(example(f"a.{end}", " b"), tokenizer).ids
    assert ids[-1] == tokenizer.eos_token_id, "it is the user's, not one that the tokenizer puts behind every text"
    assert encode_completion(example("a", f" b{end}"), tokenizer).count(tokenizer.eos_token_id) == 1
    if begin:
        ids = encode_prompt(example(f"{begin} a", "b"), tokenizer).ids
        assert ids.count(tokenizer.bos_token_id) == 1
        assert encode_prompt(example("a", "b"), tokenizer).ids.count(tokenizer.bos_token_id) == 1


def test_a_context_is_cut_behind_the_beginning_of_the_text():
    tokenizer = TOKENIZERS["pieces, always"]
    item = example("the the the the 12?", " a", context=(0, 15))
    whole = encode_prompt(item, tokenizer).ids
    cut = encode_prompt(item, tokenizer, room=len(whole) - 2)
    assert cut.ids == whole[:3] + whole[5:]
    assert (cut.cut, cut.context) == ((0, 2), (1, 3))


def lossy(normalizer):
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4}, "<unk>"))
    inner.normalizer = normalizer
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrapped(inner)


@pytest.mark.parametrize(
    ("prompt", "completion", "shown"),
    [("One", " two", "'One two' becomes 'one two'"), ("one", "two", "'onetwo' becomes 'one two'"),
     ("one\n", "two", "becomes 'one two'"), ("one", " three", "becomes 'one <unk>'")],
)  # fmt: skip
def test_a_tokenizer_that_changes_texts_is_named_once(prompt, completion, shown):
    tokenizer = lossy(normalizers.Lowercase())
    messages = []
    rows = fit([example(prompt, completion)] * 3, tokenizer, 100, say=messages.append)
    assert len(rows) == 3
    assert len(messages) == 1
    assert shown in messages[0]
    assert changed_text([example("one", " two")], tokenizer) == ""


def test_each_token_is_shown_with_its_spaces():
    for name, shown in {
        "pieces, always": "'▁a' '=' ' 12' '\\n' ‹</s>›",
        "bytes": "'a' '=' ' ' '1' '2' '\\n' ‹</s>›",
    }.items():
        tokenizer = TOKENIZERS[name]
        item = example("a=", " 12\n")
        ids = encode_prompt(item, tokenizer).ids[1:] + encode_completion(item, tokenizer)
        assert " ".join(token_texts(ids, tokenizer)).replace("' a'", "'▁a'") == shown
    assert token_texts(TOKENIZERS["bytes"]("é")["input_ids"][1:2], TOKENIZERS["bytes"]) == ["'Ã'"], "part of a letter"


@pytest.mark.parametrize("half", ["\ud83d", "smile \ude00"])
def test_half_a_character_is_refused_before_a_tokenizer_sees_it(half):
    tokenizer = TOKENIZERS["nano"]
    with pytest.raises(BadRecordError, match=r"not Unicode text: \\ud"):
        encode_prompt(example(half, "b"), tokenizer)
    with pytest.raises(BadRecordError, match="not Unicode text"):
        encode_completion(example("a", half), tokenizer)


# ---- chat templates --------------------------------------------------------------------------------------------------

FOLDER = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
TURNS = (
    {"role": "user", "content": "2 and 2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3?"},
)
SYSTEM = {"role": "system", "content": "Be terse."}
TOOL = {
    "type": "function",
    "function": {"name": "adder", "description": "adds", "parameters": {"type": "object", "properties": {}}},
}
REASONING = {"reasoning_content": "four and three"}


CALLED = {"type": "function", "function": {"name": "adder", "arguments": {}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [CALLED]}
SAID = {"role": "tool", "content": '{"sum": "7"}', "name": "adder"}


def with_template(name):
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    tokenizer.bos_token = tokenizer.eos_token  # some templates need one, and nano has none
    return tokenizer


def clock(monkeypatch, *day):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(*day)

    monkeypatch.setattr(rendering, "datetime", Clock)


def rendered(tokenizer, messages, **options):
    """What the template itself writes, of texts and of texts in parts, as templates of vision models want them."""
    in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    texts = []
    for form in (list(messages), in_parts):
        with suppress(Exception):
            texts.append(tokenizer.apply_chat_template(form, **options))
    return texts


CONVERSATIONS = {
    "short": example("", "Seven.", messages=TURNS[:1]),
    "with earlier turns": example("", "Seven.", messages=TURNS),
    "with a system turn": example("", "Seven.", messages=(SYSTEM, *TURNS)),
    "with reasoning": example("", "Seven.", messages=TURNS, reply=REASONING),
    "with tools": example("", "Seven.", messages=TURNS, template={"tools": [TOOL]}),
    "with a tool's answer": example("", "Seven.", messages=(*TURNS, CALL, SAID), template={"tools": [TOOL]}),
    "two in a row": example("", "Seven.", messages=(TURNS[0], *TURNS)),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_what_its_template_writes_or_is_refused(name, monkeypatch):
    tokenizer = with_template(name)
    outcomes = {}
    for kind, item in CONVERSATIONS.items():
        clock(monkeypatch, 2031, 1, 2)
        try:
            ids = encode_prompt(item, tokenizer).ids, encode_completion(item, tokenizer)
        except BadRecordError as error:
            outcomes[kind] = str(error)
            continue
        clock(monkeypatch, 2024, 7, 26)
        answer = {"role": "assistant", "content": item.target, **item.reply}
        options = {"tokenize": False, "date_string": "26 Jul 2024", **item.template}
        written = rendered(tokenizer, item.messages, add_generation_prompt=True, **options)
        assert decoded(tokenizer, ids[0]) in written, kind
        whole = decoded(tokenizer, ids[0] + ids[1]).removesuffix(tokenizer.eos_token)
        written = rendered(tokenizer, [*item.messages, answer], **options)
        assert whole in [text.removesuffix(tokenizer.eos_token) for text in written]
        said = decoded(tokenizer, ids[0] + ids[1])
        texts = [turn["content"] for turn in item.messages if turn["content"] and turn["role"] != "tool"]
        for part in texts + list(item.reply.values()) + [item.target]:
            assert part in said, (kind, part)
        assert ("adder" in said) is ("tool" in kind)
        assert SAID not in item.messages or SAID["content"] in said.replace('\\"', '"')
        outcomes[kind] = said
    assert "Seven." in outcomes["short"] or "differently with and without its last answer" in outcomes["short"]
    assert all(outcome for outcome in outcomes.values())


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_day_changes_no_prompt(name, monkeypatch):
    tokenizer, texts = with_template(name), []
    for day in ((2024, 7, 26), (2031, 1, 2), (2031, 12, 31)):
        clock(monkeypatch, *day)
        texts.append(prompt_text(CONVERSATIONS["short"], tokenizer))
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d %b %Y", "%B %-d, %Y", "%A %H:%M", "%x", "%j/%y", "no date"])
def test_the_clock_of_a_template_stands_at_one_day_in_every_format(form):
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = "\n  {{ strftime_now('FORM') }}|{{ messages[0].content }}".replace("FORM", form)
    expected = datetime.datetime(2024, 7, 26).strftime(form)
    assert prompt_text(CONVERSATIONS["short"], tokenizer) == f"\n  {expected}|2 and 2?"


ECHO = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{% for m in messages %}{{ m.role }}: "
    "{{ m.reasoning_content }}|{{ m.content }}|{{ m.name }}|{{ m.tool_calls }}|{{ extra }}\n{% endfor %}"
)


def test_everything_that_a_line_gives_reaches_the_template(tmp_path):
    import json

    calls = [{"type": "function", "function": {"name": "adder", "arguments": {"a": 1.50}}}]
    record = {
        "messages": [
            {"role": "user", "content": "2?", "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "Four.", "reasoning_content": "I asked."},
        ],
        "tools": [TOOL],
        "chat_template_kwargs": {"extra": "more"},
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = ECHO
    (item,) = ptmoe.load_task(str(tmp_path / "d.jsonl"))
    prompt = decoded(tokenizer, encode_prompt(item, tokenizer).ids)
    assert prompt.startswith("<adder>user: |2?|Ann||more\nassistant: ||")
    assert "'arguments': {'a': 1.5}" in prompt
    assert decoded(tokenizer, encode_completion(item, tokenizer)[:-1]) == "assistant: I asked.|Four.|||more\n"


@pytest.mark.parametrize(
    ("part", "fields"),
    [("'reasoning'", {"reply": {"reasoning": "so"}}), ("'tool_calls'", {"reply": {"tool_calls": [TOOL]}}),
     ("'tools'", {"template": {"tools": [TOOL]}})],
)  # fmt: skip
def test_what_the_template_leaves_out_is_refused_in_words(part, fields):
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    item = replace(CONVERSATIONS["short"], **fields)
    with pytest.raises(BadRecordError, match=f"the chat template leaves out {part}"):
        encode_completion(item, tokenizer)


def test_a_template_that_leaves_out_a_text_is_refused():
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.text }}\n{% endfor %}"
    with pytest.raises(BadRecordError, match="the chat template leaves out what a message says"):
        encode_prompt(CONVERSATIONS["short"], tokenizer)


@pytest.mark.parametrize("left_out", ["user", "assistant", "system", "tool", "calls"])
def test_a_template_that_leaves_out_an_earlier_turn_is_refused(left_out):
    tokenizer = load_tokenizer("nano")[0]
    whole = "{{ m.role }}: {{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}\n"
    if left_out == "calls":
        whole = "{{ m.role }}: {{ m.content }}\n"
    earlier = "loop.last or m.tool_calls or m.role != " + repr(left_out)
    tokenizer.chat_template = f"{{% for m in messages %}}{{% if {earlier} %}}{whole}{{% endif %}}{{% endfor %}}"
    item = example("", "Seven.", messages=(SYSTEM, *TURNS, CALL, SAID, TURNS[0]))
    with pytest.raises(BadRecordError, match="the chat template leaves out what a message says"):
        encode_prompt(item, tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(earlier, "true").replace("}}\n", "}}{{ m.tool_calls }}\n")
    assert "adder" in decoded(tokenizer, encode_prompt(item, tokenizer).ids)


REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{{ m.content }}\n{% endfor %}"
)


def test_what_a_template_refuses_is_named_by_file_and_line_or_skipped(tmp_path):
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = REFUSING
    good, bad = CONVERSATIONS["short"], replace(CONVERSATIONS["with a system turn"], place="d.jsonl:2")
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:2: the chat template refuses it: no system turns"):
        fit([good, bad], tokenizer, 100)
    problems = Problems(skip=True)
    for cache in (True, True, False):
        assert len(fit([good, bad, good], tokenizer, 100, cache=cache, problems=problems)) == 2
    assert problems.count == 3, "a file of tokens that lacks an example would hide it"
    with pytest.raises(ptmoe.PtmoeError, match=r"no example is left: .*\n.*d\.jsonl:2"):
        fit([bad], tokenizer, 100, problems=Problems(skip=True))
    assert usable([good, bad], tokenizer, Problems(skip=True)) == [good]
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:2: the chat template refuses it"):
        usable([good, bad], tokenizer, Problems())


@pytest.mark.parametrize("broken", ["{% for %}", "{{ messages[0].content + 1 }}", "{{ messages.x.y }}"])
def test_a_template_that_fails_is_no_traceback(broken):
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = broken
    with pytest.raises(BadRecordError, match="the chat template refuses it: "):
        encode_prompt(CONVERSATIONS["short"], tokenizer)
