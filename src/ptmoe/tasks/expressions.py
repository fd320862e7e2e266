r"""Answers that are more than numbers, as MATH has them: `3\pi`, `\frac{\sqrt{3}}{2}`, `(3, \frac{\pi}{2})`, `x+1`.

Two are equal where `math-verify` (https://github.com/huggingface/Math-Verify) finds them equal. It parses LaTeX into
SymPy. Its time-outs are signals, which a thread cannot have, so what could take long is left out before: towers of
powers, factorials, sums and integrals are right only as they are written.
"""

import logging
import math
import re
from functools import lru_cache
from threading import Lock
from typing import Any

LONGEST = 200  # characters of an expression
_MOST_DIGITS = 10**4  # of a number that powers make

_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+([^\s{}$\\]+))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{[^{}]*\}")
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|d?t?frac|times|cdot|div|approx|quad|qquad|circ|degree|[bB]igg?[lr]?)(?![A-Za-z])"
    r"|\\[,;:! %$()\[\]]|\^\{?\s*\\circ\s*\}?"
)
_NESTED = re.compile(r"frac\s*\{[^{}]*(?:\}\s*\{[^{}]*)?\{")  # a fraction in a fraction, a root in a fraction
_SCIENTIFIC = re.compile(r"(?<=\d)[eE](?=[-+]?\d)")  # 1e3: no variable
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|[√π∞]")
# Metres, grams, …; capitals: litres, amperes, kelvins, …
_UNIT = r"\s*[A-Zmgshltdcpw/](?:[A-Zmgshltdcpw\s]|\^\{?\d\}?|[²³/])*"
_QUANTITY = re.compile(rf"[-+$£€¥\d.,/\s]*\d{_UNIT}\s*")
_TIME = re.compile(r"\d\s*[ap]\.?\s?m\b", re.IGNORECASE)
_HEAVY = re.compile(
    r"!|\d{50}|\^\s*\{[^{}]*\^|\^\s*\S\^|\\(?:i*int|oint|sum|prod|lim|d?binom|gcd|lcm|limits)(?![A-Za-z])"
)
_POWER = re.compile(r"\^\s*\{?\s*-?\s*(\d+)")
_UNICODE = (
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"π|(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile("∞"), r"\\infty "),
    (re.compile("[−–－]"), "-"),
)
_SPACES = re.compile(r"\s+|\\[,;:! ]|\\(?:left|right|displaystyle)(?![A-Za-z])")
_LOCK = Lock()  # math-verify does not say that it may be used by several threads


def last_boxed(text: str) -> tuple[int, str] | None:
    r"""Where the last `\boxed{…}` starts, and what is in it, braces of any depth included; None if there is none, or if
    it is not closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    box = _BOX.match(text, start) if start >= 0 else None
    if box is None or box[1]:
        return (start, box[1]) if box else None
    depth = 1
    for brace in _BRACE.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return start, text[box.end() : brace.start()]
    return None


def is_expression(text: str, *, in_mathematics: bool = True) -> bool:
    r"""Whether a text is one mathematical expression, and more than numbers with units.

    Args:
        text: an answer, in LaTeX or plain.
        in_mathematics: single letters are variables, as in `\boxed{5x}`; otherwise only signs such as `\pi` count.
    """
    if len(text) > LONGEST or text.count("{") != text.count("}") or "\\boxed" in text:  # cut off, or damaged
        return False
    bare = _SCIENTIFIC.sub("", _LAYOUT.sub(" ", _TEXT.sub(" ", text))).strip(" .$")
    commands = _COMMAND.findall(bare)
    letters = re.findall(r"[^\W\d_]+", _COMMAND.sub(" ", bare))
    if not all(len(run) == 1 or set(run) <= set("xyz") for run in letters) or not "".join(letters).isascii():
        return False
    if commands or _NESTED.search(text) or not in_mathematics:
        return bool(commands or _NESTED.search(text))
    if re.fullmatch(r"(?:[(\[]|\\\{).*,.*(?:[)\]]|\\\})", bare) or re.search(r"\d\s*[\^_!]", bare):
        return not _QUANTITY.fullmatch(bare)
    has_variable = bool(letters) and re.search(r"[\d^+*/=<>-]", bare) is not None
    return has_variable and not _QUANTITY.fullmatch(bare) and not _TIME.search(bare)


def equal(reference: str, answer: str) -> bool | None:
    """Whether an answer is the reference's expression; None if math-verify cannot read one of the two."""
    reference, answer = reference.strip(" .$"), answer.strip(" .$")
    if _SPACES.sub("", reference) == _SPACES.sub("", answer):
        return True
    return _equal(reference, answer)


@lru_cache(maxsize=2**14)
def _equal(reference: str, answer: str) -> bool | None:
    from math_verify import verify

    with _LOCK:
        parsed = _parsed(reference), _parsed(answer)
        if None in parsed:
            return None
        return bool(verify(*parsed, timeout_seconds=None))


@lru_cache(maxsize=2**12)
def _parsed(text: str) -> Any:
    """As SymPy has it; None for what cannot be parsed or could take long."""
    from math_verify import LatexExtractionConfig, parse

    for sign, command in _UNICODE:
        text = sign.sub(command, text)
    if len(text) > LONGEST or _HEAVY.search(text) or math.prod(map(int, _POWER.findall(text))) > _MOST_DIGITS:
        return None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no time-out
    found = parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None
