r"""Numbers as they are written: `NUMBER` finds them in a text that `plain` has brought into one form, `value_of` reads
one.

Forms: `72`, `1,080`, `1'080`, `12,34,567`, `.5`, `-$5`, `-CHF 5`, `5%`, `1/6`, `1 / 6`, `3 1/2`, `3½`, `\frac{1}{6}`,
`1e3`, `3.2 × 10^4`, `2.5M`, `negative 5`, `零下5度`, `3분의 1`, `三分之2`, `1億2000万`, `3만 5천`. A minus may be any
of Unicode's minus signs and dashes.

What only looks like a number has no value: `9:7`, `3,5`, `5^2`, `2^n`, `3x`, `3\pi`, `3万5` (35,000 in Chinese, 30,005
in Japanese). It is found all the same, so that no part of it is taken for a number.
"""

import html
import re
import unicodedata
from fractions import Fraction

# Letters of scripts in which a number may follow a letter: Thai, Lao, Burmese, Khmer; Chinese, Japanese, Korean.
_UNSPACED = "\u0e00-\u0e4f\u0e5a-\u0ecf\u0eda-\u0eff\u1000-\u103f\u1780-\u17df" + (
    "\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
)
_WORD = rf"[^\W_{_UNSPACED}]"
# Behind a number it is a factor; µ and Ω are units, and so is the x of `5x faster`.
_SYMBOL = (
    r"[√∛∜α-λν-ωΓΔΘΛΞΠΣΦΨ]|(?:pi|sqrt)(?![A-Za-z])|\\(?:sqrt|pi)(?![A-Za-z])"
    r"|(?<=\d)(?:[aeijnqruvyzXYZ]|x(?!\s(?:as|more|less|the|[a-z]{1,9}er)\b))(?!\w)"
)
_DEGREE = r"[ ]?\{?\s{0,3}(?:\\circ|\\(?:text)?degree|o(?!\w)|'|st(?!\w)|nd(?!\w)|rd(?!\w)|th(?!\w))"  # or an ordinal
# Every repetition below is bounded or over one class of characters, so matching takes linear time at most.
_BETWEEN_GROUPS = "[,'’_\u00a0\u2009\u202f]"
_GROUPED = (
    rf"(?:\d{{1,3}}(?:{_BETWEEN_GROUPS}\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d{{2}}){{1,6}},\d{{3}}(?!\d)|\d+)"  # 12,34,567 too
)
_DECIMAL = rf"(?:{_GROUPED}(?:\.\d+)?|(?<!\.)\.\d+)"
# Of money before a number: any currency's sign, R$ and HK$ as well. `rs . 5` is MathQA's. Between a minus and a number
# three capitals are a currency's code, as in -CHF 5.
_SIGNS = "".join(sign for sign in map(chr, range(0x10000)) if unicodedata.category(sign) == "Sc")
_CURRENCY = rf"(?:[A-Z]{{0,3}}\$|[{_SIGNS}]|(?i:rs[ ]?\.?|usd|eur|gbp|inr))"
_CODE = r"[A-Z]{3}[ \u00a0]?"
_AT_NUMBER = rf"(?=(?:(?:{_CURRENCY}|{_CODE})[ \u00a0]?)?\.?\d)"
SCALES = {"hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9}
SCALES |= {"trillion": 10**12, "dozen": 12, "k": 10**3}
_SHORT_SCALES = {"M": 10**6, "bn": 10**9}  # no unit, as `million` may be
_MORE = r"[.,/:]?\d|[ ]/[ ]\d"
NUMBER = re.compile(
    rf"""
    (?<!{_WORD}) (?<!\^) (?<!\^[ ]) (?<!\^\{{)                 # not inside a word (m2), not an exponent (m^2)
    (?<!\\sqrt) (?<!sqrt[{{(]) (?<![√∛∜]) (?<![√∛∜]\() (?<!\}}\{{)  # nor in √5, \sqrt{{5}} or \frac{{…}}{{5}}
    (?<![±∓]) (?<![±∓][ ])                                     # two numbers
    (?P<sign> (?: (?<![)\]}}%]) - (?: {_CODE} )? )?             # and the - of 10-3, (2)-3, 5%-3 is not a sign
              (?: {_CURRENCY} [ \u00a0]? -? )? )
    (?P<number> {_DECIMAL} )
    (?: [ ]?/[ ]? (?P<over> -?{_DECIMAL} ) (?! {_MORE} )        # 1/2, 1/-2
      | [ \u00a0] (?P<top>\d+) [ ]?/[ ]? (?P<bottom>\d+) (?! {_MORE} )  # 3 1/2
      | [eE] (?P<e> [-+]?\d+ ) (?! {_WORD} )                     # 1e3
      | [ ]? [x×*·] [ ]? 10\^\{{? (?P<ten> [-+]?\d+ ) \}}?      # 3.2 × 10^4
      | (?P<other> (?: (?: [.,/:] | [ ][:/][ ] ) \d+ )+            # none: 9:7, 3,5
                 | [ ]? \^ (?! {_DEGREE} ) [ ]?                # 5^2, 2^n
                   (?: \{{ [^{{}}]{{0,80}} \}} | [-+{{(\\]{{0,3}} [\w.]{{0,80}} ) )
    )?
    (?P<symbol> [ ]? (?: [*·] [ ]? )? (?: {_SYMBOL} ) )?       # nor is 3π
    (?: (?P<short> M | [ ]?bn ) (?! {_WORD} )
      | [ \u00a0]? (?P<scale> {"|".join(SCALES)} ) s? (?! {_WORD} ) )?  # 3 million
    """,
    re.VERBOSE,
)
LONGEST_NUMBER = 300  # of a number's characters and of its exponent: longer numbers are no answers and slow to parse

_LATEX_TERM = r"\s{0,3}(?:\{\s{0,3}([^{}]{1,80}?)\s{0,3}\}|([A-Za-z\d]))"  # in braces, or one letter or digit
_LATEX_FRACTION = re.compile(rf"([\d,]?)\\[cdt]?frac(?![A-Za-z]){_LATEX_TERM}{_LATEX_TERM}")
_LATEX_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|bm|boldsymbol|underline|ensuremath)\s?\{([^{}]{0,200})\}"
)
_LATEX_COLOR = re.compile(r"\\(?:text)?color\s?\{[^{}]{0,40}\}")
_LATEX_SIGN = re.compile(r"\\(cdot|div|pm)(?![A-Za-z])")
_LATEX_SPACE = re.compile(r"\\!\s*|\\[,;: ]|\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])")
_TIE = re.compile(r"~(?!\d)|(?<!\d)~|~(?=\d{3}(?!\d))")  # 12~345 is one number, 3~4 are two
_GROUP = re.compile(r"(?<![\w\]}^])(?<![\w\]}^][ ])\{([-+]|[-+]?[$]?[\d.,/ \u00a0]{1,80})\}")  # {5}, of no command
_SIGNED_BRACKET = re.compile(
    rf"(?<!{_WORD})(?<!\))((?:-|minus|negative)[ \u00a0]{{0,3}})[(\[`\"“][ ]?([\d.,/]{{1,80}})[ ]?[)\]`\"”]"
)  # ASDiv's -(1/3), -[5], -`5`
_ENTITY = re.compile(r"&#?\w{2,10};")  # HTML's &minus;
_VULGAR = re.compile(r"((?<=\d)[ ]?)?([¼-¾⅐-⅞])")
_AND_A_HALF = re.compile(r"(?<=\d) and (?:a|one)[ -]half\b")
_RAISED = re.compile("⁻?[⁰¹²³⁴-⁹]+")
_FROM_RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
# Spaces that do not group digits, and marks of a text's direction, which may stand between a sign and its number.
_SPACES = "\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u200a\u205f\u3000"
_TO_ASCII = str.maketrans(
    "−–－‐‑‒﹣﹘˗➖﹢＋，．：／％＄￥٬٫∶⁄～〜" + _SPACES,
    "----------++,.:/%$¥,.:/~~" + " " * len(_SPACES),
    "\u200b\u200e\u200f\u2060\u2066\u2067\u2068\u2069\ufeff",
)
# These are dashes as well: signs only before a number, where no word or number is before them.
_LONG_DASH = re.compile(r"(?<![^\W_])(?<!\d[ ])(?<![—―ー])[—―ー⁻₋]" + _AT_NUMBER)
# A minus that stands apart, or is a word, where no number is before it: of a lone answer, after a mark, `=`, a bracket
# or a verb. At the start of one of several lines, `-` is a bullet; `the total minus 5` is a subtraction.
_APART = re.compile(
    r"(?i:(?P<sign>(?<!\d)(?<!\d\s)"
    r"(?:(?<![担擔胜勝自背肩承抱正])[负負][的の]?|マイナス|마이너스|영하|零下|氷点下|冰点下)\s{0,3}"
    r"|(?<![^\W_])negative[ \t\u00a0\u2009\u202f]{1,3})"
    r"|(?:-|(?P<word>(?<![^\W_])(?:minus|moins|menos|минус)))[ \t\u00a0\u2009\u202f]{1,3})" + _AT_NUMBER
)
# A mark, an HTML tag, an arrow, a verb or a particle before what is stated.
STATES = re.compile(
    r"(?:[=:(\[{#→]|[A-Za-z=-]>|[是为為はが은는이가]"
    r"|(?<![^\W_])(?:is|are|was|were|be|becomes?|became|equals?|to|gets?|got|gives?|gave"
    r"|obtain|obtained|yields?|makes?|made|reached|reaches|hits?|finds?|found|have|has|had|reads?))[\s*_]{0,3}[$£€¥₹]?\Z",
    re.IGNORECASE,
)
_LEADS_TO_WORD = re.compile(
    r"(?:[.!?]|(?<![^\W_])(?:at|of|by|about|around|roughly|only|exactly|or|and|from|between|below|than))\s{1,3}\Z|\n\Z",
    re.IGNORECASE,
)


