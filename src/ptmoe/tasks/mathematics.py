r"""Mathematics: `correct`, by value. `extract_answer` finds the final answer, `correct` compares it. Sources:

- GSM8K (https://github.com/openai/grade-school-math, `dataset.py`): the number behind the first `#### `, commas
  removed, compared as text. Here likewise, but by value (`#### $72.00.` is 72), with an equation read as its right side
  (`#### 48/2 = 24` is 24, not 48) and `#### 12 or 13` as neither.
- SVAMP (https://github.com/arkilpatel/SVAMP, `evaluate.py`) compares what equations evaluate to, to 0.1; MWPToolkit
  (https://github.com/LYH-YF/MWPToolkit, `evaluator.py`), which scores MAWPS and ASDiv as well, to 1e-4. MAWPS and ASDiv
  have no evaluator of their own. A tolerance of 0.1 would accept 5.1 for 5, so it is 1e-4, and only for golds that are
  not whole numbers: MAWPS's 1.8333333333333335 is matched by 11/6 and 1.8333, not by 1.83; 5 only by 5.
- ASDiv (https://github.com/chaochun/nlu-asdiv-dataset): golds are `9 (apples)`, `5 (hr); 10 (hr)`, `7/9`, `-(1/3)`,
  `9:7`, `11:45 p.m.`, `Vendor 2`, `They are equal`. Its lists are unordered ("the speed of the stream and that of
  boat" has the boat's first), so any order is correct; every number must be present, and no other.

- MATH (https://github.com/hendrycks/math): golds such as `3\pi` or `(3, \frac{\pi}{2})`, by `ptmoe.tasks.expressions`.
  Numbers are read by `ptmoe.tasks.numerals`.

math-verify 0.9 is made for the expressions of MATH and judges the other golds differently: it accepts `10` for
`5 (hr); 10 (hr)`, `9:2` for `9:7`, `2` for `Vendor 2` and `0.5` for `50%`, and rejects `They are equal` for itself,
`3 1/2` for `3.5`, `−5` for `-5` and `0.1667` for `1/6`. It takes 0.7 ms an answer, against 0.02 to 0.06 ms here.
"""

import re
import string
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from ptmoe.tasks.expressions import LONGEST, equal, has_arithmetic, is_expression, last_boxed, without_words
from ptmoe.tasks.numerals import LONGEST_NUMBER, NUMBER, SCALES, STATES, UNIT, numbers_of, plain, value_of

# ---- mathematics: finding the answer ---------------------------------------------------------------------------------

