"""The tokens say what the user wrote: with tokenizers of every habit, and in every chat template that trl ships."""

import datetime
import re
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as rendering
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import ptmoe
from ptmoe.models.bases import load_base, load_tokenizer
from ptmoe.tasks import Problems
from ptmoe.tasks.base import Example
from ptmoe.tasks.problems import BadRecordError
from ptmoe.tasks.tokens import TextCheck, encode_completion, encode_prompt, prompt_text, token_texts, usable
from ptmoe.train.data import fit


def example(prompt, completion, **fields):
    return Example("1", prompt, completion, ("",), "task", **fields)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_a_tokenizer_that_is_told_otherwise_is_asked_again():
    tokenizer = load_tokenizer("nano")[0]
    without = encode_prompt(example("the baker", " is"), tokenizer).ids
    tokenizer.add_bos_token = True
    if tokenizer("the baker")["input_ids"] == without:  # where the class has no such switch
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
        )
    assert encode_prompt(example("the baker", " is"), tokenizer).ids == tokenizer("the baker")["input_ids"] != without


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
    assert TextCheck(tokenizer).look(example(prompt, completion)) == ""


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
    assert TextCheck(tokenizer).look(example("one", " two")) == ""


def test_a_tokenizer_without_an_end_token_is_said_once():
    tokenizer = lossy(normalizers.NFC())
    tokenizer.eos_token = None
    messages = []
    rows = fit([example("one", " two")] * 3, tokenizer, 100, say=messages.append)
    assert [label for label in rows[0]["labels"].tolist() if label != -100] == [4]
    assert len(messages) == 1
    assert "has no end token" in messages[0]


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


@pytest.fixture
def unresized(tmp_path):
    """A base whose tokenizer got a token that the base has no embedding of."""
    base, tokenizer = load_base("nano")
    tokenizer.add_tokens(["<new>"])
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(("prompt", "completion"), [("a <new> b", "c"), ("a b", "<new>")])
def test_a_token_that_the_base_does_not_embed_is_refused_by_its_record_or_skipped(prompt, completion, unresized):
    _, tokenizer = load_base(str(unresized))
    examples = [example("a b", "c"), example(prompt, completion, place="data.jsonl:2")]
    with pytest.raises(ptmoe.PtmoeError, match=r"data\.jsonl:2: '<new>': token (\d+) has no embedding, .* has \1:"):
        fit(examples, tokenizer, 50)
    assert len(fit(examples, tokenizer, 50, problems=Problems(skip=True))) == 1
    if "<new>" in prompt:
        assert usable(examples, tokenizer, Problems(skip=True)) == examples[:1]
        with pytest.raises(ptmoe.PtmoeError, match="'<new>': token"):
            usable(examples, tokenizer, Problems())


def test_where_the_base_was_resized_the_token_is_read(unresized):
    base, tokenizer = load_base(str(unresized))
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(unresized)
    _, tokenizer = load_base(str(unresized))
    assert encode_prompt(example("<new>", "c"), tokenizer).ids[-1] == len(tokenizer) - 1


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
@pytest.mark.ci
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
@pytest.mark.ci
def test_the_day_changes_no_prompt(name, monkeypatch):
    tokenizer, texts = with_template(name), []
    for day in ((2024, 7, 26), (2031, 1, 2), (2031, 12, 31)):
        clock(monkeypatch, *day)
        texts.append(prompt_text(CONVERSATIONS["short"], tokenizer))
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d %b %Y", "%B %-d, %Y", "%A %H:%M", "%x", "%j/%y", "no date"])
@pytest.mark.ci
def test_the_clock_of_a_template_stands_at_one_day_in_every_format(form):
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = "\n  {{ strftime_now('FORM') }}|{{ messages[0].content }}".replace("FORM", form)
    expected = datetime.datetime(2024, 7, 26).strftime(form)
    assert prompt_text(CONVERSATIONS["short"], tokenizer) == f"\n  {expected}|2 and 2?"


def test_a_template_that_a_line_brings_with_it_has_the_same_clock():
    tokenizer = load_tokenizer("nano")[0]
    options = {"chat_template": "{{ strftime_now('%Y-%m-%d') }}|{{ messages[0].content }}"}
    item = example("", "7", messages=TURNS[:1], template={"chat_template_kwargs": options})
    assert prompt_text(item, tokenizer).startswith("2024-07-26|")
    options |= {"chat_template": "{{ date_string }}|{{ messages[0].content }}", "date_string": "1 May 2001"}
    assert prompt_text(item, tokenizer).startswith("1 May 2001|")


