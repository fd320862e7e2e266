"""Text said bit by bit is the whole text, and never a stop text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from ptmoe.models.bases import load_tokenizer
from ptmoe.serve.engine import Token
from ptmoe.serve.text import Text

BYTES = [f"<0x{value:02X}>" for value in range(256)]
WORDS = ["▁Paris", "▁is", "is", "▁", "é", "▁日本", "!", "ab", "ba"]
SPECIAL = "<s>"


def sentencepiece_like():
    """Spaces before words, bytes for what is not in the vocabulary, and a special token that is not said."""
    vocabulary = {token: index for index, token in enumerate([*BYTES, *WORDS, SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token=BYTES[0]))
    tokenizer.add_special_tokens([SPECIAL])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    characters = st.characters(exclude_categories=["Cs"]).map(lambda one: list(one.encode()))
    words = st.integers(len(BYTES), len(vocabulary) - 1).map(lambda one: [one])
    parts = st.lists(st.one_of(words, characters), max_size=30)
    return tokenizer.decode, parts.map(lambda parts: [token for part in parts for token in part])


def byte_level():
    """Where every token is bytes, and any of them may follow any other."""
    tokenizer, _ = load_tokenizer("nano")
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=40)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True), ids


DECODERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece_like()}


def said(decode, ids, stop=()):
    text, pieces = Text(decode, stop), []
    for token in ids:
        pieces.append(text.add(Token(token)))
        if text.stopped:
            return text, pieces
    pieces.append(text.end("length"))
    return text, pieces


@pytest.mark.parametrize("kind", DECODERS)
@given(data=st.data())
def test_the_pieces_are_the_whole_text(kind, data):
    decode, lists = DECODERS[kind]
    ids = data.draw(lists)
    _, pieces = said(decode, ids)
    assert "".join(piece.text for piece in pieces) == decode(ids)
    assert [token.id for piece in pieces for token, _ in piece.tokens] == ids
    offsets = [offset for piece in pieces for _, offset in piece.tokens]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("kind", DECODERS)
@given(data=st.data())
def test_a_stop_text_ends_it_and_is_not_said(kind, data):
    decode, lists = DECODERS[kind]
    ids = data.draw(lists)
    whole = decode(ids)
    start = data.draw(st.integers(0, max(len(whole) - 3, 0)))
    stop = [whole[start : start + data.draw(st.integers(1, 4))] or "x", "never said"]
    text, pieces = said(decode, ids, stop)
    place = min((place for one in stop if (place := whole.find(one)) >= 0), default=len(whole))
    assert text.stopped == any(one in whole for one in stop)
    assert "".join(piece.text for piece in pieces) == whole[:place]


def test_a_character_of_several_tokens_is_said_at_once():
    decode, _ = DECODERS["sentencepiece"]
    ids = list("日".encode())
    _, pieces = said(decode, ids)
    assert [piece.text for piece in pieces] == ["", "", "日", ""]


def test_no_token_of_a_stop_text_is_told():
    words = ["ab", "S", "TOP"]
    _, pieces = said(lambda ids: "".join(words[token] for token in ids), [0, 1, 1, 2], ["STOP"])
    assert [(token.id, offset) for piece in pieces for token, offset in piece.tokens] == [(0, 0), (1, 2)]


@given(st.data())
def test_the_first_of_several_stop_texts_in_one_token_ends_it(data):
    stops = data.draw(st.permutations(["ab", "cd", "", "ef"]))
    words = ["x", "".join(data.draw(st.permutations(["-ab-", "-cd-", "-ef-"])))]
    _, pieces = said(lambda ids: "".join(words[token] for token in ids), [0, 1], stops)
    assert "".join(piece.text for piece in pieces) == "x-"


@pytest.mark.parametrize(
    ("words", "stop", "text", "told", "finish"),
    [
        ([b"ab", b"STO", b"P\xe6"], "STOP", "ab", [(0, 0)], "stop"),
        ([b"ab", b"STO", b"P"], "STOPS", "abSTOP", [(0, 0), (1, 2), (2, 5), (9, 6)], "length"),
    ],
)
def test_the_end_says_what_was_held_back_unless_it_holds_a_stop_text(words, stop, text, told, finish):
    made = Text(lambda ids: b"".join(words[token] for token in ids).decode(errors="replace"), [stop])
    pieces = [made.add(Token(token)) for token in range(3)]
    pieces.append(made.end("length", Token(9)))
    assert "".join(piece.text for piece in pieces) == text
    assert [(token.id, offset) for piece in pieces for token, offset in piece.tokens] == told
    assert pieces[-1].finish == finish