_HASHES = re.compile(r"####(?=[\W_]{0,12}(?:boxed[\W_]{0,4}|[Rr]s\.? ?)?\d)")
_JUDGES = (  # `the answer is correct` states none
    r"\s[*_]{0,3}(?:also\s|indeed\s)?(?:(?:in)?correct|right|wrong|valid|verified|confirmed|consistent|reasonable|helpful|clear"
    r"|rounded\sto\sthe\snearest)\b"
)
_LABEL = re.compile(
    rf"[Aa](?:(?<![^\W_][Aa])(?i:nswers?)\b[ \t*_]{{0,4}}(?::|=|(?P<says>(?i:is|are|was|would be)\b)(?!{_JUDGES}))"
    r"|(?<=A)(?<![^\n]A)[ \t*_]{0,4}:)"
)
_SENTENCE_END = re.compile(r"(?<![Rr]s)[.!?](?=\s|$)|[。！？]")
_FULL_STOP = re.compile(r"[.?](?=\s|$)")
_IN_DOLLARS = re.compile(r"\$\$?([^$\n]{1,200})\$|\\[(\[](.{1,200}?)\\[)\]]")
_LEFT_SIDE = re.compile(r"[-+*/×÷·x^()\s$£€\d.,%]*[\d)]\s*=")
_OPERATOR = re.compile(r"\d\s{0,3}[-+*/×÷·x^(]")
_OR = re.compile(
    r"\s?(?P<unit>[^\W\d_]{0,20})[\s,]{0,3}(?:\bor\b|或者?|还是|または|又は|或いは|또는|혹은)"
    r"[\s$£€]{0,3}(?:[A-Za-z]\s?=[\s$£€]{0,3})?"
)
# Between the ends of a stated range, or between two stated numbers: `from 3 to 4` and `add 3 to 4` state neither.
_TO = re.compile(
    r"[\s$]{0,2}(?P<unit>[%°]?[^\W\d_]{0,20})\s?(?:(?<![^\W_])to\b|[到至和與与及と와과및~]|から)[\s$£€]{0,3}"
)
_PLACES = re.compile(r"\s?(?:d\.?p|s\.?f|decimal|significant|sig|places|figures|digits|位)", re.IGNORECASE)
# Behind the first and the second number of `2 hours and 30 minutes`, of which neither is the answer.
_LARGE_UNIT = re.compile(
    r"\s{0,3}(?P<unit>(?:years?|months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|dollars?|euros?|pounds?|lbs?|feet|foot"
    r"|ft|tons?|kg|kilograms?|miles?|km|kilomet(?:er|re)s?|m|met(?:er|re)s?|yards?|gallons?|quarts?|pints?|cups?"
    r"|lit(?:er|re)s?|[lL])(?=[\s,])"
    r"|年|[个個かヶ]月|[周週天日]|小时|小時|時間|分钟|分鐘|分|[元块塊円]|公里|公斤|千克|米|년|개월|[주일]|시간|분)"
    r"[\s,零又と]{0,3}(?:and\s{1,3})?"
)
_SMALL_UNIT = re.compile(
    r"\s{0,3}(?P<unit>(?:months?|weeks?|days?|hours?|hrs?|minutes?|mins?|seconds?|secs?|cents?|pence|pounds?|lbs?|ounces?"
    r"|oz|feet|foot|ft|inch(?:es)?|in|g|grams?|yards?|m|met(?:er|re)s?|cm|mm|quarts?|pints?|cups?|ml)\b"
    r"|[个個かヶ]月|[天日]|小时|小時|時間|分|秒|[角毛]|米|克|厘米|公分|개월|일|시간|[분초])"
)
_SEPARATORS = re.compile(r"(?:[\s,;&$£€]|\band\b|\bor\b)*")
# What is before or behind a number that is a part of an expression: ln 2, ∛5, pi/3, (a+b)/2, 5x + 2, 10 + 3. A minus
# may be a dash, and is one unless the sentence ends with what it takes away.
_PART_BEHIND = re.compile(
    r"(?:(?<![^\W_])(?:ln|log|sin|cos|tan|exp|sqrt)\s?[({]?|[√∛∜]\s?[({]?|(?:(?<![^\W_])(?:pi|[a-z])|[π)\]}])\s?/\s?"
    r"|\d[a-z](?:\^\d)?\s?[-+*]\s?)\Z"
)
_PLUS_LETTER = re.compile(r"\s?(?:[±∓]|[rR]\d|[+*×·÷]\s?[A-Za-z]|/\s?[knxyz])(?![A-Za-z])")
_PART_BEFORE = re.compile(
    r"\s?(?:[+*×·÷]\s?[\d(√π]|-\s?[\d.,]{1,30}\s?[^\W\d_]{0,20}\s?[.!]?\Z)|\)\s?[-+*/^]\s?[\d(]"
    r"|\s(?:with\s)?(?:an?\s)?(?:remainder|rem\.?|[rR])\s(?:of\s)?\d|\s?[余餘]\s?\d"
)
_AND_PART = re.compile(r"(?<=\d) and (?=\d{1,3}/\d)")  # 5 and 1/2


def extract_answer(completion: str) -> str:
    r"""The final answer in a completion, `""` in an empty one. Of these, the first that applies:

    1. what follows the first `####` before a number, GSM8K's marker;
    2. what follows the last `A:` at the start of a line, `Answer:` or `answer is` (but not `answer is correct`), or the
       last `\boxed{}`, if that is later;
    3. what follows the first `####`;
    4. the last number; without one, the last line.

    After 1., `answer is` and `\boxed{}` the answer is the first number. `A:`, `Answer:` and 3. may start an
    explanation: unless their line consists of a number and its unit, the answer is the last number. If no number
    follows, it is the first sentence. An expression (`\boxed{3\pi}`), a list of numbers, `12 or 13`, `12 to 13`,
    `12 ± 1` and `2 h 30 min` are returned whole. Only 1. tolerates text that continues with the next question.
    """
    return _expression(completion) or _final(plain(completion))


def _final(text: str) -> str:
    text = _AND_PART.sub(" ", text)  # only here: as a list, `3 and 1/2` has two values
    kind, line, rest = _marked(text)
    if numbers_of(line) is not None:
        return line.rstrip(" .")
    if kind == "is" and (answer := _first_number(_first_sentence(line))):
        return answer
    return _last_number(rest) or (_first_sentence(line) if kind else _last_line(text))


