"""Worked solutions from equations: in each data set's own notation, with the value of the answer or not at all."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptmoe.tasks import load_task
from ptmoe.tasks.equations import worked_solution
from ptmoe.tasks.metrics import correct

DATA = Path(__file__).parents[3] / "shared" / "data"
NUMBERS = st.one_of(st.integers(0, 999), st.decimals(0, 99, places=2, allow_nan=False)).map(str)
TREES = st.recursive(NUMBERS, lambda part: st.tuples(st.sampled_from("+-*/"), part, part), max_leaves=5)


def infix(tree):
    if isinstance(tree, str):
        return tree
    sign, left, right = tree
    return f"({infix(left)}{sign}{infix(right)})"


def prefix(tree):
    return tree if isinstance(tree, str) else " ".join((tree[0], prefix(tree[1]), prefix(tree[2])))


def value(tree):
    if isinstance(tree, str):
        return Fraction(tree)
    sign, left, right = tree[0], value(tree[1]), value(tree[2])
    return {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[sign](right)


def value_of_text(expression):
    return eval(re.sub(r"[\d.]+", lambda found: f"Fraction('{found[0]}')", expression))


WRITTEN = {
    "MAWPS's JSON": lambda tree, _: f"X={infix(tree)}",
    "MAWPS's JSON, unknown last": lambda tree, _: f"{infix(tree)}=x",
    "MAWPS's CSV": lambda tree, _: prefix(tree),
    "SVAMP": lambda tree, _: f"( {infix(tree)} )",
    "ASDiv": lambda tree, answer: f"{infix(tree)}={float(Fraction(answer))}",
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=list(WRITTEN))
@given(tree=TREES.filter(lambda tree: not isinstance(tree, str)))
def test_a_solution_computes_its_answer_and_nothing_else(written, tree):
    try:
        answer = str(value(tree))
    except ZeroDivisionError:
        assert worked_solution(written(tree, "0"), "0") == ""
        return
    solution = worked_solution(written(tree, answer), answer)
    expression, equals, result = solution.partition("\n#### ")[0].rpartition(" = ")
    assert (equals, result) == (" = ", answer)
    assert value_of_text(expression) == value(tree)
    assert correct(solution, [answer])
    assert worked_solution(written(tree, answer), str(value(tree) + 1)) == ""


@pytest.mark.parametrize(
    ("equation", "answer", "solution"),
    [
        ("X=((54.0-19.0)/7.0)", "5", "(54 - 19) / 7 = 5\n#### 5"),
        ("(25/4)*6=37.50", "37.50 (dollars)", "25 / 4 * 6 = 37.50 (dollars)\n#### 37.50 (dollars)"),
        ("x=216*.5", "108", "216 * 0.5 = 108\n#### 108"),
        ("1/3+1/3", "0.6667", "1 / 3 + 1 / 3 = 0.6667\n#### 0.6667"),
    ],
)
def test_a_solution_has_the_brackets_it_needs_and_the_answer_as_it_is_written(equation, answer, solution):
    assert worked_solution(equation, answer) == solution


@pytest.mark.parametrize(
    ("equation", "answer"),
    [
        ("", "5"),
        ("x=5", "5"),
        ("0.4+0.1", "0.3"),  # the set's own mistake
        ("122/15=8 r2", "8 (portfolios)"),
        ("0.00001*200000", "2"),  # Python would write 1e-05
        ("0.33333*3", "1"),
        ("2**3", "8"),
        ("17//5", "3"),
        ("2^3", "8"),
        ("3x+2=11", "3"),
        ("X=0.32=0.21", "0.53"),
        ("1,000-1", "999"),
        ("- 5 3 2", "2"),
        ("- 5", "-5"),
        ("(5+3", "8"),
        ("5+3", "eight"),
        ("5+3", "8; 9"),
        ("+".join(["1"] * 200), "200"),
        ("(" * 150 + "1+1" + ")" * 40, "2"),
        ("__import__('os')", "5"),
    ],
)
def test_what_is_no_plain_computation_of_the_answer_has_no_solution(equation, answer):
    assert worked_solution(equation, answer) == ""


def test_a_placeholder_without_a_number_in_an_equation_costs_the_solution_and_not_the_record(tmp_path):
    (tmp_path / "test.csv").write_text(
        "Question,Numbers,Equation,Answer\nnumber0 and number1 ?,1 2,+ number0 number2,3\n"
    )
    (example,) = load_task("mawps", "test", tmp_path)
    assert (example.input, example.target) == ("Question: 1 and 2 ?\nAnswer:", " #### 3")


@pytest.mark.parametrize("numbers", ["1,000 24.0", "1,000, 24.0", "1,000,24.0", " 1,000  24.0,"])
def test_a_comma_within_a_number_is_not_one_between_two(numbers, tmp_path):
    (tmp_path / "test.csv").write_text(
        f'Question,Numbers,Equation,Answer\nnumber0 and number1 ?,"{numbers}",+ number0 number1,1024\n'
    )
    (example,) = load_task("mawps", "test", tmp_path)
    assert example.input == "Question: 1,000 and 24 ?\nAnswer:"
    assert example.target == " 1000 + 24 = 1024\n#### 1024"


@pytest.mark.skipif(not (DATA / "mawps").exists(), reason="needs the data sets' own files")
@pytest.mark.parametrize("task", ["mawps", "asdiv-a", "svamp"])
def test_nearly_every_record_with_an_equation_has_a_solution(task):
    examples = load_task(task, "test", DATA)
    assert sum("\n#### " in example.target for example in examples) > 0.9 * len(examples)
