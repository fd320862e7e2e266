"""The form of an answer."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from ptmoe.serve.answers import TextShape
from ptmoe.serve.engine import Token


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=8).map(lambda values: sorted(values, reverse=True)))
def test_of_tokens_with_one_text_the_likeliest_ones_value_is_told(values):
    shape = TextShape(SimpleNamespace(rows=[None], copies=1), None, lambda token: "\ufffda"[token % 2])
    (told,) = shape._logprobs([(Token(0, values[0], tuple(enumerate(values))), 0)])["top_logprobs"]
    assert told == {"\ufffda"[parity]: value for parity, value in enumerate(values[:2])}