def _marked(text: str) -> tuple[str, str, str]:
    """`(kind, line, rest)`: "is", ":" or "" for how the answer is marked, its line, and everything from there on."""
    if hashes := _HASHES.search(text):
        return "is", _line(text[hashes.end() :]), text[hashes.end() :]
    label = max(_LABEL.finditer(text), key=re.Match.start, default=None)
    box = last_boxed(text)
    if box and (not label or label.start() < box[0]):
        return "is", box[1].strip(), box[1]
    if label:
        rest = text[label.end() :]
        return "is" if label["says"] else ":", _line(rest), rest
    _, mark, rest = text.partition("####")
    return (":", _line(rest), rest) if mark else ("", text.strip(), text)


def _expression(text: str) -> str:
    """The final answer where it is an expression of mathematics, else "". What is in a box or in dollars is written as
    mathematics, so letters in it are variables."""
    if not re.search(r"[\\$√∛∜π∞]", text):
        return ""
    box = last_boxed(text)
    kind, line, rest = _marked(text)
    if box and line == box[1].strip():
        return line if is_expression(line) or has_arithmetic(line) else ""
    if kind == ":" and rest.strip() != line:  # an explanation
        return ""
    line = _first_sentence(line if kind else _last_line(text))
    dollars = _IN_DOLLARS.match(line)
    if dollars:
        inner = str(dollars[1] or dollars[2])
        return inner if is_expression(inner, in_mathematics=bool(kind)) or (kind and has_arithmetic(inner)) else ""
    return line if is_expression(line, in_mathematics=False) else ""


def _line(text: str) -> str:
    """The first line that is not blank."""
    return text.lstrip(" \t\r\n*_:#").split("\n", 1)[0].rstrip(" \t\r*_")


def _last_line(text: str) -> str:
    return text.strip(" \t\r\n*_").rsplit("\n", 1)[-1].strip()


def _first_sentence(text: str) -> str:
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip()


def _first_number(text: str) -> str:
    """The first number as written, after the left side of an equation; "" if there is none."""
    start = _right_side(text, 0) or _right_side(text, first.start() if (first := NUMBER.search(text)) else 0)
    found = list(NUMBER.finditer(text, start))
    if found and (_is_part(text, found[0]) or _PART_BEFORE.match(text, found[0].end())):
        return text
    return _alternatives(text, *found[:2]) or found[0][0] if found else ""


def _right_side(text: str, start: int) -> int:
    """Where the right side starts of an equation of numbers that starts there, of the last of `3 + 4 = 14 / 2 = 7`."""
    end = 0
    while (left := _LEFT_SIDE.match(text, start)) and _OPERATOR.search(text, start, left.end()):
        start = end = left.end()
    return end


def _last_number(text: str) -> str:
    for line in reversed(text.split("\n")):  # numbers do not span lines, so most of a completion need not be read
        if found := list(NUMBER.finditer(line)):
            return line if _is_part(line, found[-1]) else _alternatives(line, *found[-2:]) or found[-1][0]
    return ""


def _is_part(text: str, number: re.Match[str]) -> bool:
    behind = text[max(0, number.start() - 12) : number.start()]
    return (_PART_BEHIND.search(behind) or _PLUS_LETTER.match(text, number.end())) is not None


def _alternatives(text: str, first: re.Match[str], other: re.Match[str] | None = None) -> str:
    """The whole of `12 or 13`, `2 h 30 min` or a mere list of numbers, as no single number is the answer; else ""."""
    if not other:
        return ""
    large, small = _LARGE_UNIT.fullmatch(text, first.end(), other.start()), _SMALL_UNIT.match(text, other.end())
    if large and small and ("," not in large[0] or large["unit"] != small["unit"]):  # not `5 hours, 2 hours more`
        return text[first.start() :]
    either = _OR.fullmatch(text, first.end(), other.start())
    behind = text[max(0, first.start() - 20) : first.start()].strip(" \t$*_")
    if not either and (not behind or STATES.search(behind)) and not _PLACES.match(text, other.end()):
        either = _TO.fullmatch(text, first.end(), other.start())
    if either:  # `12 apples or 13 apples`, but not `90 min or 1.5 h`
        same_unit = text[other.end() : other.end() + 50].lstrip().startswith(either["unit"])
        return text[first.start() : other.end()] if same_unit and value_of(first) != value_of(other) else ""
    if len(text) > LONGEST_NUMBER or not _SEPARATORS.fullmatch(text[first.end() : other.start()].rpartition(")")[2]):
        return ""
    return text.strip() if _is_list(text) else ""