ECHO = (
    "{% for t in tools or [] %}<{{ t.function.name }} {{ t.function.description }}>{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }}|{{ m.content }}|{{ m.name }}|{{ m.tool_calls }}|"
    "{{ extra }}\n{% endfor %}"
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
    assert prompt.startswith("<adder adds>user: |2?|Ann||more\nassistant: ||")
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
    what = "'tool_calls'" if left_out == "calls" else "what a message says"
    with pytest.raises(BadRecordError, match=f"the chat template leaves out {what}"):
        encode_prompt(item, tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(earlier, "true").replace("}}\n", "}}{{ m.tool_calls }}\n")
    assert "adder" in decoded(tokenizer, encode_prompt(item, tokenizer).ids)


CALLS = [
    {
        "id": "1",
        "type": "function",
        "function": {"name": "adder", "arguments": {"first": "onyx", "deep": [{"er": 4711}]}},
    },
    {"id": "2", "type": "function", "function": {"name": "adder", "arguments": {"id": "opal"}}},
]
DEEP = {"type": "object", "properties": {"x": {"type": "integer", "description": "slate", "minimum": 3}}}
TOOLS = [{"type": "function", "function": {"name": n, "description": d, "parameters": DEEP}} for n, d in ("ab", "cd")]
DOCUMENTS = [{"title": "basalt", "text": "marble"}, {"title": "granite", "text": "gneiss", "year": 1789}]
# What a line may give beside roles and texts, the words that show that a template has written it, and a template's way.
PARTS = {
    "tools": ("slate", "{{ tools | tojson }}"),
    "documents": ("basalt marble granite gneiss 1789", "{{ documents | tojson }}"),
    "tool_calls": ("onyx 4711 opal", "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"),
    "name": ("Ann", "{% for m in messages %}{{ m.name }}{% endfor %}"),
    "weight": ("0.25", "{% for m in messages %}{{ m.weight }}{% endfor %}"),
    "reasoning": ("jasper", "{{ m.reasoning }}"),
    "level": ("high", "{{ level }}"),
}


def with_parts(names):
    """A conversation that holds these, in its prompt; reasoning and, with it, calls in the answer."""
    first = {"role": "user", "content": "2 and 2?"}
    first |= {"name": "Ann"} if "name" in names else {}
    first |= {"weight": 0.25} if "weight" in names else {}
    turns = [first]
    if "tool_calls" in names:
        turns += [{"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "Seven."}]
    template = {"tools": TOOLS} if "tools" in names else {}
    template |= {"documents": DOCUMENTS} if "documents" in names else {}
    template |= {"chat_template_kwargs": {"level": "high"}} if "level" in names else {}
    reply = {"reasoning": "jasper"} if "reasoning" in names else {}
    return example("", "Seven.", messages=tuple(turns), template=template, reply=reply)


@settings(max_examples=150)
@given(st.sets(st.sampled_from(sorted(PARTS))), st.sets(st.sampled_from(sorted(PARTS))))
@pytest.mark.ci
def test_every_part_of_a_line_is_written_or_the_line_is_refused_in_training_and_in_evaluation(gives, writes):
    """Any parts of a line, with a template that writes any parts."""
    tokenizer, item = load_tokenizer("nano")[0], with_parts(gives)
    before = "".join(PARTS[name][1] for name in sorted(writes - {"reasoning"}))
    inside = PARTS["reasoning"][1] if "reasoning" in writes else ""
    tokenizer.chat_template = (
        f"{before}{{% for m in messages %}}{{{{ m.role }}}}: {inside}{{{{ m.content }}}}\n{{% endfor %}}"
    )
    lost = gives - writes - {"reasoning"}  # an answer that is not shown has nothing to lose
    if lost:
        with pytest.raises(ptmoe.PtmoeError, match="leaves out") as error:
            usable([item], tokenizer, Problems())
        assert named(error.value) == lost
    else:
        assert usable([item], tokenizer, Problems()) == [item]
    if gives <= writes:
        text = decoded(tokenizer, encode_prompt(item, tokenizer).ids + encode_completion(item, tokenizer))
        assert all(word in text for name in gives for word in PARTS[name][0].split())
        return
    with pytest.raises(BadRecordError, match="leaves out") as error:
        encode_completion(item, tokenizer)
    assert named(error.value) == gives - writes


def named(error):
    return set(re.findall(r"'(\w+)'", str(error).partition("leaves out")[2].partition(": remove")[0]))


@pytest.mark.ci
def test_every_template_writes_a_part_or_the_line_is_refused():
    """Over the templates that trl ships: none drops it without a word."""
    taken = set()
    for name, part in product(TEMPLATES, sorted(PARTS.keys() - {"level"})):
        tokenizer, item = with_template(name), with_parts({part})
        with suppress(BadRecordError):
            text = decoded(tokenizer, encode_prompt(item, tokenizer).ids + encode_completion(item, tokenizer))
            assert all(word in text for word in PARTS[part][0].split()), (name, part)
            taken.add(part)
    assert taken == {"reasoning", "tools", "tool_calls"}


@pytest.mark.parametrize(
    ("template", "lost"),
    [("{{ m.tool_calls[0] | tojson if m.tool_calls }}", "'tool_calls.function.arguments.id'"),
     ("{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}", "'tool_calls.function.arguments.first'"),
     ("{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}", "'tool_calls.function.name'")],
)  # fmt: skip
def test_a_part_of_a_part_that_is_left_out_is_named(template, lost):
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content }}}}{template}\n{{% endfor %}}"
    )
    with pytest.raises(BadRecordError, match=f"the chat template leaves out .*{lost}"):
        encode_prompt(with_parts({"tool_calls"}), tokenizer)