def _minus(found: re.Match[str]) -> str:
    text, start = found.string, found.start()
    behind = text[max(0, start - 20) : start]
    alone = start < 20 and behind.strip(" \t$") == "" and "\n" not in text
    word = found["word"] and (_LEADS_TO_WORD.search(behind) or not behind)
    return "-" if found["sign"] or alone or word or STATES.search(behind) else found[0]


# ---- Chinese, Japanese and Korean numerals ---------------------------------------------------------------------------

_DIGITS = {sign: n for signs in ("零一二三四五六七八九", "영일이삼사오육칠팔구") for n, sign in enumerate(signs)}
_DIGITS |= {"〇": 0, "两": 2, "兩": 2}
_POWERS = dict(zip("十百千万萬億亿兆십백천만억조", (1, 2, 3, 4, 4, 8, 8, 12, 1, 2, 3, 4, 8, 12), strict=True))
# Not so in units and words: 千米 (km), 千克 (kg), 百帕 (hPa), 兆瓦 (MW), 5조각 (pieces), 3만큼 (as much as).
_POWER = (
    r"(?:[十万萬億亿십백억]|百(?!帕)|千(?![米克瓦卡焦赫帕伏升兆字])|兆(?![瓦赫字帕比焦位])|천(?!막)|만(?!큼)"
    r"|조(?![각직건항합카금]))"
)
_DIGIT = "[一二三四五六七八九两兩]"
_COMPOSED = re.compile(
    rf"(?:(?<![\d.,])[\d.,]{{0,{LONGEST_NUMBER}}}\d|{_DIGIT})?[ ]?{_POWER}{{1,4}}"
    rf"(?:[ ]?[零〇]?(?:\d[\d.,]{{0,40}}|{_DIGIT})?{_POWER}{{1,4}}){{0,20}}(?:[零〇]?\d+|[ ]\d{{4}}(?!\d))?"
)
_RATE = re.compile(r"(?<![\d.,])(\d{1,2}(?:\.\d)?)割(?![るりっれ])(?:(\d)分)?")
_CARDINAL = (
    r"(?:\d[\d.]{0,40}[十百千万萬億亿십백천만억]{0,4}|[一二三四五六七八九两兩十百千万億亿]{1,7}"
    r"|[일이삼사오육칠팔구십백천만억]{1,7}(?=분의))"
)
_PARTS_OF = re.compile(  # 2と3分の1: the denominator first
    rf"(?<![\d.,])(?:({_CARDINAL})\s?[と又과와]\s?)?({_CARDINAL})\s?(?:分(?P<zhi>之)|分の|분의)\s?"
    r"(\d+(?:\.\d+)?|[一二三四五六七八九两兩十百千]{1,7}|[일이삼사오육칠팔구]{1,7})"
)
_NONE = "0^"  # before what is no one number: a power, so that nothing in it is read


