r"""Answers that are more than numbers, as MATH has them: `3\pi`, `\frac{\sqrt{3}}{2}`, `(3, \frac{\pi}{2})`, `x+1`.

Two are equal where `math-verify` (https://github.com/huggingface/Math-Verify) finds them equal. It parses LaTeX into
SymPy. Its time-outs are signals, which a thread cannot have, so what could take long is left out before: towers of
powers, factorials, long sums and integrals are right only as they are written.
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

_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}(\^\{?-?\d\}?)?")
_DRESS = r"\\(?:bm|boldsymbol|underline|ensuremath)(?![A-Za-z])"  # commands that change how an answer looks alone
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|d?t?frac|approx|quad|qquad|circ|(?:text)?degree|[bB]igg?[lr]?)(?![A-Za-z])"
    rf"|{_DRESS}|\\[,;:! %$()\[\]]|\^\{{?\s*\\circ\s*\}}?|\^\{{\s*\}}"
)
_OPERATION = re.compile(r"\\(?:times|cdot|div)(?![A-Za-z])")
_NESTED = re.compile(r"frac\s*\{[^{}]*(?:\}\s*\{[^{}]*)?\{")  # a fraction in a fraction, a root in a fraction
_SCIENTIFIC = re.compile(r"(?<=\d)[eE][-+]?(?=\d)")  # 1e-3: neither a variable nor a difference
_RUN = re.compile(r"[^\W\d_]+")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|[√∛∜π∞]")
# What two or three letters are, if they are no product of variables.
_UNITS = frozenset(
    "mm cm dm km mg kg lb lbs oz ml cl hl hr hrs min mins sec secs ms yr yrs wk wks mo ft in yd mi pt qt gal sq cu mph"
    " kph kmh hz khz mhz ghz kw mw gw kwh wh pa kpa hpa mpa kv mv ma kj mj ev kev mev gb mb kb tb kbs bps db rpm psi"
    " atm bar ppm rad deg mol cal usd eur gbp inr cad aud rs ct cts pts pcs doz tsp tbsp cc st nd rd th am pm".split()
)
_ENGLISH = frozenset(
    "an as at be by do go he if is it me my no of on or so to up us we yo and the ok mr ms dr vs".split()
)
_FUNCTIONS = frozenset("ln log sin cos tan exp sqrt".split())
_NO_PRODUCTS = _UNITS | _ENGLISH | _FUNCTIONS
# A number of metres, grams, …; capitals: litres, amperes, kelvins, … Of `5t` and `5p`, the letter is a variable:
# tonnes, days, cents, pence, weeks stand apart.
_UNIT = r"(?:(?<=\s)[tdcpw]|[mgshlABCFGHJKLMNTVW])(?![A-Za-z])(?:\^\{?-?\d\}?|[²³])?"
_QUANTITY = re.compile(rf"[-+]?[$£€¥\d.,/\s{{}}]*[\d}}]\s*/?\s*{_UNIT}(?:[\s/·*]+{_UNIT})*\s*")
# Not the dash of a list, and no part of an equation, whose right side is the answer.
_ARITHMETIC = re.compile(
    r"(?:\d\s*[A-Za-z]{2,12}|[\d)}\]%!|])\s*[-+*·×÷]\s*[-+]?\s*[$£€]?[\d.({\\√|]|[\d)}]\s*\(\s*-?\s*\.?\d[^A-Za-z]*\)|-\s*\(\s*-|\|[^|]*\d[^|]*\|"
)
_MAY_BE_ARITHMETIC = re.compile(r"[-−–－‐‑‒﹣+*·×÷(|]|\\(?:times|cdot|div)")
_NO_ARITHMETIC = re.compile(r"[=≈<>~]|\b(?:and|or)\b|\\(?:approx|sim|leq?|geq?|to)(?![A-Za-z])")
_WORDS_BEHIND = re.compile(
    r"(?<=[\d)}\s])(?<![A-Za-z][ ])[A-Za-z]{2,20}(?:[ ][A-Za-z]{1,20}){0,8}(?=\s*(?:[-+*·×÷.]|$))"
)
_MARK = re.compile(r"[\d^+*/=<>|!-]|[A-Za-z)]'(?![A-Za-z])")
_WORDS = re.compile(r"\d\s*[ap]\.?\s?m\b|^n/a$", re.IGNORECASE)
# What math-verify would not see, such as primes and the base of 1010_2, is left out as well.
_HEAVY = re.compile(
    r"!|'|\d\s*_|\d{50}|\^\s*\{[^{}]*\^|\^\s*\S\^|\\(?:i*int|oint|prod|lim|gcd|lcm|limits)(?![A-Za-z])"
    r"|\\[dt]?binom(?!\s*\{\s*\d{1,2}\s*\}\s*\{\s*\d{1,2}\s*\})"
    # a short sum is not heavy, of what expands into few terms
    r"|\\sum(?!\s*_\s*\{\s*[a-z]\s*=\s*\d\s*\}\s*\^\s*(?:\{\s*1?\d\s*\}|\d)"
    r"(?!.*(?:\\(?:sum|[dt]?binom)|[)}\]]\s*\^|\^\s*\{?\s*\d\d)))"
)
_POWER = re.compile(r"\^\s*\{?\s*-?\s*(\d+)")
_DASH = re.compile("[−–－‐‑‒﹣]")
_UNICODE = (
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"π|(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<=\d)\s+i(?![A-Za-z])"), "i"),
    (re.compile("∞"), r"\\infty "),
    (re.compile(r"∛\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))"), r"\\sqrt[3]{\1\2}"),
    (re.compile(r"(?<![A-Za-z\\])(ln|log|sin|cos|tan|exp)(?![A-Za-z])"), r"\\\1 "),
    (_DASH, "-"),
    (re.compile(_DRESS), ""),
    (re.compile("[·∙⋅]"), r"\\cdot "),
    (re.compile(r"(?<=[\d)])(?<![_^]\d)\s*\("), r"\\cdot ("),  # math-verify does not read 2(3)
    (re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))(?![^(\[]*[)\]])"), ""),  # 1,200; but (1,200) has two numbers
)
# In braces, as math-verify takes the letters of 3ab, 3bh and 5t for units, and leaves them out.
_PRODUCT = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,3}(?![A-Za-z])|(?<=\d)[A-Za-z](?![A-Za-z\d])")
_SPACES = re.compile(r"\s+|\\[,;:! ]|\\(?:left|right|displaystyle)(?![A-Za-z])")
_SHORT = re.compile(r"(?<=[_^])\{(\w|(?<=_\{)\d{1,3})\}")
_EITHER_SIGN = re.compile(r"\\(?:pm|mp)(?![A-Za-z])|[±∓]")
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
    bare = _bare(text)
    commands = _COMMAND.findall(bare)
    plain = _COMMAND.sub(" ", bare)
    letters = list(_RUN.finditer(plain))
    if not all(_is_variable(run) or run[0] in _FUNCTIONS for run in letters):
        return False
    if commands or _NESTED.search(text) or not in_mathematics:
        return bool(commands or _NESTED.search(text))
    if re.fullmatch(r"(?:[(\[]|\\\{).*,.*(?:[)\]]|\\\})", bare) or re.search(r"[\d)}|]\s*[\^_!]", bare):
        return not _QUANTITY.fullmatch(bare)
    if not letters:
        return has_arithmetic(text)
    return _MARK.search(bare) is not None and not _QUANTITY.fullmatch(bare) and not _WORDS.search(bare)


def has_arithmetic(text: str) -> bool:
    r"""Whether numbers are added, subtracted, multiplied or divided in an answer, as in `10 + 3 apples`, and the result
    is not there. `2/3` is a number."""
    if len(text) > LONGEST or not _MAY_BE_ARITHMETIC.search(text) or _NO_ARITHMETIC.search(text):
        return False
    bare = _bare(text)
    return _ARITHMETIC.search(bare) is not None and not re.fullmatch(r"[(\[].*,.*[)\]]", bare)


def without_words(text: str) -> str:
    """Arithmetic without its words and units, if they are all the same: `10 km + 3 km` is `10 + 3`."""
    text = re.sub(r"\\?\$|[£€]", "", _TEXT.sub(_letters, text))
    found = list(_WORDS_BEHIND.finditer(text))
    if len({word[0].strip() for word in found}) != 1 or any(map(_is_variable, found)):
        return text
    return _WORDS_BEHIND.sub(" ", text)


def _bare(text: str) -> str:
    """Without layout and units in \\text{…}."""
    text = _DASH.sub("-", _OPERATION.sub("·", _TEXT.sub(_letters, text))).replace("{-}", "-")
    return _SCIENTIFIC.sub("", _LAYOUT.sub(" ", text)).strip(" .$")


def _letters(found: re.Match[str]) -> str:
    r"""A variable in `\mathrm{…}` or `\text{…}`; a space for a unit and words."""
    inner = found[1].strip()
    run = _RUN.fullmatch(inner)
    variable = run and len(inner) < 3 and _is_variable(run)
    if not variable or (len(inner) == 1 and _QUANTITY.fullmatch(f"1 {inner}")):
        return " "
    return inner + (found[2] or "")


def _is_variable(run: re.Match[str]) -> bool:
    """Whether letters are variables, as in x, 4ac and xyz: no unit, no word."""
    letters, text = run[0].rstrip(" ."), run.string
    if len(letters) == 1 or set(letters) <= set("xyz"):
        return letters.isascii()
    if len(letters) > 3 or not letters.isascii() or letters.lower() in _NO_PRODUCTS:
        return False
    beside = text[max(0, run.start() - 1) : run.start()] + text[run.end() : run.end() + 1]
    return len(letters) == 2 or re.search(r"[\d^+*/=]", beside) is not None


def equal(reference: str, answer: str) -> bool | None:
    """Whether an answer is the reference's expression; None if math-verify cannot read one of the two."""
    reference, answer = (text.lstrip(" $").rstrip(" .$") for text in (reference, answer))  # the point of .5x stays
    if _compact(reference) == _compact(answer):
        return True
    return _equal(reference, answer)


def _compact(text: str) -> str:
    return _DASH.sub("-", _SHORT.sub(r"\1", _SPACES.sub("", text)))


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

    text = _TEXT.sub(lambda found: found[0] if (letters := _letters(found)) == " " else letters, text)
    for sign, command in _UNICODE:
        text = sign.sub(command, text)
    text = _PRODUCT.sub(lambda run: "".join(map("{{{}}}".format, run[0])) if _is_variable(run) else run[0], text)
    if len(_EITHER_SIGN.findall(text)) == 1:  # math-verify reads it between two terms, but in no fraction
        left, equals, right = text.rpartition("=")
        text = left + equals + ",".join(_EITHER_SIGN.sub(sign, right) for sign in "+-")
    if len(text) > LONGEST or _HEAVY.search(text) or math.prod(map(int, _POWER.findall(text))) > _MOST_DIGITS:
        return None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no time-out
    found = parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None
