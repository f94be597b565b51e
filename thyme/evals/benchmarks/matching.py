"""What a prediction says, found as VLMEvalKit finds it when no judge is asked, so that scores can be compared.

These rules are looser and stricter than the rewards' (thyme/rewards/answers.py): they look for a letter anywhere near
the end of a text, and know neither units nor formulas. A benchmark's published figures were made with them; a reward
is not to be earned by them.
"""

import re
from collections.abc import Mapping

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED = "Failed to obtain answer via API"
_FIRST_LETTER_OF = "ABCDE"
_PHRASES = (  # two of the list's commas are missing in the original, which joins those phrases
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)


def option(prediction: str, options: Mapping[str, str]) -> str | None:
    """The option that a prediction names: by its letter as a word of its own among the last five words, and no other
    letter in it; else by a text that it holds, and no other option's. None where neither is so.

    A prediction that refuses names "Z", which is no option.
    """
    if _FAILED not in prediction:
        if any(refusal in prediction for refusal in _REFUSALS):
            return "Z"
        words = prediction.translate(_MARKS).split()
        named = [letter for letter in options if letter in words]
        if len(named) == 1 and words.index(named[0]) > len(words) - 5:
            return named[0]
        if not named and "Z" in words:
            return "Z"
    return _option_by_text(prediction.lower(), options)


def _option_by_text(prediction: str, options: Mapping[str, str]) -> str | None:
    if len(prediction) > 2 * sum(map(len, options.values())):
        return None
    held = [letter for letter, text in options.items() if text.lower() in prediction]
    return held[0] if len(held) == 1 else None


def first_letter(prediction: str) -> str | None:
    """The first of A to E in a prediction, phrases such as "The answer is" taken out: MME-RealWorld's rule."""
    inside = re.search(r"<answer>(.*?)</answer>", prediction, re.DOTALL)
    text = (inside[1].strip().upper() if inside else prediction).strip()
    for phrase in _PHRASES:
        text = text.replace(phrase, "")
    found = re.search(f"[{_FIRST_LETTER_OF}]", text)
    if found is not None:
        return found[0]
    if len(text.split()) > 10:
        return None
    # Without a letter, a text that is part of "(a)": the marks, or nothing at all.
    return next((letter for letter in _FIRST_LETTER_OF if text.lower() in f"({letter.lower()})"), None)


def yes_or_no(prediction: str) -> str | None:
    """ "Yes" or "No", whichever of the two words a prediction holds alone."""
    words = without_punctuation(prediction.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "Yes" if "yes" in words else "No"


def boxed_letter(prediction: str) -> str | None:
    r"""The letter A to D in the last \boxed{}, or behind "the answer is": VisuLogic's rule."""
    boxed = _last_boxed(prediction)
    for text in (boxed.strip(), _stated(prediction.replace("<|endoftext|>", ""))):
        if text in ("A", "B", "C", "D"):
            return text
    return None


def _last_boxed(text: str) -> str:
    if len(text) < 3:
        return text
    opened: list[int] = []
    inner = ""
    for mark in re.finditer(r"\\boxed\{|[^\\]\}", text):
        if mark[0].endswith("\\boxed{"):
            opened.append(mark.end())
        elif opened:
            start = opened.pop()
            if not opened:
                inner = text[start : mark.start() + 1]
    if not inner:
        return text
    for command in ("\\text{", "\\rm{", "\\mathbf{", "$", "}"):
        inner = inner.replace(command, "")
    return text if "letter" in inner.lower() or "or" in inner or len(inner) > 2 else inner


def _stated(text: str) -> str:
    for letter in "ABCD":
        if text.endswith((f" {letter}.", f" ({letter}).")):
            return letter
        if text.startswith((f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")):
            return letter
    lower = text.lower()
    for flag in (
        "answer:",
        "the final answer is:",
        "the answer is option:",
        "the answer is:",
        "the correct answer is option:",
        "the correct answer is:",
        "the answer should be:",
        "the final answer is",
        "the answer is option",
        "the answer is",
        "the correct answer is option",
        "the correct answer is",
        "the answer should be",
    ):
        if flag in lower:
            lower = lower.split(flag)[-1].strip().split("\n")[0].split(".")[0]
            if lower.upper() in ("A", "B", "C", "D"):
                return lower.upper()
    return text


def letter_behind_answer(prediction: str) -> str | None:
    """The letter A to H that follows the last "Answer", marks taken out: WeMath's rule."""
    text = re.sub(r"[><:.]", "", prediction.rpartition("Answer")[2].strip()).strip()
    return text[0] if text and text[0] in "ABCDEFGH" else None


def without_punctuation(text: str) -> str:
    """A text without marks: a mark beside a space goes, one between letters becomes a space; if a number has a comma
    for its thousands, all marks go. A full stop goes unless a digit is beside it."""
    grouped = re.search(r"\d,\d", text) is not None
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or grouped else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", out, count=int(re.UNICODE))


def relaxed(prediction: str, target: str, tolerance: float = 0.05) -> bool:
    """ChartQA's rule: numbers, also with a percent sign, may be off by `tolerance` of the target, other answers must be
    the same but for case."""
    given, wanted = _number(prediction), _number(target)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= tolerance
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
