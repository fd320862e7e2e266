"""Grading: each evaluator's published definition written out a second time, and answers whose value is known."""

import json
import math
import random
import re
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import groupby, product
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from ptmoe.tasks.expressions import is_expression, last_boxed
from ptmoe.tasks.metrics import GRADERS, correct, exact_match, extract_answer, f1, normalize_answer, verbatim

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "gsm8k").exists(), reason="needs the data sets' own files")


def accuracy(prediction, *references):
    return GRADERS["mathematics"](prediction, references)["accuracy"]


# ---- question answering ----------------------------------------------------------------------------------------------


def squad_words(text):
    """SQuAD's normalisation, one character at a time; the article is a whole run of letters, digits and `_`."""
    kept = [
        c
        for c in text.lower()
        if not (33 <= ord(c) < 48 or 58 <= ord(c) < 65 or 91 <= ord(c) < 97 or 122 < ord(c) < 127)
    ]
    runs = ["".join(run) for _, run in groupby(kept, key=lambda c: c.isalnum() or c == "_")]
    line = "".join(" " if run in ("a", "an", "the") else run for run in runs)
    return ["".join(run) for space, run in groupby(line, key=str.isspace) if not space]


def squad_scores(prediction, references):
    best = (0, Fraction(0))
    for reference in references:
        predicted, wanted = squad_words(prediction), squad_words(reference)
        shared = sum(min(predicted.count(word), wanted.count(word)) for word in set(predicted))
        overlap = Fraction(2 * shared, len(predicted) + len(wanted)) if shared else Fraction(0)
        best = (max(best[0], int(predicted == wanted)), max(best[1], overlap))
    return best


PIECES = (
    "the The THE a A an An theme another cat cat's CATS dog Dog-house 1990s 1,990 $5 U.S. a. (the) _a_ a_b -- ... ! ? "
    "e\u0301 caf\u00e9 a\u0301 na\u00efve \u0130stanbul stra\u00dfe \uff12\uff10 \u0663 \u00bd "
    "the\u2013cat \u201cthe\u201d don\u2019t \u4e2d\u6587 \u0939\u093f\u0928\u094d\u0926\u0940"
).split(" ")
SPACES = (" ", "  ", "\t", "\n", "\u00a0", "\u2003", "")


def generated_answer(rng):
    words = [rng.choice(PIECES) for _ in range(rng.choice((0, 0, 1, 2, 3, 5)))]
    return "".join(rng.choice(SPACES) + word for word in words)


def changed(answer, rng):
    """The same words with some moved, dropped or doubled: many near misses and ties."""
    words = answer.split() or [""]
    words = [word for word in words for _ in range(rng.choice((0, 1, 1, 1, 2)))]
    rng.shuffle(words)
    return " ".join(words)


def test_exact_match_and_f1_are_squads_on_10000_generated_answers():
    rng = random.Random(0)
    matched = 0
    for _ in range(10_000):
        prediction = generated_answer(rng)
        references = [
            changed(prediction, rng) if rng.random() < 0.7 else generated_answer(rng) for _ in range(rng.randint(1, 3))
        ]
        match, overlap = squad_scores(prediction, references)
        assert exact_match(prediction, references) == bool(match), (prediction, references)
        assert math.isclose(f1(prediction, references), overlap, abs_tol=1e-12), (prediction, references)
        assert normalize_answer(prediction) == " ".join(squad_words(prediction))
        matched += match
    assert 1000 < matched < 9000  # both verdicts were met often


@pytest.mark.parametrize(
    ("prediction", "references", "match", "overlap"),
    [
        ("", [""], True, 0),  # as in v1.1: no token is shared
        ("the", ["a"], True, 0),
        ("", ["cat"], False, 0),
        ("The cat.", ["cat"], True, 1),
        ("cat cat", ["cat"], False, 2 / 3),
        ("cat sat", ["dog", "the cat", "sat cat"], False, 1),  # a bag has no order, the best reference counts
        ("u.s.", ["US"], True, 1),  # punctuation goes first: no article is left of "a.n.d."
        ("a.", ["the"], True, 0),
        ("the-cat", ["thecat"], True, 1),  # and "the-cat" is one word before its article could go
        ("cat", [], False, 0),
    ],
)
def test_squads_corner_cases(prediction, references, match, overlap):
    scores = GRADERS["qa"](prediction, references)
    assert scores == {"exact_match": float(match), "f1": pytest.approx(overlap)}


@needs_data
def test_every_gold_answer_of_xquad_scores_1_and_a_wrong_one_0():
    passages = [
        p
        for article in json.loads((DATA / "squad" / "xquad.en.json").read_text())["data"]
        for p in article["paragraphs"]
    ]
    golds = [[answer["text"] for answer in asked["answers"]] for passage in passages for asked in passage["qas"]]
    assert len(golds) == 1190
    for gold in golds:
        assert GRADERS["qa"](gold[0], gold) == {"exact_match": 1.0, "f1": 1.0}
        assert GRADERS["qa"](f" The {gold[0]}!", gold) == {"exact_match": 1.0, "f1": 1.0}
        assert GRADERS["qa"]("zzz", gold) == {"exact_match": 0.0, "f1": 0.0}


# ---- mathematics: values that are known ------------------------------------------------------------------------------


def written_forms(value, rng):
    """Ways to write the value, each by its own small rule."""
    sign, size = "-" if value < 0 else "", abs(value)
    numerator, denominator = size.numerator, size.denominator
    if denominator == 1:
        plain, commas = str(numerator), f"{numerator:,}"
        forms = [plain, commas, f"{commas}.", f"{plain}.0", f"{commas}.00", f"{2 * numerator}/2"]
        if numerator % 1000 == 0 and numerator:
            forms.append(f"{numerator // 1000}e3")
    else:
        whole, part = divmod(numerator, denominator)
        forms = [
            f"{numerator}/{denominator}",
            f"{3 * numerator}/{3 * denominator}",
            rf"\frac{{{numerator}}}{{{denominator}}}",
        ]
        if whole:
            forms += [f"{whole} {part}/{denominator}", rf"{whole}\frac{{{part}}}{{{denominator}}}"]
        if 10**6 % denominator == 0:
            decimal = f"{numerator / denominator:.6f}".rstrip("0")
            forms += [decimal, f"{decimal}0", decimal.removeprefix("0")]
    bare = rng.choice(forms)
    signs = {"": [""], "-": ["-", "\u2212"]}[sign]
    minus = rng.choice(signs)
    return [
        f"{minus}{bare}",
        f"{minus}${bare}",
        f"${minus}{bare}",
        f"{minus}\u00a3{bare}",
        f"{minus}{bare.removesuffix('.')}%",
        f"{minus}{bare.removesuffix('.')} apples",
        f"{minus}{bare.removesuffix('.')} (years old)",
        f"**{minus}{bare}**",
        f"{minus}{bare.removesuffix('.')}\u20ac",
        f"{minus}{bare.removesuffix('.')} km/h",
    ]


SETTINGS = (
    "{}",
    "#### {}",
    "She has 3 + 4 = 7 and 9 more.\n#### {}",
    "#### {}\n\nQuestion: Tom has 12 apples and 8 pears.",
    "A: {}",
    "First 8, then 9.\nA: {}",
    "Answer: {}",
    "The answer is {}",
    "8 - 3 = 5. The answer is {}",
    "**Final answer:** {}",
    "THE FINAL ANSWER IS: {}",
    r"so \boxed{{{}}}",
    "There were 12 at 10:30 on page 48/2. It is {}",
    "1. Take 5.\n2. Add 6.\nSo {}",
    "3 x 4 = 12, minus 2 = {}",
)


def known_value(rng):
    return rng.choice(
        (
            lambda: Fraction(rng.randint(-20, 120)),
            lambda: Fraction(rng.choice((1, -1)) * rng.randint(1, 9) * 10 ** rng.randint(0, 6)),
            lambda: Fraction(rng.randint(1000, 99_999_999)),
            lambda: Fraction(rng.randint(-5000, 5000), rng.choice((2, 4, 5, 8, 10, 100))),
            lambda: Fraction(rng.randint(1, 60), rng.choice((3, 6, 7, 9, 11, 12))),
        )
    )()