def _composed(found: re.Match[str]) -> str:
    """3万5千 as 35000."""
    written = found[0]
    if not re.search(r"\d", written):
        return written  # 三千 is a word, as `five` is
    value = _cardinal(written)
    return _NONE + re.sub(r"\W", "", written) if value is None else str(value)


def _parts(found: re.Match[str]) -> str:
    """2と3分の1 as 7/3."""
    if not re.search(r"\d", found[0]):
        return found[0]
    if found["zhi"] and found[2] == "百":  # per cent
        return found[4]
    whole, bottom, top = (_cardinal(part) if part else Fraction(0) for part in found.group(1, 2, 4))
    if whole is None or top is None or not bottom:
        return _NONE + re.sub(r"\W", "", found[0])
    return str(whole + top / bottom)


def _rate(found: re.Match[str]) -> str:
    """3割5分, tenths and hundredths, as 0.35."""
    return f"{float(found[1]) / 10 + int(found[2] or 0) / 100:.3f}".rstrip("0").rstrip(".")


def _cardinal(written: str) -> Fraction | None:
    """The value of a numeral of digits and powers of ten; None for what is none, and for 3万5, which is read in two
    ways: behind the last power must be as many digits as it has noughts, or 零."""
    total = thousands = Fraction(0)  # what is complete; what 万, 億 or 兆 may still multiply
    count: Fraction | None = None
    below, below_large, last, nought, width = 4, 16, 0, False, 0  # powers descend
    for token in re.findall(r"[\d.,]*\d|\S", written):
        power = _POWERS.get(token, 0)
        if power and power < 4 and power < below:
            thousands += (1 if count is None else count) * 10**power
            count, below, last, nought = None, power, power, False
        elif 4 <= power < below_large:
            start = count is None and not thousands and not total
            total += (1 if start else thousands + (count or 0)) * 10**power
            thousands, count = Fraction(0), None
            below, below_large, last, nought = 4, power, power, False
        elif power or count is not None:
            return None
        elif token in "零〇" and last:
            nought = True
        elif token in _DIGITS:
            count, width = Fraction(_DIGITS[token]), 1
        elif (number := NUMBER.fullmatch(token)) and not number["other"] and len(token) <= LONGEST_NUMBER:
            count, width = decimal(token), len(token)
        else:
            return None
    if count is not None and last and not (width < last if nought else width == last):
        return None
    return total + thousands + (count or 0)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _vulgar(found: re.Match[str]) -> str:
    """½ as 1/2, and behind a number as a part of it: 3½ as 3 1/2."""
    return ("" if found[1] is None else " ") + unicodedata.normalize("NFKC", found[2]).replace("⁄", "/")


