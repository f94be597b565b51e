r"""One spelling for what is written in many ways: the first thing that is done to an answer, a solution, a question.

`normal` takes off what wraps a text (tags, markdown, LaTeX text commands, dollar signs, quotes, "The answer is") and
gives each character one form; words, case and mathematics stay. `folded` goes on to what text is compared by.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

MAX_CHARACTERS = 2_000
"""A longer text is taken as it is: no answer is that long, and every rule below stays cheap."""

_HTML = re.compile(
    r"</?(?:answer|b|strong|em|i|u|s|p|br|div|span|font|mark|small|big|center|code|pre|h[1-6]|li|ul|ol|sub|td|tr|a"
    r"|box|bbox|point|ref|quad)(?:\s[^<>]*)?/?>|<\|[a-z_]{1,24}\|>",
    re.I,
)
_POWER = re.compile(r"<sup>\s*([-+]?\w+)\s*</sup>", re.I)
_ENTITY = re.compile(r"&(?:#\d+|#x[0-9a-f]+|[a-z]+\d*);", re.I)

_CHARACTERS = str.maketrans(
    {"：": ": ", "．": ". ", "。": ". ", "，": ", ", "、": ", ", "；": "; ", "！": "! ", "º": "°", "∶": ":"}  # noqa: RUF001
    | {"⁄": "/", "∕": "/", "⋅": "·", "∗": "*", "≈": "≈", "【": "[", "】": "]", "〔": "(", "〕": ")"}  # noqa: RUF001
    | dict.fromkeys("“”„«»「」『』", '"')
    | dict.fromkeys("‘’‚", "'")  # noqa: RUF001
    | dict.fromkeys("‐‑‒–—−", "-")  # noqa: RUF001
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f")
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_BEFORE_VULGAR_FRACTION = re.compile(r"(?<=\d)(?=[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")
_CHINESE_MARK = re.compile(r"^\s*([A-Za-z])、(?!\s*[A-Z](?:[、,\s]|$))\s*")  # "A、cat" is one option, "A、C" two

_FENCE = re.compile(r"^\s*```[a-z]*\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)
_LINK = re.compile(r"\[([^\[\]]+)\]\(https?://[^()\s]*\)")

_LATEX_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|mathtt|bm|boldsymbol|emph|mbox|fbox|boxed"
    r"|operatorname|underline|si|unit)\s*\{([^{}]*)\}"
)
_UNCLOSED_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{(?=[^{}]*$)")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?:s)?\b")
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac(?:\s*(\d)\s*(\d)|(?=\s*\{))")
_LATEX_SPACE = re.compile(r"(?<!\\)\\(?:(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|[,;:! ()\[\]])")
_TILDE = re.compile(r"(?<!\d)~|~(?!\d)")
_DOLLARS = re.compile(r"^(\$\$?)(.+?)\1[.]?$", re.DOTALL)
_QUOTES = "\"'`"
_MARKDOWN = re.compile(r"\*\*|__|^#{1,6}\s+|^[•*]\s+|^>\s+(?=[^\W\d])|^-\s+(?=[(\[]?[A-Z]\b)|`+")

_NOUN = r"(?:(?:correct|final|right|best|most likely|only|true)\s+)*(?:answer|option|choice|result|conclusion)s?"
_ASKED_FOR = (
    r"(?:colou?r|shape|size|number|count|total|sum|value|time|date|year|price|cost|name|title|word|text|letter|brand"
    r"|model|direction|position|length|height|width|area|angle|temperature|speed|weight|age|score|percentage|ratio)"
    r"(?:\s+(?:shown|displayed|written|printed|given|marked|indicated))?"
)
"""What a question asks for by its own word; "The price on the tag is" says no more than "It is"."""
_SHOWN_ON = (
    r"(?:sign|text|label|plate|board|billboard|poster|banner|caption|title|headline|word|display|screen|clock|watch"
    r"|shirt|jersey|cap|logo|sticker|ticket|receipt|page|cover|book|card|tag|button|meter|gauge|door|bus|truck|image|picture)"
)

_PREAMBLE = re.compile(
    r"^(?:so|thus|therefore|hence)\b(?:[,:]\s*|\s+(?=(?:the|my|our|i|we|it|this|that|option|choice)\b"
    r"|[(\[]?[A-Z][)\]]?[.]?$))(?=\S)"
    r"|^(?:among|of|from)\s+(?:the|these|all)\s+(?:(?:given|available|listed|provided)\s+)?(?:options|choices),\s*(?=\S)"
    r"|^(?:ok|okay|well|overall|finally|in conclusion|in summary)[,:]\s*(?=\S)"
    r"|^(?:i|we)\s+(?:think|believe|guess|say|conclude|choose|pick|select|answer|would (?:say|choose|pick|go with)|"
    r"(?:will|'ll) (?:go with|choose|pick)|go with)\b(?:\s+that\b)?:?\s+(?=\S)"
    r"|^(?:i'd (?:say|go with|choose|pick))\b:?\s+(?=\S)"
    rf"|^(?:the|my|our)?\s*{_NOUN}\s*(?:(?:is|are|was|were|would be|should be|must be|will be)"
    r"\b(?!\s+not\b)|[:=]|->|-(?=\s))\s*:?\s*"
    r"|^(?:it|this|that)(?:\s+(?:is|was|(?:would|should|must|has to) be|looks like|(?:seems|appears)(?: to be)?)\b"
    r"|'s\b)(?!\s+not\b)\s+(?=\S)"
    r"|^(?:the|this)\s+(?:statement|claim|sentence|assertion|proposition)\s+is\s+(?=\S)|^it\s+costs\s+(?=\S)"
    rf"|^(?:the\s+)?{_ASKED_FOR}:\s+(?=\S)"
    rf"|^the\s+(?:total\s+)?{_ASKED_FOR}(?:\s+(?:of|on|in|at)\s+(?:the|this|that)(?:\s+[\w'-]+){{1,4}}?)?\s+(?:is|was)\b(?!\s+not\b)"
    r":?\s+(?=\S)"
    rf"|^(?:it|(?:the|this)\s+(?:[\w'-]+\s+){{0,3}}?{_SHOWN_ON}(?:\s+(?:of|on|in|at)\s+(?:the|this|that)(?:\s+[\w'-]+){{1,4}}?)?)"
    r"\s+(?:reads|says|displays|spells)\b:?,?\s+(?=\S)"
    r"|^(?:definitely|clearly|obviously|certainly|probably|likely|most likely)\s+(?=[(\[]?[A-Z][)\]]?[.]?$)"
    r"|^(?:the\s+)?(?:(?:correct|final|right|best)\s+)?(?:option|choice|letter|answer)\s+(?=[(\[]?[A-Z]\b)"
    r"|^(?:options|choices|letters|answers|both)\s+(?=[(\[]?[A-Z]\b)",
    re.I,
)
_FAR_PREAMBLE = re.compile(
    rf"^.{{0,300}}\b{_NOUN}\s*(?:(?:is|are|would be|should be|must be)\b|:)\s*:?\s*", re.I | re.DOTALL
)
_DENIAL = re.compile(r"\b(?:not|never|no|if|whether|unless|either|neither|wrong|incorrect)\b|n't\b", re.I)
_CHINESE_PREAMBLE = re.compile(
    r"^(?:因此|所以|故|综上(?:所述)?|本题|此题)?[,\s]{0,3}(?:我(?:认为|觉得)?|应该?是)?[,\s]{0,3}"
    r"(?:\[?(?:最终|正确)?的?(?:答案|选项|结果)(?:应该?)?\]?\s*(?:是|为|应?选择?|:|(?=[(\[]?[A-Z]))\s*:?\s*"
    r"|应?[选選][择擇项項]?\s*:?\s*(?=[(\[]?[A-Z])|应该?是\s*)"
)
_AT_A_SIDE = re.compile(
    r"^(?:(?:on|at|in|to|towards?) )?(?:the )?"
    r"((?:(?:upper|lower|top|bottom)[ -])?(?:left|right|top|bottom|middle|cent(?:er|re)))"
    r"(?:(?: hand|-hand)? (?:side|corner|part|edge))?$"
)
_IS_RIGHT = re.compile(
    r"(?<=[A-Z)\]])\s+(?:is|are)\s+(?:(?:the|both)\s+)?(?:correct|right|true|best)"
    r"(?:\s+(?:answers?|options?|choices?|ones?))?$|(?<=[A-Z)])\s*(?:选?项|是?(?:正确|对)的?(?:选项|答案)?)$"
)


@lru_cache(maxsize=16_384)
def normal(text: str) -> str:
    """One spelling of characters and nothing around the text; case, words and mathematics stay."""
    if len(text) > MAX_CHARACTERS:
        return text.strip()
    return _bare(_without_preamble(_bare(_without_latex_text(_one_character_set(_without_html(text))))))


@lru_cache(maxsize=16_384)
def normal_question(text: str) -> str:
    """The same for a question, whose lines and words all stay."""
    return _without_latex_text(_one_character_set(_without_html(text[: 32 * MAX_CHARACTERS]))).replace("**", "")


@lru_cache(maxsize=16_384)
def folded(text: str) -> str:
    """What the text of a normal text is compared by: no case, article, end mark, nor spaces at punctuation."""
    text = re.sub(r"\s+", " ", text).strip("\"'` ")
    text = _without_end_marks(text).strip("\"'` ").casefold()
    text = re.sub(r"^(?:the|a|an) (?=.)", "", _AT_A_SIDE.sub(r"\1", text))
    return re.sub(r" ?([,:/=;&]) ?", r"\1", text)


@lru_cache(maxsize=16_384)
def loose(text: str) -> str:
    """A folded text without what writers differ in: dots of initials, hyphens, "&", "https://", "colour"."""
    text = re.sub(r"^https?://|(?<=\w)/$", "", text)
    text = re.sub(r"(?<=[^\W\d_]{3})-(?=[^\W\d_])|(?<=[^\W\d_])-(?=[^\W\d_]{3})", " ", text)
    text = re.sub(r"\b([^\W\d_])\.", r"\1", text.replace("'s", "s").replace("`s", "s"))
    text = re.sub(r"(?<!\S)([a-z]) (?=[a-z](?!\S))", r"\1", text).replace("&", " and ")
    return re.sub(r"\s+", " ", re.sub(r"(?<=\w) colou?r(?:ed)?$|的$", "", text)).strip()


def _without_end_marks(text: str) -> str:
    """ "Stop!" is a word with a mark, but "5!" a number of its own."""
    end = len(text)
    while end and (text[end - 1] in ".?;:, " or (text[end - 1] == "!" and not text[: end - 1][-1:].isdigit())):
        end -= 1
    return text[:end]


def _without_html(text: str) -> str:
    if "<" in text:
        text = _HTML.sub(lambda tag: " " if re.match(r"</?(?:br|p|div|li|td|tr)\b", tag[0], re.I) else "", text)
        text = _POWER.sub(r"^\1", text)
    if "&" in text:
        text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    return text


def _one_character_set(text: str) -> str:
    if text.isascii():
        return _without_runs_of_spaces(text)
    text = re.sub(r"(?<=\d)[．](?=\d)", ".", text)  # noqa: RUF001
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", " ", text)
    text = _CHINESE_MARK.sub(r"\1. ", text)
    text = _SUPERSCRIPT.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = _BEFORE_VULGAR_FRACTION.sub(" ", text)
    return _without_runs_of_spaces(unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS))


def _without_runs_of_spaces(text: str) -> str:
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", text))


def _without_latex_text(text: str) -> str:
    if "\\" in text:
        text = _DEGREES.sub("°", text)
        text = _SHORT_FRACTION.sub(lambda m: rf"\frac{{{m[1]}}}{{{m[2]}}}" if m[1] else r"\frac", text)
        for _ in range(4):
            text = _LATEX_TEXT.sub(r"\1", text)
        text = _UNCLOSED_TEXT.sub("", text)
        if (stripped := text.strip()).startswith("\\boxed{") and stripped.endswith("}"):
            text = stripped[len("\\boxed{") : -1]
        text = _LATEX_SPACE.sub(lambda space: " " if "quad" in space[0] else "", text)
        text = text.replace("\\%", "%").replace("\\$", "$").replace("\\_", "_").replace("\\&", "&")
    return _TILDE.sub(" ", text.replace("{,}", ","))


def _bare(text: str) -> str:
    """Without markdown, dollar signs and quotes around it."""
    text = _LINK.sub(r"\1", _FENCE.sub(r"\1", text.strip()))
    text = _MARKDOWN.sub("", text).strip()
    text = _DOLLARS.sub(r"\2", text).strip().strip("*").strip()
    inner = text.strip(_QUOTES)
    # A mark behind a digit may be inches or minutes, unless another one opened the text.
    return text if text[:1] not in _QUOTES and inner[-1:].isdigit() else inner.strip()


def _without_preamble(text: str) -> str:
    """Without "So I think the answer is" before it and "is correct" behind it."""
    for _ in range(2):
        text = _without_near_preamble(text)
        if (far := _FAR_PREAMBLE.match(text)) is None or _DENIAL.search(far[0]):
            break
        text = text[far.end() :].strip() or text
    return _IS_RIGHT.sub("", text.rstrip(" .!"), count=1) if _IS_RIGHT.search(text.rstrip(" .!")) else text


def _without_near_preamble(text: str) -> str:
    for _ in range(6):
        shorter = _CHINESE_PREAMBLE.sub("", _PREAMBLE.sub("", text, count=1), count=1)
        if shorter == text or not shorter.strip():
            break
        text = shorter.strip()
    return text