def near_misses(value):
    """Other values whose digits look much the same."""
    size = abs(value)
    yield from (
        -value,
        value * 10,
        value / 10,
        value * 100,
        value / 100,
        value + 1,
        value - 1,
        value + Fraction(1, 1000),
        1 / value if value else 1,
    )
    yield from (Fraction(size.numerator), Fraction(size.denominator), Fraction(size.numerator // size.denominator))
    digits = str(size.numerator)
    yield from (Fraction(int(digits[1:] or 0)), Fraction(int(digits[:-1] or 0)), Fraction(int(digits[-3:])))


@pytest.mark.slow
def test_a_value_is_right_in_every_form_and_its_near_misses_are_wrong():
    rng = random.Random(0)
    for _ in range(10_000):
        value = known_value(rng)
        gold = rng.choice(written_forms(value, rng)).replace("**", "")
        written = rng.choice(written_forms(value, rng))
        completion = rng.choice(SETTINGS).format(written)
        assert accuracy(completion, gold) == 1.0, (completion, gold)
        missed = rng.choice([other for other in near_misses(value) if other != value])
        completion = rng.choice(SETTINGS).format(rng.choice(written_forms(missed, rng)))
        assert accuracy(completion, gold) == 0.0, (completion, gold)


def test_a_number_with_an_exponent_is_right_in_every_setting_and_as_a_gold():
    for value, setting in product((Fraction(3, 2000), Fraction(-5, 2), Fraction(1200)), SETTINGS):
        decimal, exponent = f"{float(value)}", f"{float(value):.2e}"
        for written in (exponent, exponent.replace("-", "\u2212"), exponent.replace("e", "E")):
            assert accuracy(setting.format(written), decimal) == accuracy(setting.format(decimal), written) == 1.0
            assert accuracy(setting.format(written), f"{-float(value)}") == 0.0


def test_what_a_float_did_to_a_gold_is_forgiven_and_a_rounded_answer_is_not():
    rng = random.Random(0)
    for _ in range(1000):
        value = Fraction(rng.randint(1, 999), rng.choice((3, 6, 7, 9, 11, 13)))
        if value.denominator == 1:
            continue
        gold = repr(float(value))
        assert correct(str(value), [gold])
        assert correct(f"{float(value):.6f}", [gold])
        assert correct(gold, [str(value)])
        assert not correct(f"{float(value) + 0.0002:.6f}", [gold])
        assert not correct(str(round(float(value))), [gold])
    assert correct("3", ["2.9999999999999996"])
    assert not correct("2.9999999999999996", ["3"])  # a whole number was not computed in floating point
    assert not correct("0.00005", ["0"])


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("#### 72", "72"),
        ("#### 5\n#### 6", "5"),  # GSM8K takes the first
        ("#### Step 1: add\n3 + 4 = 7\n#### 7", "7"),  # a heading is no answer
        ("The answer is 4. No, the answer is 5.", "5"),
        ("The answer is 12 apples, 3 more than 9", "12"),
        ("A: There are 15 trees.\n15 + 6 = 21", "21"),  # reasoning follows `A:`
        ("Option A: 5\nis less than 6", "6"),
        (r"The answer is \boxed{4}. No, \boxed{5}", "5"),
        (r"\boxed{4}? No, the answer is 5", "5"),
        ("pages 10-3", "3"),
        ("48/2 = 24", "24"),
        ("The answer is 48/2 = 24, half of 48", "24"),
        ("The answer is 5, since 3 + 2 = 5", "5"),
        ("The answer is 5 = 2 + 3", "5"),
        ("The area is 36 m\u00b2", "36"),
        ("The area is 36 m^2, or 36 m2", "36"),
        ("It is 12 or 13.", "12 or 13"),
        ("5; 15", "5; 15"),
        ("2. -$1,234.50", "-$1,234.50"),
        (r"Hence \boxed{\text{Yes}}", "Yes"),
        ("#### They are equal.", "They are equal"),
        ("I compared 3 and 4.\nTed", "4"),  # words need a mark where there are numbers
        ("Ted\n", "Ted"),
        ("", ""),
    ],
)
def test_the_final_answer_is_found(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("100", "1000"),
        ("5", "50"),
        ("0.5", "5"),
        ("12 or 13", "12"),
        ("12 or 13", "13"),
        ("The answer is 12 apples or 13 apples", "12"),
        ("5; 15", "15"),
        (r"\boxed{5, 6}", "6"),
        ("1/2", "2"),
        ("3 1/2", "2"),
        ("3:2", "2"),
        ("10:30", "30"),
        ("10 - 3", "-3"),
        ("10-3", "-3"),
        ("(10)-3", "-3"),
        ("48 24/2", "60"),
        ("0.00021", "0.0002"),
        ("3,5", "5"),
        ("5^2", "2"),
        ("5\u00b2", "5"),
        ("1.2.3", "3"),
        ("1\u202f234", "234"),
        ("0.5", "50%"),  # % is a unit
        ("50%", "0.5"),
        ("5 and 3. The answer is yes", "3"),  # what is marked is the answer, numbers before it are not
        ("five", "5"),
        ("NaN", "0"),
        ("Infinity", "0"),
        ("1/0", "0"),
        ("1e999999999", "1"),
        ("", "5"),
        (" \n", " \n"),
    ],
)
def test_a_wrong_number_is_never_let_through(prediction, gold):
    assert accuracy(prediction, gold) == 0.0


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("Rs. 5", "5"),
        ("The answer is Rs. 5.", "5"),
        ("$5.", "5"),
        ("3rd", "3"),
        ("3\u00bd", "3.5"),
        ("3.2 \u00d7 10\u2074", "32000"),
        (r"3.2 \times 10^{4}", "32,000"),
        ("1{,}234", "1234"),
        ("12,34,567", "1234567"),
        ("\uff11\uff12", "12"),
        ("\u0661\u0662", "12"),
        ("0.5 or 1/2", "1/2"),
        ("It takes 90 minutes or 1.5 hours", "1.5"),
        ("x = 5", "#### 5"),
        ("72", "8 * 9 = <<8*9=72>>72 eggs.\n#### 72"),
    ],
)
def test_a_number_is_read_in_less_common_forms(prediction, gold):
    assert accuracy(prediction, gold) == 1.0


@pytest.mark.parametrize("judged_so", ["correct", "indeed correct", "verified", "consistent with the above", "helpful"])
def test_what_is_said_of_an_answer_is_no_answer(judged_so):
    for stated in ("The answer is {}.", r"Hence \boxed{{{}}}.", "Answer: {}\n", "So it is {}."):
        for behind in ("\n\nCheck: 6 * 7 = 42, so the answer is {}.", " I hope this answer is {}!"):
            assert accuracy(stated.format(42) + behind.format(judged_so), "42") == 1.0
            assert accuracy(stated.format(41) + behind.format(judged_so), "7") == 0.0
    assert accuracy(rf"\boxed{{3\pi}}. The answer is {judged_so}.", r"3\pi") == 1.0
    assert accuracy(f"The answer is Ted. The answer is {judged_so}.", "Ted") == 1.0


def test_any_of_several_references_may_match():
    assert accuracy("7", "5", "7") == 1.0
    assert accuracy("6", "5", "7") == 0.0
    assert accuracy("6") == 0.0


UNSPACED = (
    "答案是{}",
    "答案是{}。",
    "一共有{}个苹果",
    "答えは{}です",
    "정답은 {}입니다",
    "คำตอบคือ{}บาท",
    "共{}元，谢谢！",
)
MINUS = (
    *("The answer is - {}", "The answer is negative {}.", "#### - {}", "= - {}", "x = - {}", "- {}", "minus {}"),
    *(r"\boxed{{- {}}}", "The answer is -{}", "(- {})", "Answer: - ${}", "It is minus {} degrees", "It is \u2011 {}"),
    *("Negative {}", "答案是负{}。", "答えはマイナス{}です", "정답은 영하 {}도", "$- {}$", "$ - {}"),
)


def test_numbers_beside_letters_and_signs_that_stand_apart_are_read():
    rng = random.Random(0)
    for _ in range(1000):
        value = Fraction(rng.randint(1, 99_999))
        written = f"{int(value):,}" if rng.random() < 0.5 else str(value)
        completion = rng.choice(UNSPACED).format(written)
        assert accuracy(completion, str(value)) == 1.0, completion
        assert accuracy(completion, str(value + 1)) == accuracy(completion, str(-value)) == 0.0, completion
        completion = rng.choice(MINUS).format(written)
        assert accuracy(completion, str(-value)) == 1.0, completion
        assert accuracy(completion, str(value)) == 0.0, completion