def test_the_reasoning_of_earlier_answers_may_be_left_out_where_the_last_ones_is_written():
    turns = (TURNS[0], {**TURNS[1], "reasoning": "jasper"}, TURNS[2])
    tokenizer, item = load_tokenizer("nano")[0], example("", "Seven.", messages=turns)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.reasoning if loop.last }}{{ m.content }}\n{% endfor %}"
    )
    assert "jasper" not in decoded(tokenizer, encode_prompt(item, tokenizer).ids)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(BadRecordError, match="the chat template leaves out 'reasoning'"):
        encode_prompt(item, tokenizer)


PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@settings(max_examples=60)
@given(TEXTS, st.text(st.sampled_from("a5 \n\t"), min_size=1, max_size=8).filter(str.strip))
def test_in_a_template_a_prompt_and_a_completion_are_what_was_written(prompt, completion):
    """But for one space between the two, which a conversation does not need."""
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = PLAIN
    item = example(prompt, completion)
    whole = completion[1:] if completion[0] == " " and not completion[1:2].isspace() else completion
    asked, answer = encode_prompt(item, tokenizer, chat=True).ids, encode_completion(item, tokenizer, chat=True)
    assert decoded(tokenizer, asked) == f"user: {prompt}\nassistant: "
    assert decoded(tokenizer, answer) == f"{whole}\n{tokenizer.eos_token}"
    assert TextCheck(tokenizer, chat=True).look(item) == ""
    tokenizer.chat_template = PLAIN.replace("m.content", "m.content | trim")
    said = TextCheck(tokenizer, chat=True).look(item)
    assert (said != "") is (prompt != prompt.strip() or whole != whole.strip())


def test_a_template_that_strips_texts_is_named_once():
    tokenizer, messages = load_tokenizer("nano")[0], []
    tokenizer.chat_template = PLAIN.replace("m.content", "m.content | trim")
    item = example("Write:", "    return 1\n")
    fit([item] * 3, tokenizer, 100, chat=True, say=messages.append)
    assert [text.partition(" (")[0] for text in messages] == [
        "the chat template changes texts: '    return 1\\n' becomes 'return 1'"
    ]


@pytest.mark.parametrize("space", [" ", "\n\n"])
@pytest.mark.parametrize("strip", ["", " | trim"])
def test_a_context_that_begins_with_a_space_is_cut_in_every_template(space, strip):
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = PLAIN.replace("m.content", f"m.content{strip}")
    passage = f"{space}the baker has a key"
    item = example(f"{passage}\n\nQuestion: who?", " a", context=(0, len(passage)))
    for options in ({}, {"chat": True}):
        whole = encode_prompt(item, tokenizer, **options)
        cut = encode_prompt(item, tokenizer, room=len(whole.ids) - 2, **options)
        assert decoded(tokenizer, cut.ids) == decoded(tokenizer, whole.ids).replace("a key", "")


