"""A worked solution from the equation that a word problem comes with, in the form in which GSM8K's solutions end.

X=((54.0-19.0)/7.0)             MAWPS's JSON; also `54-19=x`, and the expression alone as in SVAMP
/ - number0 number1 number2     MAWPS's CSV: operators first
(54-19)/7=5                     ASDiv
"""

import ast
import re
from fractions import Fraction

from ptmoe.tasks.numerals import numbers_of
from ptmoe.tasks.records import number_text

_NUMBER = re.compile(r"\d*\.?\d+")
_UNKNOWN = re.compile(r"^\s*[A-Za-z]\s*=|=\s*(?:[A-Za-z]|-?[\d.]+)\s*$")
_ARITHMETIC = re.compile(r"[-+*/().\d\s]{1,200}")  # the longest of the data sets above has 46 characters
_TOLERANCE = Fraction(1, 10_000)  # of 1/3 as 0.3333, as answers are graded; a whole number is exact


def worked_solution(equation: str, answer: str) -> str:
    """`(54 - 19) / 7 = 5` and, in a line of its own, `#### 5`.

    Returns:
        "" where the equation cannot be read, needs more than the four operations, or has another value than the answer,
        as it does in some records of each of the sets.
    """
    expression = _UNKNOWN.sub("", equation)
    values = numbers_of(answer)
    if values is None or len(values) != 1 or not _ARITHMETIC.fullmatch(expression):
        return ""
    try:
        if expression.split()[:1] in (["+"], ["-"], ["*"], ["/"]):
            expression = _infix(expression)
        tree = ast.parse(_NUMBER.sub(lambda number: number_text(number[0]), expression.strip()), mode="eval")
        difference = abs(_value(tree.body) - values[0])
    except (ValueError, SyntaxError, StopIteration, ZeroDivisionError):
        return ""
    written = ast.unparse(tree)
    if not isinstance(tree.body, ast.BinOp) or "e" in written:  # a mere number; 0.00001 would stand as 1e-05
        return ""
    has_its_value = difference <= (0 if values[0].denominator == 1 else _TOLERANCE)
    return f"{written} = {answer}\n#### {answer}" if has_its_value else ""


def _infix(prefix: str) -> str:
    words = iter(prefix.split())

    def operand() -> str:
        word = next(words)
        return f"({operand()} {word} {operand()})" if word in "+-*/" else word

    return " ".join([operand(), *words])  # what is left over is a syntax error


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left, ast.Add(), right):
            return _value(left) + _value(right)
        case ast.BinOp(left, ast.Sub(), right):
            return _value(left) - _value(right)
        case ast.BinOp(left, ast.Mult(), right):
            return _value(left) * _value(right)
        case ast.BinOp(left, ast.Div(), right):
            return _value(left) / _value(right)
    raise ValueError("not one of the four operations")