FACTORS = ("π", " π", r"\pi", " pi", "*pi", "pi", "√2", r"\sqrt{2}", " sqrt(3)", "*sqrt(3)", "θ", "α", "i", r"\pi r^2")
UNITS = (" µm", "μm", " Ω", "m", " km", "%", "个", "元", " inches", " i.e. all", "!")


@pytest.mark.ci
def test_a_factor_of_an_expression_is_not_the_number_and_a_unit_is_none():
    for number in (2, 7, 31, 1200):
        for factor in FACTORS:
            for setting in ("{}", "The answer is {}.", "So it is {}", r"\boxed{{{}}}", "${}$"):
                completion = setting.format(f"{number}{factor}")
                for other in (number, 2, 3):
                    assert accuracy(completion, str(other)) == 0.0, (completion, other)
        for unit in UNITS:
            assert accuracy(f"The answer is {number}{unit}", str(number)) == 1.0, unit
        for completion in (f"±{number}", f"x = ± {number}", rf"\boxed{{\pm {number}}}", rf"\boxed{{{number}!}}"):
            assert accuracy(completion, str(number)) == 0.0, completion


def test_numbers_in_tens_of_thousands_and_parts_are_read_by_value():
    for number in (1, 3, 12, 250):
        for sign, power in (("万", 4), ("萬", 4), ("만", 4), ("億", 8), ("亿", 8)):
            value = number * 10**power
            assert accuracy(f"答案是{number}{sign}", str(value)) == accuracy(f"{number}.5{sign}人", f"{value:,}") + 1
            assert accuracy(f"一共{number}{sign}元", str(number)) == 0.0
            assert accuracy(f"{number}{sign}5", "5") == accuracy(f"{number}{sign}5", str(number)) == 0.0
        for between in ("分之", "分の", "분의 "):
            assert accuracy(f"答え: {number + 1}{between}1", f"1/{number + 1}") == 1.0
            assert accuracy(f"答え: {number + 1}{between}1", "1") == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "10 - 3",
        "10 minus 3",
        "- 4 apples\n- 3 pears",
        "(7) - 3",
        "Take 3.\n- 3",
        "non-negative: 3",
        "5 - 2 = 3",
        "a - 3",
    ],
)
def test_a_subtraction_and_a_bullet_are_no_sign(completion):
    assert accuracy(completion, "3") == 1.0


# ---- mathematics: expressions ----------------------------------------------------------------------------------------

EXPRESSIONS = {  # gold: (right, wrong)
    r"3\pi": (
        [r"\boxed{3 \pi}", "3π", r"The answer is $3\pi$.", r"\boxed{\pi\cdot 3}"],
        ["3", r"\boxed{3}", "9.42", "#### 3"],
    ),
    "5x": ([r"\boxed{5x}", r"\boxed{5 x}", "$5x$"], ["5", r"\boxed{5}", r"\boxed{5y}", "#### 5"]),
    "3i": ([r"\boxed{3i}", r"\boxed{0+3i}"], ["3", r"\boxed{-3i}"]),
    r"11\sqrt2": ([r"\boxed{11\sqrt{2}}", "11√2", r"\boxed{\sqrt{242}}"], ["11", "2", r"\boxed{22}"]),
    r"\frac{\sqrt{3}}{2}": (
        [r"\boxed{\dfrac{\sqrt{3}}{2}}", r"It is $\frac{1}{2}\sqrt3$"],
        ["2", "3", r"\boxed{\sqrt{3}}"],
    ),
    r"\left( 3, \frac{\pi}{2} \right)": (
        [r"\boxed{(3, \frac{\pi}{2})}", r"so \boxed{(3,\pi/2)}"],
        [r"\boxed{(\frac{\pi}{2}, 3)}", "3"],
    ),
    "x+1": ([r"\boxed{1+x}", "x + 1", "The answer is $x+1$"], ["1", r"\boxed{x-1}"]),
    "[2,3)": ([r"\boxed{[2, 3)}"], [r"\boxed{[2,3]}", "2,3"]),
    r"\begin{pmatrix} 1 & 2 \end{pmatrix}": (
        [r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}"],
        ["1", r"\boxed{1,2}"],
    ),
    "9^{9^{9^9}}": ([r"\boxed{9^{ 9^{9^9}}}"], ["9", r"\boxed{9^{9^9}}"]),  # too large: only as it is written
    "2^{10}": ([r"\boxed{1024}", r"\boxed{4^5}"], ["2", "10", "20"]),
    r"\frac{\pi}{7}": (["pi/7", "π/7"], ["pi", "7", "1/7"]),
    r"4\sqrt{5}": (["4*sqrt(5)", "4 sqrt(5)"], ["4", "5", "sqrt(5)"]),
    r"\{3,8\}": ([r"\boxed{\{8, 3\}}"], ["3", "8", r"\boxed{\{3,5\}}"]),
    r"0.5\sqrt{7}": (
        [r"\boxed{.5\sqrt{7}}", r"The answer is $.5\sqrt7$.", r"\boxed{\frac{\sqrt7}{2}}"],
        [r"\boxed{5\sqrt{7}}", "0.5"],
    ),
    r"7\sqrt{3}": ([r"\boxed{7\sqrt3}."], [r"\boxed{.7\sqrt{3}}", r"The answer is $.7\sqrt{3}$."]),
    "x=8": ([r"\boxed{8}", "x = 8"], [r"\boxed{.8}", "The answer is $.8$."]),
    r"\frac{3 \pm \sqrt{5}}{2}": (
        [
            r"\boxed{\dfrac{3\pm\sqrt5}{2}}",
            r"\boxed{x=\frac{3\pm\sqrt5}{2}}",
            r"\boxed{\frac{3-\sqrt5}{2}, \frac{3+\sqrt5}{2}}",
        ],
        [r"\boxed{\frac{3+\sqrt5}{2}}", r"\boxed{\frac{3\pm\sqrt{3}}{2}}", "3", "2"],
    ),
}


@pytest.mark.parametrize("gold", EXPRESSIONS)
@pytest.mark.ci
def test_an_expression_is_met_by_an_equal_one_and_by_no_part_of_it(gold):
    right, wrong = EXPRESSIONS[gold]
    for prediction in (gold, rf"\boxed{{{gold}}}", rf"\[ \boxed{{{gold}}} \]", f"#### {gold}", *right):
        assert accuracy(prediction, gold) == 1.0, prediction
    for prediction in ("", "zzz", *wrong, *(rf"\boxed{{{other}}}" for other in EXPRESSIONS if other != gold)):
        assert accuracy(prediction, gold) == 0.0, prediction