@pytest.mark.parametrize("calls", ["adder", ["adder"], [{"function": "adder"}], {"function": {"name": 7}}, [[]], 3])
def test_calls_of_any_form_are_no_traceback(calls):
    tokenizer = load_tokenizer("nano")[0]
    for template in (PLAIN, PLAIN.replace("m.content", "m.content ~ m.tool_calls")):
        tokenizer.chat_template = template
        turns = (TURNS[0], {"role": "assistant", "content": "", "tool_calls": calls}, {**SAID, "content": "7"})
        with suppress(BadRecordError):
            assert "tool: 7" in prompt_text(example("", "Seven.", messages=turns), tokenizer)


def test_what_a_line_gives_twice_is_refused():
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = "{{ tools | tojson }}" + PLAIN
    for options in ({"messages": []}, {"tools": []}):
        item = example("", "b", messages=TURNS[:1], template={"tools": [TOOL], "chat_template_kwargs": options})
        with pytest.raises(BadRecordError, match=f"'chat_template_kwargs' holds {next(iter(options))}, which the line"):
            encode_prompt(item, tokenizer)


def test_what_only_a_template_writes_is_refused_where_there_is_none():
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = PLAIN
    item = example("a", "b", template={"tools": [TOOL]})
    with pytest.raises(BadRecordError, match="'tools' would reach the model in a chat template alone"):
        encode_prompt(item, tokenizer)
    with pytest.raises(BadRecordError, match="the chat template leaves out 'tools'"):
        encode_prompt(item, tokenizer, chat=True)
    tokenizer.chat_template = "{{ tools | tojson }}" + PLAIN
    assert "adder" in decoded(tokenizer, encode_prompt(item, tokenizer, chat=True).ids)


@pytest.mark.parametrize(
    ("left_out", "others"),
    [
        ("Answer in French", ['What does "Answer in French" mean?']),
        ("1", ["12?"]),
        ("yes", ["yes"]),
        ("a b", ["a  b", "no"]),
        ("ab", ["a", "b", "xabab"]),
    ],
)
def test_a_turn_whose_text_stands_in_another_turn_as_well_is_missed_all_the_same(left_out, others):
    tokenizer = load_tokenizer("nano")[0]
    turns = [{"role": "system", "content": left_out}, *({"role": "user", "content": text} for text in others)]
    for template in (PLAIN, PLAIN.replace("m.content", "m.content | trim")):
        tokenizer.chat_template = template
        assert left_out in prompt_text(example("", "7", messages=tuple(turns)), tokenizer)
        tokenizer.chat_template = template.replace("in messages", "in messages if m.role != 'system'")
        with pytest.raises(BadRecordError, match="leaves out what a message says"):
            prompt_text(example("", "7", messages=tuple(turns)), tokenizer)


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_is_in_its_template_already_is_named_once_where_the_template_is_put_around_it(chat):
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    rendered = example("user: 2 and 2?<eos>assistant: ", "4<eos>")
    check = TextCheck(tokenizer, chat=chat)
    first, second = check.look(rendered), check.look(rendered)
    assert ("holds '<eos>'" in first) is chat
    assert second == ""


def test_a_text_that_the_tokenizer_changes_is_named_wherever_it_stands():
    """Which characters it changes does not depend on the place."""
    tokenizer = load_tokenizer("nano")[0]
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    plain, changed = example("a m2", " b"), example("a m²", " b")
    for place in (0, 99, 100, 101, 350):
        check = TextCheck(tokenizer)
        said = [check.look(changed if number == place else plain) for number in range(400)]
        assert [number for number, words in enumerate(said) if words] == [place]
        assert "'a m²" in said[place]


@pytest.mark.parametrize(
    ("completion", "closed"),
    [
        ("4", "4<eos>"),
        ("4<eos>", "4<eos>"),
        ("4<eos>\n", "4<eos>\n"),
        ("4<eos>5", "4<eos>5<eos>"),
        ("<eos>5", "<eos>5<eos>"),
    ],
)
def test_a_completion_is_closed_unless_it_is(completion, closed):
    tokenizer = load_tokenizer("nano")[0]
    assert decoded(tokenizer, encode_completion(example("a", completion), tokenizer)) == closed


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