def plain(text: str) -> str:
    """The text with signs, fractions and exponents in ASCII, and without LaTeX and Markdown markup."""
    if "&" in text:
        text = _ENTITY.sub(lambda m: html.unescape(m[0]), text)
    if not text.isascii():
        text = _LONG_DASH.sub("-", text.translate(_TO_ASCII))
        text = _VULGAR.sub(_vulgar, text)
        text = _COMPOSED.sub(_composed, _PARTS_OF.sub(_parts, _RATE.sub(_rate, text)))
        text = _RAISED.sub(lambda m: "^" + m[0].translate(_FROM_RAISED), text)
    if "\\" in text:
        text = text.replace("\\$", "$").replace("\\%", "%").replace("\\times", "×")
        text = _LATEX_SIGN.sub(lambda m: {"cdot": "·", "div": "÷", "pm": "±"}[m[1]], text)
        text = _LATEX_COLOR.sub("", _TIE.sub("\u00a0", text))
        text = _LATEX_TEXT.sub(r" \1 ", _LATEX_SPACE.sub("", text))
        text = _LATEX_FRACTION.sub(lambda m: f"{m[1]} {m[2] or m[3]}/{m[4] or m[5]}".lstrip(), text)
        text = _LATEX_TEXT.sub(r" \1 ", text)  # \mathbf{\frac{1}{2}}
    for _ in range(3 if "{" in text else 0):  # of braces in braces
        text = _GROUP.sub(r"\1", text)
    text = _AND_A_HALF.sub(" 1/2", text.replace("+/-", "±"))
    if "**" in text:
        text = text.replace("\n**", "\n").replace("**", " ")
    text = _SIGNED_BRACKET.sub(r"\1\2", text)
    return _APART.sub(_minus, text.replace("{,}", ",").strip())