@pytest.mark.parametrize(
    ("prediction", "gold", "verdict"),
    [
        (r"\boxed{2\sqrt{2}}", "2", 0),
        (r"\boxed{\frac{\sqrt{3}}{2}}", "2", 0),
        (r"The answer is $2\sqrt{2}$ metres.", "2", 0),
        (r"so we get 3\pi", "3", 0),
        (r"\boxed{5x}", "5", 0),
        (r"\boxed{\sqrt{4}}", "2", 1),
        (r"\boxed{x = 5}", "5", 1),
        (r"\boxed{5^2}", "25", 1),
        (r"\boxed{5^2}", "5", 0),
        (r"\boxed{\pm 3}", "-3, 3", 1),
        (r"The answer is $x = 1 \pm 2$.", "3,-1", 1),
        (r"\boxed{\pm 3}", "3, 4", 0),
        (r"\boxed{\pm 3}", "3", 0),
        (r"\boxed{\frac{\frac{1}{2}}{3}}", "1/6", 1),
        (r"\boxed{36\text{ cm}^2}", "36", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{\$1{,}234}", "1234", 1),
        ("11111111100", r"11,\! 111,\! 111,\! 100", 1),
        (r"\boxed{\boxed{5}}", "5", 1),
        ("\\boxed 7", "7", 1),
        ("5", "5 m", 1),
        ("36", "36 m^2", 1),
        ("12", "12 h", 1),
        ("1000", "1e3", 1),
        ("N/A", "N/A", 1),
    ],
)
def test_a_number_is_not_met_by_a_part_of_an_expression_and_units_are_no_variables(prediction, gold, verdict):
    assert accuracy(prediction, gold) == verdict


def test_braces_of_any_depth_are_in_a_box():
    for depth in (1, 2, 5, 40):
        inner = "{" * depth + "7" + "}" * depth
        assert last_boxed(rf"\boxed{{1}} and \boxed{inner}.") == (14, inner[1:-1])
    assert last_boxed(r"\boxed{\{1\}}") == (0, r"\{1\}")
    assert last_boxed(r"\boxed{1") is last_boxed("7") is None


@pytest.mark.slow
def test_expressions_are_graded_in_threads_and_never_for_long():
    hard = [
        *("9^{9^{9}}", "9^{9999999}", "((9^{999})^{999})^{999}", "(10^{10})!", r"\sum_{n=1}^{10^9} n", "x" * 150),
        *(
            r"\int_0^1 e^{x^2} dx",
            r"\sum_{k=1}^{19} ((x+k)^9)^9",
            r"\sum_{k=1}^{9}\sum_{j=1}^{9} jk",
            "(" * 90 + "x+1" + ")" * 90,
            r"\sin(\cos(\tan(x+y)))^2+\cos(\cos(\tan(x+y)))^2",
        ),
    ]
    with ThreadPoolExecutor(4) as threads:
        started = time.process_time()
        pairs = [(rf"\boxed{{{one}}}", other) for one in hard for other in ("x^2", r"\pi", "7", one)]
        verdicts = list(threads.map(lambda pair: accuracy(*pair), pairs))
        assert time.process_time() - started < 30
    assert verdicts[3::4] == [1.0] * len(hard)
    assert not any(verdicts[2::4])


EXPRESSION = st.recursive(
    st.sampled_from([r"\pi", "x", "2", "7", r"\sqrt{2}", "y"]),
    lambda inner: st.tuples(st.sampled_from(["{}+{}", "{}-{}", r"\frac{{{}}}{{{}}}", r"({})({})"]), inner, inner).map(
        lambda parts: parts[0].format(*parts[1:])
    ),
    max_leaves=4,
)


@settings(max_examples=40)
@given(EXPRESSION)
def test_an_expression_equals_itself_with_other_spaces_and_nothing_one_larger(expression):
    assert accuracy(rf"\boxed{{ {expression} }}", expression) == 1.0
    if is_expression(expression):
        assert accuracy(rf"\boxed{{{expression}+1}}", expression) == 0.0
        assert accuracy(rf"\boxed{{1+{expression}-1}}", expression) == 1.0


@needs_data
def test_no_gold_of_the_word_problems_is_taken_for_an_expression():
    golds = [json.loads(line)["answer"].split("#### ")[1] for line in (DATA / "gsm8k" / "train.jsonl").open()]
    for name, key in (("asdiv-a", "Answer"), ("mawps", "lSolutions")):
        golds += [str(row[key]) for row in json.loads((DATA / name / "train.json").read_text())]
    assert len(golds) > 9000
    assert not any(map(is_expression, golds))
    assert not any(map(is_expression, ASDIV))


# ---- mathematics: families of answers, each right for itself and for none of its parts -------------------------------


def boxed(text):
    return rf"\boxed{{{text}}}"


def judged(prediction, right=(), wrong=()):
    """What must be right for the prediction is, what must be wrong is not; the verdicts are named that are not so."""
    assert [gold for gold in right if not correct(prediction, [gold])] == [], prediction
    assert [gold for gold in wrong if correct(prediction, [gold])] == [], prediction


TERMS = ("x", "n", "a", "3x", "ab", "3ab", "x+1", "ab+c", r"\frac{bh}{2}", r"3\pi", "20", "b^2-4ac", r"2\sqrt{5}", "-y")
MARKS = ("-({})", "({})!", "({})'", "({})+1", r"\frac{{1}}{{{}}}")


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.ci
def test_a_sign_a_factorial_or_a_prime_makes_another_answer(term):
    judged(boxed(term), right=[term])
    for mark in MARKS:
        if term == "20" and "'" in mark:  # minutes, or feet
            continue
        marked = mark.format(term)
        judged(boxed(marked), right=[marked], wrong=[term])
        judged(boxed(term), wrong=[marked])
        judged(f"The answer is ${marked}$.", right=[marked], wrong=[term])
    if term.isalnum():
        for marked in (f"-{term}", f"{term}!", *([f"|{term}|", f"{term}'"] if not term.isdigit() else [])):
            judged(boxed(marked), right=[marked], wrong=[term])
            judged(boxed(term), right=[f"${term}$"], wrong=[marked])


@settings(max_examples=25)
@given(EXPRESSION.filter(lambda text: is_expression(text) and re.search("[a-z]", text)))
@pytest.mark.ci
def test_a_generated_expression_is_met_by_itself_and_not_with_another_sign_or_mark(expression):
    doubled = accuracy(boxed(f"{expression}+({expression})"), expression)  # right only where it is 0
    judged(boxed(expression), right=[expression], wrong=[f"({expression})!", f"({expression})'"])
    assert accuracy(boxed(f"-({expression})"), expression) == accuracy(boxed(expression), f"-({expression})") == doubled


OPERATIONS = {  # as it is written: what it is
    **{sign: lambda a, b: a + b for sign in ("+", " + ", "+ ")},
    **{sign: lambda a, b: a - b for sign in ("-", " - ", " \u2212 ")},
    **{sign: lambda a, b: a * b for sign in (r"\cdot ", r" \times ", "*", " \u00d7 ", "\u00b7")},
    **{sign: lambda a, b: a / b for sign in (r"\div ", " \u00f7 ")},
}
MATHVERIFY_READS = ("+", " + ", "-", r"\cdot ", r" \times ", "*", r"\div ")
OPERANDS = st.integers(1, 999).map(Fraction)


@settings(max_examples=60)
@given(OPERANDS, OPERANDS, st.sampled_from(list(OPERATIONS)), st.sampled_from(("", r"\text{ cm}", " apples", " km")))
@pytest.mark.ci
def test_arithmetic_in_a_box_has_its_value_and_not_that_of_its_first_number(a, b, sign, unit):
    value = OPERATIONS[sign](a, b)
    parts = {a, b, -b} - {value}
    judged(boxed(f"{a}{sign}{b}{unit}"), right=[str(value)], wrong=map(str, parts))
    judged(boxed(rf"\frac{{{a}{sign}{b}}}{{2}}"), right=[str(value / 2)], wrong=map(str, parts - {value / 2}))
    judged(boxed(f"{a}{sign}{b} = {float(value)}"), right=[repr(float(value))], wrong=map(str, parts))
    judged(f"The answer is {a} + {b}", wrong=[str(a), str(b)])
    if sign in MATHVERIFY_READS and not unit:
        for gold in (value, a, b):
            theirs = verify(*(parse(boxed(text), parsing_timeout=None) for text in (gold, f"{a}{sign}{b}")))
            assert theirs == correct(boxed(f"{a}{sign}{b}"), [str(gold)]), (a, sign, b, gold)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("-(-5)", 5),
        ("|-5|", 5),
        ("(2)(3)", 6),
        ("2(3+4)", 14),
        ("1,200 + 34", 1234),
        ("10 km + 3 km", 13),
        ("2^3+1", 9),
        (r"\$10 + \$3", 13),
        ("$10 - $3", 7),
        ("5 - -3", 8),
        (r"20\% \cdot 50", 10),
    ],
)
def test_other_arithmetic_in_a_box_has_its_value(written, value):
    numbers = "1 2 3 4 5 8 10 20 34 50 200 1200 -5".split()
    judged(boxed(written), right=[str(value)], wrong=[number for number in numbers if number != str(value)])


ALGEBRA = ("x+1", "1+x", "x-1", "2xy", "2yx", "xy+z", "z+yx", "x^2-y^2", "(x-y)(x+y)", "y/2", r"\frac{y}{2}", "-y/2")


@pytest.mark.slow
def test_pairs_of_expressions_are_judged_as_math_verify_judges_them():
    parsed = {text: parse(boxed(text), parsing_timeout=None) for text in ALGEBRA}
    theirs = {(a, b): verify(parsed[a], parsed[b]) for a in ALGEBRA for b in ALGEBRA}
    assert {pair: correct(boxed(pair[1]), [pair[0]]) for pair in theirs} == theirs
    assert sum(theirs.values()) == len(ALGEBRA) + 2 * 5


LETTERS = "bh ab AB ac ai px qr uv xy nk PQ rt BH abc bcd abx x y n k i e a b p t c d r q P Q X".split()
ABBREVIATIONS = "cm mm km kg mg ml mL L hr min mph ft lb oz in m s g h l km/h m/s^2 GB kW cm^2 apples men".split()


