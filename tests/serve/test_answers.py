"""The form of an answer."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ptmoe.models.bases import load_tokenizer
from ptmoe.serve.answers import TextShape
from ptmoe.serve.engine import Token
from ptmoe.serve.service import Service


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=8).map(lambda values: sorted(values, reverse=True)))
def test_of_tokens_with_one_text_the_likeliest_ones_value_is_told(values):
    shape = TextShape(SimpleNamespace(rows=[None], copies=1), None, lambda token: "\ufffda"[token % 2])
    (told,) = shape._logprobs([(Token(0, values[0], tuple(enumerate(values))), 0)])["top_logprobs"]
    assert told == {"\ufffda"[parity]: value for parity, value in enumerate(values[:2])}


def sentencepiece():
    """As of Llama 2: a space before every text, which is dropped again."""
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "▁a": 1, "a": 2, "▁yes": 3, "yes": 4, "▁": 5}, [], unk_token="</s>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [(sentencepiece(), ["</s>", " yes", "yes"]), (load_tokenizer("nano")[0], ["<eos>", " is", "is", "\ufffd"])],
    ids=["sentencepiece", "byte-level"],
)
def test_a_token_is_named_with_its_space(tokenizer, texts):
    service = Service(None, None, tokenizer, frozenset(), None, None)
    names = {service.token_text(token) for token in range(len(tokenizer))}
    assert names.issuperset(texts)


def test_a_token_that_is_named_again_is_not_decoded_again(monkeypatch):
    tokenizer, _ = load_tokenizer("nano")
    service = Service(None, None, tokenizer, frozenset(), None, None)
    names = [service.token_text(token) for token in (40, 41)]
    monkeypatch.setattr(tokenizer, "decode", None)
    assert [service.token_text(token) for token in (40, 41)] == names