def _is_list(text: str) -> bool:
    """Whether a text is a list of numbers and nothing else."""
    return _SEPARATORS.fullmatch(NUMBER.sub(" ", UNIT.sub("", text).rstrip(" ."))) is not None


# ---- mathematics: comparing ------------------------------------------------------------------------------------------

_TOLERANCE = Fraction(1, 10**4)
_RATIO = re.compile(
    r"(?<![\w.:/-])(?<!\d[ ])"  # no part of -1/2 or 1 1/2
    r"\d{1,50}(?:\.\d{1,50})?(?:(?:\s?[:/]\s?|\s(?:is\s)?to\s)\d{1,50}(?:\.\d{1,50})?){1,7}(?![\w:/]|\.\d)"
)
_RANGE = re.compile(r"\d{1,50}(?:-\d{1,50}){1,7}")  # pages 10-15, a score, a date: as a reference no subtraction
_TIME = re.compile(r"(\d)\s{0,3}([ap])\.?\s?m\b\.?", re.IGNORECASE)
_COMMA = re.compile(r"(?<!\d),|,(?!\d)")  # of A,B and no number
_EDGES = string.punctuation + "“”‘’«»…"


def correct(prediction: str, references: Sequence[str]) -> bool:
    """Whether the final answer in the prediction is one of the references; an empty prediction is wrong.

    What counts as equal depends on the reference:

    - a number (`72`, `1,080`, `$5`, `50%`, `9 (apples)`, `1/6`, `-(1/3)`, `#### 72`): the same value, in any of these
      forms, or of arithmetic in a box (`\\boxed{10 + 3}` is 13). Units are ignored, and so is `%`: `50%` equals 50 and
      not 0.5. A fraction is a value (`2/4` is 1/2), its parts are not (`1/2` is not 2). A whole number must match
      exactly, any other to 1e-4 (and to 0.1 % of itself). `3 million` is 3,000,000 or 3, as questions ask for either;
      so is `3k`, but `3M` and `3 bn` are no units.
    - several numbers (`5 (hr); 10 (hr)`, `-1, 3`): the same values in any order, no more and no fewer.
    - an expression (`3\\pi`, `(3, \\frac{\\pi}{2})`, `x+1`, `3ab`, `n!`, `1010_2`): an equal one. Letters behind a
      number are variables unless they are in a closed list of units. Factorials, primes and numerals in a base are
      equal only as they are written.
    - a ratio (`9:7`): the same ratio, also as `18:14`, `9/7` or `9 to 7`; a time of day such as `10:30` counts as one.
    - words (`Ted`, `Vendor 2`, `They are equal`, `11:45 p.m.`): the same words, ignoring case, punctuation and
      articles, as the line or first sentence after a marker or of the completion. `five` is a word, not a number.
    """
    if not prediction.strip():
        return False
    text, expression, folded = plain(prediction), _expression(prediction), " ".join(prediction.split())
    return any(
        folded == " ".join(reference.split()) or _satisfies(text, expression, prediction, _gold(reference))
        for reference in references
    )


class _Gold(NamedTuple):
    """What a reference requires: one of them is not empty, unless the reference itself is."""

    numbers: tuple[Fraction, ...] = ()
    scale: int = 1
    ratio: tuple[Fraction, ...] = ()
    words: tuple[str, ...] = ()
    expression: str = ""


@lru_cache(maxsize=2**14)
def _gold(reference: str) -> _Gold:
    text, written = (form.rpartition("####")[2].strip() for form in (plain(reference), reference))
    if box := last_boxed(written):
        written = box[1].strip()
    if is_expression(written) and not _RANGE.fullmatch(written):
        return _Gold(expression=written)
    if (numbers := numbers_of(text)) is not None:
        return _Gold(numbers, _scale(text))
    if _is_list(text) and (numbers := _every_number(text)):
        return _Gold(numbers)
    if ratio := _RATIO.fullmatch(UNIT.sub("", text)):
        return _Gold(ratio=_terms(ratio[0]))
    return _Gold(words=_words(text))