@pytest.mark.parametrize("number", ["2", "12", "5/3"])
@pytest.mark.slow
def test_letters_behind_a_number_are_variables_unless_they_are_a_unit(number):
    for letters in LETTERS:
        term = f"{number}{letters}"
        judged(
            boxed(number), wrong=[term, f"{term}+1", *([rf"{number}\mathrm{{{letters}}}"] if letters in "ie" else [])]
        )
        judged(boxed(term), right=[term], wrong=[number])
        judged(boxed(f"z+{term}"), right=[f"{term}+z"], wrong=[number, term])
    for unit in ABBREVIATIONS:
        for written in (f"{number} {unit}", rf"{number}\text{{ {unit}}}", rf"{number}\ \mathrm{{{unit}}}"):
            judged(boxed(written), right=[number], wrong=["7"])
            judged(number, right=[written])
            judged(boxed(number), right=[written])


def test_a_number_in_one_base_is_not_the_same_digits_in_another():
    numbers = [f"{digits}_{base}" for digits in (1010, 11, 12021) for base in (2, 3, 8, 16)]
    for number in numbers:
        braces = number.replace("_", "_{") + "}"
        others = [other for other in numbers if other != number]
        judged(boxed(number), right=[number, braces], wrong=[*others, number.split("_")[0]])
        judged(boxed(braces), right=[number], wrong=others)
        judged(boxed(number.split("_")[0]), wrong=[number])


STATED = ("{}", "The answer is {}.", "The answer is {}", "So it is {}", "#### {}", "Answer: {}", "A: {}", "We get {}")
PARTS = (
    "{}x",
    "{}r^2",
    "{}e",
    "{}x + 7",
    "7x + {}",
    "7+{}i",
    "{}^n",
    "{}^{{n+1}}",
    "ln {}",
    "log({})",
    "pi/{}",
    "y/{}",
)
PARTS += (
    "{}/x",
    "{} / n",
    r"\frac{{{}}}{{x}}",
    r"\frac {}y",
    "sqrt(7)/{}",
    "(a+b)/{}",
    "\u221b{}",
    "\u221c({})",
    "cos {}",
    "{} + x",
    "{} + 7 + y",
)


@pytest.mark.ci
def test_a_number_in_plain_algebra_is_not_the_answer_and_one_with_a_unit_is():
    for number in ("2", "5", "31"):
        for part in PARTS:
            for setting in (*STATED, boxed("{}")):
                written = part.format(number)
                judged(setting.replace("{}", written), wrong=[number])
        for unit in (
            " apples",
            " m",
            "x faster",
            "x as many",
            "m",
            " km/h",
            "th",
            r"^\circ",
            "k",
            " - because 3",
            "+ years",
        ):
            judged(f"The answer is {number}{unit}", right=[number])
        for setting in STATED[1:3]:
            judged(setting.format(f"7 + {number}"), wrong=["7", number])
            judged(setting.format(f"then 7 + {number} = {7 + int(number)}"), right=[str(7 + int(number))], wrong=["7"])


HORIZONTAL = ["", "\t", *(chr(i) for i in range(0x3001) if unicodedata.category(chr(i)) == "Zs")]
DASHES = [chr(i) for i in range(0x10000) if re.search("HYPHEN|DASH|MINUS", unicodedata.name(chr(i), ""))]
MINUSES = [sign for sign in DASHES if sign in "-\u2010\u2011\u2012\u2013\u2212\u2796\ufe58\ufe63\uff0d\u02d7"]
LONG = [*"\u2014\u2015\u207b\u208b"]


@pytest.mark.ci
def test_a_number_is_negative_after_every_minus_sign_and_every_space():
    assert len(HORIZONTAL) == 19
    assert len(MINUSES) == 11
    for number in ("5", "1,234", "0.5"):
        for space in HORIZONTAL:
            for minus in MINUSES:
                for stated in (
                    "The answer is {}",
                    "#### {}",
                    "{}",
                    "It came to {}",
                    "x = {}",
                    "We get {}.",
                    boxed("{}"),
                ):
                    judged(stated.replace("{}", minus + space + number), right=[f"-{number}"], wrong=[number])
            word = f"minus{space or ' '}{number}"
            judged(f"The answer is {word}", right=[f"-{number}"], wrong=[number])
        for minus in LONG:
            for stated in ("The answer is {}", "#### {}", "{}", "We got {}", boxed("{}")):
                judged(stated.replace("{}", minus + number), right=[f"-{number}"], wrong=[number])
            judged(f"3{minus}{number}", wrong=[f"-{number}"])


NEGATIVE = ("It dropped to minus {}", "It came to - {}", "We get - {}", "They reached minus {}.", "about minus {}")
NEGATIVE += (
    "零下{}度",
    "氷点下{}度",
    "気温は氷点下{}度です",
    "영하 {}도",
    "It fell from 10 to minus {}",
    "Result. Minus {}",
)
NEGATIVE += ("答案是零下{}度。", "Réponse : moins {}", "#### minus {}", "the total is negative {}")
SUBTRACTED = (
    "10 minus {}",
    "10マイナス{}",
    "A - {}",
    "the total minus {}",
    "x minus {}",
    "10 apples minus {}",
    "10 - {}",
)


def test_a_word_for_minus_is_a_sign_unless_something_is_before_that_it_is_taken_from():
    for number in ("5", "7", "1,234"):
        for stated in NEGATIVE:
            judged(stated.format(number), right=[f"-{number}"], wrong=[number])
        for stated in SUBTRACTED:
            judged(stated.format(number), right=[number], wrong=[f"-{number}"])


SCRIPTS = {  # tens, hundreds, thousands; 10^4, 10^8, 10^12; digits; whether 零 stands for noughts
    "Chinese": ("十百千", "万亿兆", "一二三四五六七八九", True),
    "Taiwanese": ("十百千", "萬億兆", "一二三四五六七八九", True),
    "Japanese": ("十百千", "万億兆", "一二三四五六七八九", False),
    "Korean": ("십백천", "만억조", "", False),
}


@st.composite
def numerals(draw):
    """A numeral with at least one digit and one power: its text, its value, and the numbers that are parts of it."""
    small, large, digits, noughts = SCRIPTS[draw(st.sampled_from(list(SCRIPTS)))]
    groups = draw(st.lists(st.integers(0, 9999), min_size=1, max_size=4))
    written, value, parts, behind = "", 0, set(), False
    for power, group in reversed(list(enumerate(groups))):
        value = value * 10**4 + group
        if not group:
            continue
        # Behind the last power are as many digits as it has noughts: in 1亿1000 they may stand for 1000万 as well.
        if draw(st.booleans()) and (power or (group >= 1000 and groups[1:2] not in ([], [0]))):
            text = str(group)
        else:
            text = ""
            for place in (3, 2, 1, 0):
                digit = group // 10**place % 10
                if not digit:
                    continue
                if place == 0 and (text or written) and group // 10 % 10 == 0:
                    assume(noughts)
                    text += "零"
                named = digits and draw(st.booleans()) and place
                text += (digits[digit - 1] if named else str(digit)) + (small[place - 1] if place else "")
                parts |= {digit, digit * 10**place}
        space = " " if small[0] == "십" and written and draw(st.booleans()) else ""
        behind = behind or power > 0 or any(sign in text for sign in small)
        written += space + text + (large[power - 1] if power else "")
        parts |= {group, group * 10 ** (4 * power)}
    assume(behind and re.search(r"\d", written))
    return written, value, parts | {int(run) for run in re.findall(r"\d+", written)}


@settings(max_examples=400)
@given(
    numerals(), st.sampled_from(("{}", "答案是{}", "答えは{}です", "정답은 {}입니다", "#### {}", "一共{}元", "{}원"))
)
@pytest.mark.ci
def test_a_numeral_of_powers_has_its_value_and_that_of_no_part_of_it(numeral, stated):
    written, value, parts = numeral
    judged(stated.format(written), right=[str(value)], wrong=[str(part) for part in parts - {value}])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3割", "0.3"),
        ("3割5分", "0.35"),
        ("2と3分の1", "7/3"),
        ("2又3分之1", "7/3"),
        ("2와 3분의 1", "7/3"),
        ("三分之2", "2/3"),
        ("3分の一", "1/3"),
        ("삼분의 2", "2/3"),
        ("3万分の1", "1/30000"),
        ("百分之50", "50"),
        ("5百万", "5000000"),
        ("1.5万", "15000"),
        ("千5百", "1500"),
        ("5千米", "5"),
        ("5千克", "5"),
        ("5조각", "5"),
        ("3만큼", "3"),
        ("5조", "5000000000000"),
        ("3万5", None),
        ("三万5", None),
        ("3千5", None),
        ("5万千億", None),
    ],
)
def test_rates_parts_and_units_that_begin_like_a_power(written, value):
    others = "1 2 3 4 5 10 30 50 1/3 1/2 2/3 1000 3000 30000 50000 35000 30005 3005 3500".split()
    for stated in ("{}", "答案是{}", "答えは{}です", "#### {}"):
        judged(stated.format(written), [value] if value else [], [other for other in others if other != value])