def value_of(number: re.Match[str]) -> Fraction | None:
    """The number's value; None for what only looks like a number (`10:30`, `5^2`), for `1/0` and if overlong."""
    if number["other"] or number["symbol"] or len(number[0]) > LONGEST_NUMBER:
        return None
    amount = decimal(number["number"])
    if number["over"]:
        if not (divisor := decimal(number["over"])):
            return None
        amount /= divisor
    elif number["top"]:
        top, bottom = int(number["top"]), int(number["bottom"])
        if top >= bottom or amount.denominator != 1:  # `48 24/2` are two numbers
            return None
        amount += Fraction(top, bottom)
    elif exponent := number["e"] or number["ten"]:
        if abs(int(exponent)) > LONGEST_NUMBER:
            return None
        amount *= Fraction(10) ** int(exponent)
    amount *= _SHORT_SCALES.get((number["short"] or "").strip(), 1)
    return -amount if "-" in number["sign"] else amount


def decimal(text: str) -> Fraction:
    return Fraction(int(text)) if text.isdecimal() else Fraction(re.sub(_BETWEEN_GROUPS, "", text))


# A unit after a number is ignored; but `5 p.m.` is not 5, and neither is a number followed by more digits, or by an
# operator and a letter.
UNIT = re.compile(r"(?<=[\d%])\s{0,3}\([^()]{0,100}\)")
_STARTS = re.compile(rf"[\W_]*(?:\d|{_CODE}\d|{_CURRENCY})")
_LETTER = re.compile(r"[^\W_]")
_NO_UNIT = re.compile(
    r"\s{0,3}[ap]\.?\s?m\b|\s{0,3}o'clock|\s?(?:[±∓]|r\d)|[^\sA-Za-z]{0,2}\d"
    r"|\s?(?:[-+*×·÷]\s?[A-Za-z]|/\s?[knxyz])(?![A-Za-z])",
    re.IGNORECASE,
)


def numbers_of(answer: str) -> tuple[Fraction, ...] | None:
    """The values of an answer that consists of numbers and units only (`$5`, `9 (apples)`, `5; 15 km`), else None."""
    if len(answer) > LONGEST_NUMBER:
        return None
    values = []
    for part in UNIT.sub("", answer).strip(" \t\n;").split(";"):
        found = list(NUMBER.finditer(part)) if _STARTS.match(part) else []
        if len(found) != 1 or _LETTER.search(part, 0, found[0].start()) or _NO_UNIT.match(part, found[0].end()):
            return None
        if (amount := value_of(found[0])) is None:
            return None
        values.append(amount)
    return tuple(values)