def _satisfies(text: str, expression: str, prediction: str, gold: _Gold) -> bool:
    if gold.expression and any(equal(gold.expression, stated) for stated in _stated(prediction)):
        return True
    if expression and (len(gold.numbers) == 1 or (gold.numbers and r"\pm" in expression)):
        wanted = ",".join(rf"\frac{{{number.numerator}}}{{{number.denominator}}}" for number in gold.numbers)
        return bool(equal(wanted, without_words(expression)))
    if len(gold.numbers) == 1:
        answer = _final(text)
        return _same_scaled(numbers_of(answer), _scale(answer), gold)
    if gold.numbers:
        return not has_arithmetic(expression) and any(
            _same(_every_number(line), gold.numbers) for line in _statements(text)
        )
    if gold.ratio:
        kind, line, rest = _marked(text)
        found = _RATIO.findall(line)[:1] if kind == "is" else _RATIO.findall(rest)[-1:]
        return bool(found) and _terms(found[0]) == gold.ratio
    if expression and len(gold.words) == 1 and len(gold.words[0]) <= 3:  # variables
        return bool(equal(gold.words[0], expression))
    lines = _statements(text) if gold.words else []
    return any(gold.words in (_words(line), _words(_first_sentence(line))) for line in lines)


def _statements(text: str) -> list[str]:
    """Where a list or words may be: after the marker; without a marker, or after `A:`, on the last line as well."""
    kind, line, rest = _marked(text)
    return [line, _first_sentence(line) if kind else line, line if kind == "is" else _last_line(rest)]


def _stated(text: str) -> list[str]:
    """Where an expression may be."""
    kind, line, rest = _marked(text)
    sentence = _FULL_STOP.split(line, maxsplit=1)[0].strip()  # `!` makes another expression
    lines = [line, sentence, *([] if kind == "is" else [_last_line(rest)])]
    inner = [str(found[1] or found[2]) for line in lines[-2:] for found in list(_IN_DOLLARS.finditer(line))[-1:]]
    return [stated for stated in dict.fromkeys(lines + inner) if len(stated) <= LONGEST]


def _every_number(text: str) -> tuple[Fraction, ...] | None:
    values = []
    for found in NUMBER.finditer(UNIT.sub("", text)):
        first, comma, others = (found["other"] or "").partition(",")  # of 11,12,13 and 1/2,2.5
        written = [f"{found['sign']}{found['number']}{first}", *others.split(",")]
        for number in map(NUMBER.fullmatch, written) if comma and len(found[0]) <= LONGEST_NUMBER else [found]:
            if number is None or (value := value_of(number)) is None:
                return None
            values.append(value)
    return tuple(values)


def _scale(text: str) -> int:
    """What the first number is multiplied by: 10**6 for `3 million`."""
    number = NUMBER.search(text)
    return SCALES.get(number["scale"] or "", 1) if number else 1


def _same_scaled(values: tuple[Fraction, ...] | None, scale: int, gold: _Gold) -> bool:
    """Whether one value is the gold's; where only one of the two has a scale, that may also be its unit, as in answers
    to `how many millions`."""
    if values is None or len(values) != 1:
        return False
    as_unit = 1 in (scale, gold.scale) and _same(values, gold.numbers)
    return as_unit or _same_value(values[0] * scale, gold.numbers[0] * gold.scale)


def _same(values: tuple[Fraction, ...] | None, wanted: tuple[Fraction, ...]) -> bool:
    """Whether the values are the wanted ones, in any order."""
    if values is None or len(values) != len(wanted):
        return False
    return all(map(_same_value, sorted(values), sorted(wanted)))


def _same_value(value: Fraction, wanted: Fraction) -> bool:
    if value == wanted or wanted.denominator == 1:
        return value == wanted
    return abs(value - wanted) < min(_TOLERANCE, abs(wanted) / 1000)


def _terms(ratio: str) -> tuple[Fraction, ...]:
    """18:14 as (1, 7/9); terms with a zero, as in the time 9:00, unchanged."""
    terms = tuple(map(Fraction, re.split(r"[^\d.]+", ratio)))
    return tuple(term / terms[0] for term in terms) if all(terms) else terms


def _words(text: str) -> tuple[str, ...]:
    words = []
    text = _COMMA.sub(" ", unicodedata.normalize("NFC", text).casefold())
    for token in _TIME.sub(r"\1\2m", text).split():
        if word := token.strip(_EDGES):
            one = len(word) == 1 and word.isalpha()  # of a letter, x, the marks of -x, |x| and y' count as well
            sign = "-" if (word[0].isdigit() or one) and token.lstrip("($£€").startswith("-") else ""
            if one and ("|" in token or re.search(r"(?<!['’])\w['’]", token)):
                word = token.strip("$.,;:*")
            else:
                word = word.replace("'", "").replace("’", "")
            words.append(sign + (word if word[-1].isdigit() else word.replace(".", "")))
    return tuple(word for word in words if word not in ("a", "an", "the")) or tuple(words)