# ---- mathematics: fractions, lists and large numbers as models write them --------------------------------------------

VULGAR = [chr(code) for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))]
STATEMENTS = ("{}", "The answer is {}.", "She needs {} cups", "#### {}", "Answer: {}", "x = {}", boxed("{}"))


@pytest.mark.parametrize("sign", VULGAR)
def test_a_fraction_of_one_sign_is_read_beside_words_and_behind_a_number(sign):
    value = Fraction(unicodedata.numeric(sign)).limit_denominator(100)
    for stated in STATEMENTS:
        judged(stated.replace("{}", sign), [str(value)], [str(value.numerator + 1), str(value.denominator)])
        for mixed in (f"3{sign}", f"3 {sign}"):
            judged(stated.replace("{}", mixed), [str(3 + value)], ["3", str(value), str(value.denominator)])


FRACTIONS = (r"\frac{{{}}}{{{}}}", r"\frac{{ {} }}{{ {} }}", r"\frac {} {}", r"\dfrac{{{}}}{}", r"\tfrac{}{{{}}}")
FRACTIONS += (r"\frac {}{}", r"\cfrac{{{}}}{{{}}}", "{}/{}", "{} / {}")


@pytest.mark.parametrize("form", FRACTIONS)
def test_a_fraction_is_read_however_it_is_set_and_no_part_of_it_is(form):
    for top, bottom in ((1, 2), (3, 4), (7, 3)):
        written, parts = form.format(top, bottom), [str(top), str(bottom), f"{bottom}/{top}", f"{top}{bottom}"]
        for stated in (*STATEMENTS, "It is ${}$ cups"):
            judged(stated.replace("{}", written), right=[f"{top}/{bottom}"], wrong=parts)
        judged(f"{top}/{bottom}", right=[written], wrong=[form.format(bottom, top)])
        if "{{{}}}{{{}}}" in form:
            judged(boxed(f"{top}/-{bottom}"), right=[f"-{top}/{bottom}"], wrong=parts)
            judged(boxed(form.format(top, -bottom)), right=[f"-{top}/{bottom}"], wrong=parts)
            judged(boxed(form.format(-top, -bottom)), right=[f"{top}/{bottom}"], wrong=parts)


@settings(max_examples=100)
@given(st.lists(st.integers(-99, 99).map(Fraction), min_size=2, max_size=4, unique=True), st.randoms())
@pytest.mark.ci
def test_a_list_is_met_by_the_same_values_in_any_order_and_by_no_other(values, rng):
    gold = rng.choice((",", ", ", " , ", " and ")).join(map(str, values))
    other = rng.sample(values, len(values))
    for between in (",", ", ", "; ", " and ", r" \text{ and } ", " or "):
        listed = between.join(map(str, other))
        judged(boxed(listed), right=[gold], wrong=[*map(str, values), str(sum(values))])
        judged(boxed(between.join(map(str, other[1:]))), wrong=[gold])
        judged(boxed(between.join(map(str, [*other, 100]))), wrong=[gold])
    equations = " or ".join(f"x = {value}" for value in other)
    judged(f"The answer is {equations}.", right=[gold], wrong=map(str, values))


NUMBERS = st.integers(-99, 99) | st.fractions(-9, 9, max_denominator=9) | st.sampled_from((0.5, -2.5, 12.75))


@settings(max_examples=100)
@given(st.lists(NUMBERS, min_size=2, max_size=4, unique=True), st.randoms())
@pytest.mark.ci
def test_a_list_is_the_same_with_and_without_a_space_behind_its_commas(values, rng):
    golds = [mark.join(map(str, values)) for mark in (",", ", ")]
    for listed in (mark.join(map(str, rng.sample(values, len(values)))) for mark in (",", ", ", "; ")):
        judged(boxed(listed), right=golds, wrong=map(str, values))
        judged(boxed(f"{listed},100"), wrong=golds)


@pytest.mark.parametrize(
    ("word", "power"), [("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12), ("hundred", 2), ("lakh", 5)]
)
def test_a_large_number_in_words_has_its_value_or_its_word_for_a_unit(word, power):
    for number in ("3", "1.5", "250"):
        value = Fraction(number) * 10**power
        for stated in ("{}", "The answer is ${}.", "It sold {} copies", "#### {}", boxed(r"{}\text{ dollars}")):
            judged(
                stated.replace("{}", f"{number} {word}"),
                right=[f"{int(value):,}", number, f"{number} {word}"],
                wrong=[str(value * 10), f"{number} dozen", "7"],
            )
            judged(stated.replace("{}", str(value)), right=[f"{number} {word}", f"${number} {word}s"])


@pytest.mark.parametrize(
    ("written", "value"),
    [("rs . 30", "30"), ("usd 30", "30"), ("3 / 8", "3/8"), ("8 1 / 3 %", "25/3"), ("12 , 15", "15, 12")],
)
def test_options_of_mathqa_are_met_by_their_values(written, value):
    for stated in ("{}", "The answer is {}", "#### {}", boxed("{}")):
        judged(stated.replace("{}", value), right=[written], wrong=["rs . 31", "3 / 9", "8 2 / 3 %", "12 , 16"])
        judged(stated.replace("{}", written), right=[value], wrong=["3", "8", "12", "1"])


COMPOUND = (
    "{} hours and {} minutes",
    "{} feet {} inches",
    "{} dollars and {} cents",
    "{} days, {} hours",
    "{} h {} min",
)


@pytest.mark.parametrize("form", COMPOUND)
def test_no_part_of_a_quantity_in_two_units_is_the_answer(form):
    for setting in ("{}", "The answer is {}.", "It comes to {}", "#### {}", boxed("{}"), "Answer: {}"):
        judged(setting.replace("{}", form.format(2, 30)), wrong=["2", "30"])
    judged("The answer is 5 days and 3 of them are wet.", right=["5"])


def test_a_number_and_a_half_is_no_whole_number():
    for stated in ("The answer is {} hours", "{}", "It takes {} years."):
        judged(stated.format("2 and a half"), right=["2.5"], wrong=["2", "1/2"])


# ---- mathematics: signs, several numbers and forms that were once misread --------------------------------------------

CURRENCIES = [sign for sign in map(chr, range(0x10000)) if unicodedata.category(sign) == "Sc"]
MONEY = (*CURRENCIES, "R$", "A$", "HK$", "US$", "CHF ", "SEK ", "Rs. ", r"\text{\$}", r"\$", r"\text{₩}")
LATEX_NUMBERS = (
    "{}",
    "{{{}}}",
    "{{{{{}}}}}",
    r"\mathbf{{{}}}",
    r"\bm{{{}}}",
    r"\underline{{{}}}",
    r"\textcolor{{red}}{{{}}}",
)
LATEX_NUMBERS += (r"\left({}\right)", r"\bigl({}\bigr)", "[{}]", "({})", r"\color{{blue}}{{{}}}")
LATEX_MINUSES = ("-", "{-}", "-~", r"-\,", "- ", "\u2212", r"\ensuremath{-}", r"\text{minus }", r"-\!\!")
STATED_MINUSES = (
    *("The answer is {}", "It came to {}.", "#### {}", "x = {}", "答案是{}", "答案是 {}", "答えは {}", "답은 {}", "{}"),
    *("<answer>{}</answer>", "=> {}", "<b>{}</b>", "The answer is *{}*"),
)
SIGNED = (
    "-`{}`",
    '-"{}"',
    "-{{{}}}",
    "-{}",
    "- {}",
    "&minus;{}",
    "&#8722; {}",
    "负的{}",
    "負の{}",
    "-[{}]",
    "-({})",
    "- ({})",
    "-[ {} ]",
)
VALUES = st.one_of(st.integers(1, 9999).map(str), st.sampled_from(("1,234", "0.5", "1/2", "2.75")))


@settings(max_examples=300)
@given(VALUES, st.sampled_from(LATEX_MINUSES), st.sampled_from(LATEX_NUMBERS), st.sampled_from(("", r"\$", " ")))
def test_a_minus_in_a_box_is_a_sign_however_the_number_is_set(number, minus, form, before):
    if "(" in form or "[" in form:
        number = number.replace(",", "")  # (1,234) are two numbers
    if "/" in number:
        number = rf"\frac{{{number[0]}}}{{{number[-1]}}}"
    before = before if form == "{}" else ""
    judged(boxed(minus + before + form.format(number)), right=[f"-{number}"], wrong=[number])
    judged(boxed(form.format(f"-{number}")), right=[f"-{number}"], wrong=[number])
    judged(boxed(form.format(number)), right=[number], wrong=[f"-{number}"])


@settings(max_examples=300)
@given(VALUES, st.sampled_from(SIGNED), st.sampled_from(STATED_MINUSES))
def test_a_minus_is_a_sign_before_brackets_in_html_and_behind_every_verb(number, sign, stated):
    judged(stated.format(sign.format(number)), right=[f"-{number}"], wrong=[number])
    judged(stated.format(number), right=[number], wrong=[f"-{number}"])


@pytest.mark.parametrize("money", MONEY)
def test_a_minus_before_any_currency_is_a_sign(money):
    for number in ("5", "1,234.50"):
        stated_in = ("{}", "The answer is {}.", "#### {}", "Answer: {}", "答案是{}")
        for stated in (
            stated_in if money[0].isascii() and money[0].isalpha() else (*stated_in, boxed("{}"))
        ):  # R: a variable
            for minus in ("-", "\u2212", "- "):
                judged(stated.replace("{}", minus + money + number), right=[f"-{number}"], wrong=[number])
            judged(stated.replace("{}", money + number), right=[number], wrong=[f"-{number}"])


HYPHENS = ("3-{}", "9 - {}", "page-{}", "COVID-{}", "A-{}", "pages 3-{}", "2020-12-{}", "555-{}", "x-{}", "(2)-{}")
HYPHENS += ("[2]-[{}]", "10 - ({})", "10 - CHF {}", "$9 - R${}", "9-₩{}", "> - 4 apples\n> - {} pears", "正負の{}つ")
HYPHENS += ("It is a F-{}", "10-[{}]", "x - ({})", "x&minus;{}", "non-USD {}", "自負の{}")


@pytest.mark.parametrize("form", HYPHENS)
def test_a_hyphen_a_range_or_a_subtraction_is_no_sign(form):
    for number in ("5", "19"):
        judged(form.format(number), wrong=[f"-{number}"])
    if form[0] not in "1$(":
        judged(form.format(5), right=["5"])


SEVERAL = {  # of these numbers none is the answer: where it is stated
    (3, 30): ("3小时30分钟", "3小時30分鐘", "3時間30分", "3시간 30분", "3小时零30分", "3 h 30 min"),
    (3, 5): (
        *("3元5角", "3块5毛", "3天5小时", "3年5个月", "3年5か月", "3년 5개월", "3公里5米"),
        *("3 kg 5 g", "3 gallons 5 quarts", "3 km and 5 m", "3 yards, 5 feet", "3 lbs 5 oz"),
        *(
            "3到5",
            "3至5",
            "3～5",
            "3~5",
            "3〜5",
            "3から5",
            "3元到5元",
            "3%～5%",
            "3 to 5",
            "3 hours to 5 hours",
            "$3$ to $5$",
        ),
        *("3或5", "3或者5", "3または5", "3 또는 5", "3元或5元", "3和5", "3与5", "3と5", "3와 5"),
    ),
    (3, 1): ("3 ± 1", "3±1", "3 +/- 1", "3+/-1", r"3 \pm 1"),
    (2, 10): ("2 ^ 10", "2^10", "2 ^10", "2^ 10", "2 ^ {10}"),
}


@pytest.mark.parametrize(("numbers", "written"), [(numbers, form) for numbers in SEVERAL for form in SEVERAL[numbers]])
def test_none_of_several_numbers_is_the_answer(numbers, written):
    for stated in (
        "{}",
        "{}。",
        "The answer is {}",
        "The answer is {}.",
        "#### {}",
        "答案是{}",
        "Answer: {}",
        "x = {}",
    ):
        judged(stated.replace("{}", written), wrong=map(str, numbers))


def test_a_number_with_a_remainder_is_not_that_number():
    for remainder in ("remainder", "with a remainder of", "with remainder", "R", "r", "余"):
        judged(f"The answer is 5 {remainder} 3", wrong=["5"])
    for stated in ("5R3", "The answer is 5R3", boxed("5R3")):
        judged(stated, wrong=["5", "3"])


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("It fell from 10 to 5", "5"),
        ("It grew by 3 to 5", "5"),
        ("从3到5", "5"),
        ("The answer is 3.14 to 2 decimal places", "3.14"),
        ("The answer is 5 due to 3 more", "5"),
        ("The answer is 5 hours, 2 hours more than before", "5"),
        ("The answer is 5 km, 3 more than 2", "5"),
        ("答案是5个，3个是红的。", "3"),
        ("The answer is ~5", "5"),
        (r"so x is about~5 and \boxed{5}", "5"),
        ("The remainder is 3", "3"),
        ("3和4的和是7", "7"),
        ("90分钟或1.5小时", "1.5"),
    ],
)
def test_a_number_beside_another_is_the_answer_if_it_stands_for_itself(completion, value):
    judged(completion, right=[value])


@pytest.mark.parametrize(
    ("written", "value", "wrong"),
    [
        ("2.5M", "2500000", "2.5"),
        ("$2.5M", "2500000", "2.5"),
        ("5 bn", "5000000000", "5"),
        ("5bn", "5000000000", "5"),
        ("-5M", "-5000000", "-5"),
        ("5k", "5000", "500"),
        ("1'000", "1000", "1"),
        ("1\u2019000", "1000", "1"),
        ("1_000", "1000", "1"),
        ("12'345'678.5", "12345678.5", "12"),
        ("5 and 1/2", "5.5", "5"),
        ("5 and 3/4 cups", "5.75", "5"),
    ],
)
def test_short_scales_groups_and_parts_are_read(written, value, wrong):
    for stated in ("{}", "The answer is {}.", "#### {}", "Answer: {}", "It came to {}"):
        judged(stated.replace("{}", written), right=[value], wrong=[wrong, "0", "000", "1/2", "3/4", "678.5"])


def test_a_whole_number_and_a_fraction_are_a_list_as_well():
    judged("3 and 1/2", right=["3, 1/2", "1/2; 3", "7/2"], wrong=["3", "1/2"])


BOXED = {r"\binom{5}{2}": "10", r"\dbinom{4}{2}": "6", r"\sum_{k=1}^{3}k": "6", r"\sum_{n=0}^{9} (2n+1)": "100"}
BOXED |= {"12~345": "12345", r"5\textdegree": "5", r"5^\circ": "5", r"\bm{5}": "5", r"\underline{5}": "5"}
BOXED |= {
    r"\bm{3\pi}": r"3\pi",
    r"-\left(\frac12\right)": r"-\frac12",
    r"\boldsymbol{-5}": "-5",
    r"\binom{5}{2}+1": "11",
}


@pytest.mark.parametrize("written", BOXED)
def test_a_box_is_read_through_its_layout_and_small_sums_are_worked_out(written):
    value = BOXED[written]
    judged(boxed(written), right=[value], wrong=["1", "2", "3", "12", "345", "1/2", f"{value}+1"])


def test_braces_and_ties_in_a_box_do_not_cut_it():
    judged(r"\boxed {1 / 2}", right=["1/2"], wrong=["1", "2"])
    judged(r"\boxed{3~4}", wrong=["3", "4", "34"])


# ---- mathematics: ASDiv's golds --------------------------------------------------------------------------------------

ASDIV = {  # gold: (right, wrong)
    "9 (apples)": (["9", "9 apples", "#### 9", "The answer is 9 apples."], ["90", "apples", "9; 9"]),
    "36 (sq. inches)": (["36", "36 sq. inches"], ["3.6", "6"]),
    "65.0 (dollars)": (["65", "$65.00"], ["650", "65.5"]),
    "5/2": (["2.5", "5/2", "2 1/2"], ["5", "2", "2/5"]),
    "-(1/3)": (["-1/3", "-0.3333", "\u22121/3"], ["1/3", "3", "-3"]),
    "18; 12": (
        ["18 and 12", "12; 18", "#### 18, 12", r"\boxed{18,12}", "The answer is 18 and 12. They add up to 30."],
        ["18", "12", "18; 12; 6", "18; 18", "18; 13", "-18,12", "18,12,6", "18 and 12 are given. So 6.", "1 8; 12"],
    ),
    "17 (years old); 12 (years old)": (
        [
            "17; 12",
            "#### 17 (years old); 12 (years old)",
            "The answer is 12 and 17",
            "29 in all.\nAna is 17 and Jack is 12.",
        ],
        ["17", "29", "17; 12; 29", "Ana is 17 and Jack is 13"],
    ),
    "9:7": (["9:7", "18:14", "9 to 7", "9/7", "#### 9:7", "The answer is 9 : 7."], ["9", "7", "7:9", "9:17", "16"]),
    "1:2": (["1:2", "The ratio is 2:4.", r"\boxed{\frac{1}{2}}"], ["1 1/2", r"\boxed{1\frac{1}{2}}", "-1/2"]),
    "9:00": (["9:00", "The answer is 9:00."], ["9", "18:00", "0:9"]),
    "10:1": (["10:1", "20:2"], ["10", "1", "1:10"]),
    "2:4:3": (["2:4:3", "4:8:6"], ["2:4", "2:3:4"]),
    "11:45 p.m.": (
        ["11:45 PM", "11:45pm", "#### 11:45 p.m.", "The answer is 11:45 pm."],
        ["11:45", "11:45 a.m.", "45", "1:145 pm"],
    ),
    "5 p.m.": (["5 PM", "#### 5pm"], ["5", "5 a.m."]),
    "11:55 p.m. on 24 December 2014.": (["11:55 PM on 24 December 2014"], ["24 December 2014", "2014"]),
    "Ted": (
        ["ted", "#### Ted", "The answer is Ted. He needs 4 more.", "12*8 < 15*6, so\nTed"],
        ["Molly", "90", "Ted or Molly"],
    ),
    "Vendor 2": (["vendor 2.", "#### Vendor 2"], ["2", "Vendor 1", "Vendor", "Vendor -2"]),
    "B,D": (["B, D", "b , d", r"\boxed{\text{B, D}}", r"\boxed{B, D}"], ["B", "D", "B, C", "BD"]),
    "Book store": (["the book store", "#### A book store."], ["Online", "book"]),
    "Richard's recipe": (["richard\u2019s recipe"], ["Anna's recipe"]),
    "They are equal": (
        ["They are equal.", "#### they are equal", "The answer is: They are equal."],
        ["They are not equal", "equal", "1"],
    ),
    "Yes": (["yes", "Yes.", "The answer is yes", r"\boxed{\text{Yes}}", "A: Yes"], ["No", "1", "yes and no"]),
}


@pytest.mark.parametrize("gold", ASDIV)
def test_each_form_of_asdivs_golds(gold):
    right, wrong = ASDIV[gold]
    for prediction in (gold, f" {gold}\n", f"#### {gold}", f"The answer is {gold}", f"A: {gold}", *right):
        assert accuracy(prediction, gold) == 1.0, prediction
    for prediction in ("", "zzz", "4711", *wrong, *(other for other in ASDIV if other != gold)):
        assert accuracy(prediction, gold) == 0.0, prediction


# ---- mathematics: the data sets' own files ---------------------------------------------------------------------------


def gsm8k_answer(text):
    """GSM8K's `#### (\\-?[0-9\\.\\,]+)` without its commas, read one character at a time."""
    for behind in text.split("#### ")[1:]:
        sign = "-" if behind.startswith("-") else ""
        run = "".join(
            c
            for kept, run in groupby(behind[len(sign) :], key="0123456789.,".__contains__)
            for c in (run if kept else "|")
        )
        if number := run.split("|", 1)[0]:
            return sign + number.replace(",", "")
    return None


@needs_data
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.slow
def test_gsm8ks_own_verdict_on_every_answer(split):
    solutions = [json.loads(line)["answer"] for line in (DATA / "gsm8k" / f"{split}.jsonl").read_text().splitlines()]
    assert len(solutions) == {"train": 7473, "test": 1319}[split]
    verdicts = set()
    for solution, other in zip(solutions, solutions[1:] + solutions[:1], strict=True):
        gold = solution.split("#### ")[1]
        assert accuracy(gold, gold) == accuracy(solution, gold) == accuracy(solution, solution) == 1.0
        assert accuracy(f"{solution}\n\nQuestion: 1 + 1?\n2\n#### 2", gold) == 1.0
        assert accuracy(f"{gold}0", gold) == float(gold == "0")
        assert accuracy(str(int(gold.replace(",", "")) + 1), gold) == 0.0
        same = gsm8k_answer(other) == gsm8k_answer(solution)
        assert accuracy(other, gold) == float(same)
        verdicts.add(same)
    assert verdicts == {True, False}


@needs_data
def test_every_answer_of_svamp_is_met_by_its_value_and_by_no_other():
    problems = json.loads((DATA / "svamp" / "SVAMP.json").read_text())
    assert len(problems) == 1000
    for problem in problems:
        gold = problem["Answer"]
        for form in (
            str(gold),
            f"{gold:.0f}",
            f"{gold:,.0f} apples",
            f"{problem['Equation']} = {gold}",
            f"#### {gold}",
        ):
            assert accuracy(form, str(gold)) == 1.0, form
        for miss in (gold + 1, gold * 10, gold + 0.1, -gold):
            assert accuracy(str(miss), str(gold)) == 0.0, miss


# ---- all graders -----------------------------------------------------------------------------------------------------


def test_verbatim_folds_white_space_and_nothing_else():
    assert verbatim(" 4  and\n3 ", ["4 and 3"])
    assert not verbatim("4 and 3.", ["4 and 3"])
    assert not verbatim("The 4", ["the 4"])
    assert GRADERS["verbatim"]("b", ["a", "b"]) == {"accuracy": 1.0}
    assert GRADERS["verbatim"]("b", []) == {"accuracy": 0.0}


STEMS = "####|The answer is|A:|\\boxed{|\\frac{1}{|}|1/0|1e9|or|NaN|p.m.|Rs. |1,2|.5|1:2|7|-(|;|$|'| |\n".split("|")
TEXT = st.one_of(
    st.text(),
    st.text("0123456789.,/:-$%()^{}\\ \n#*xeAa;\u2212\u00bd\u00b2\u0663\u00a0", max_size=60),
    st.lists(st.sampled_from(STEMS)).map("".join),
)


@settings(max_examples=300)
@given(prediction=TEXT, references=st.lists(TEXT, max_size=2))
def test_no_text_is_refused_and_every_score_is_in_0_to_1(prediction, references):
    for grader in GRADERS.values():
        assert all(0 <= score <= 1 and type(score) is float for score in grader(prediction, references).values())
    assert isinstance(extract_answer(prediction), str)


@settings(max_examples=300)
@given(gold=TEXT)
def test_a_gold_is_right_for_itself(gold):
    assert accuracy(gold, gold) == float(bool(gold.strip()))
    assert GRADERS["qa"](gold, [gold])["exact_match"] == 1.0
    assert verbatim(gold, [gold])


PIECE = (
    "1|1/|1,|111,|11,|1:|1 |1. |1 or |1 to |1e9|5 (|5 am |5;|5\u00b2|\u00bd|12/25/2020 |-|-(| |\n|'|**|the |####|"
    "#### 1|answer is |answer is 1+1=|3万|- 1|-{|-[|~1|&minus;|A$|1'|1到|1 kg |1 ^ |1 and 1/|"
    "\nA:|\\boxed{|\\boxed{{a}|\\frac{|\\text{"
).split("|")


@pytest.mark.parametrize("piece", PIECE)
@pytest.mark.slow
def test_the_time_for_a_text_grows_with_its_length_and_not_with_its_square(piece):
    def seconds(length):
        long = (piece * length)[:length]
        started = time.process_time()
        for gold in ("5", "5; 15", "9:7", "Ted", long + "2"):
            assert accuracy(long, gold) in (0.0, 1.0)
        assert accuracy(long, long) == float(bool(long.strip()))
        return time.process_time() - started

    assert seconds(100_000) < 10 * seconds(25_000) + 0.5  # a quadratic search takes minutes, and 16 times as long
