"""Is an answer a refusal? Then it earns nothing, whatever word it begins with, and no judge is asked about it."""

from __future__ import annotations

import re

from thyme.rewards.spelling import MAX_CHARACTERS, folded

_CANNOT = (
    r"(?:can ?not|can't|could not|couldn't|unable to|no way of"
    r"|(?:not able|impossible|not possible|difficult|hard|no way) to)"
)
_ADVERB = r"(?: (?:be|reliably|really|definitively|accurately|clearly|possibly|currently|directly))*"
_KNOW = (
    r"(?:tell|told|determined?|say|said|know|known|answer(?:ed)?|identif(?:y|ied)|help|assist|comply|decided?|concluded?"
    r"|infer(?:red)?|verif(?:y|ied)|confirm(?:ed)?|discern(?:ed)?|ascertain(?:ed)?|establish(?:ed)?|make out"
    r"|provide an? (?:definite |definitive )?answer)"
)
_LOOK_AT = r"(?:see|view|access|open|load|read|process|analy[sz]e)"
_DO_NOT = r"(?:do not|don't|did not|didn't)"
_PICTURE = r"(?:image|images|picture|pictures|photo|photos|photograph|figure|screenshot|attachment)"
_GIVEN = (
    r"(?:provided|given|attached|available|uploaded|visible|shown|supplied|included|loaded|accessible|displayed|received"
    r"|found|here|present|to (?:see|look at|analy[sz]e|view|work with))"
)
_INFORMATION = r"(?:information|info|context|data|details?|evidence|input)"
_PLACE = r"(?:desk|cent|sheet|sign|board|booth|point|center|centre|kiosk)"

_REFUSALS = (
    # It cannot be done.
    rf"\b{_CANNOT}{_ADVERB} {_KNOW}(?:ing)?\b",
    rf"\b{_CANNOT} {_LOOK_AT} (?:(?:the|this|that|any|an|a|your) )?{_PICTURE}\b(?! of\b)",
    r"\bno way (?:to|of) \w+",
    # I do not know.
    rf"\b{_DO_NOT} (?:really |actually )?know\b|\bidk\b|\b(?:nobody|no one|no-one) knows\b",
    r"\b(?:am|are|is|i'm|but|was|we're|really|still) not (?:(?:entirely|completely|really|quite|at all|too) )?"
    r"(?:sure|certain)\b",
    r"^(?:not sure|not certain|unsure|uncertain)\b|\b(?:i am|i'm) unsure\b|\bno (?:idea|clue)\b",
    r"^no (?:answer|comment|opinion|context)\b",
    # There is nothing to know it from.
    rf"\b(?:no|without (?:an?|the|any)) (?:\w+ )?{_PICTURE} (?:(?:is|was|are|were|has been|have been) )?{_GIVEN}\b",
    rf"\b(?:no|without (?:an?|the|any)) (?:actual )?{_PICTURE}$",
    r"\bwithout (?:seeing|access to|being able to see)\b",
    rf"\b{_PICTURE} (?:is|was|are|were|seems|appears)(?: to be)? (?:missing|absent|corrupted|broken)\b",
    rf"\b{_PICTURE} (?:(?:is|was|are|were|has|have) not|isn't|wasn't|aren't|weren't|hasn't)(?: been)? {_GIVEN}\b",
    rf"\bmissing {_PICTURE}\b|\b{_PICTURE} missing\b",
    rf"\b{_DO_NOT} (?:see|have|receive|get) (?:the|an|any|a) {_PICTURE}\b(?! of\b)",
    rf"\b{_DO_NOT} have (?:access|enough|sufficient|the ability)\b",
    rf"\b(?:no|not enough|not sufficient|insufficient|lack of|without) (?:\w+ )?{_INFORMATION}\b(?! {_PLACE})",
    # One word, or an apology.
    r"^(?:(?:it is|it's|answer) )?(?:unknown|unclear|undetermined|indeterminate|unanswerable|inconclusive"
    r"|undeterminable|impossible)(?: (?:from|in|to|based on|without)\b.*)?$",
    r"^(?:illegible|unreadable|n/a|not (?:legible|readable|applicable|answerable|determinable|specified|mentioned|known"
    r"|clear|given|provided|available))$",
    r"\b(?:i'm|i am) (?:(?:so|very|really) )?sorry\b|^(?:(?:no|yes),? )?sorry\b|\bmy apologies\b|\bi apologi[sz]e\b",
    r"\bas an ai\b|\blanguage model\b",
    # The same in Chinese.
    r"无法|不知道|看不清|不清楚|不确定|不能确定|难以(?:判断|确定|辨认)|抱歉|对不起|信息不足",
    r"没有(?:提供|给出|看到)?(?:任何)?(?:图片|图像|照片|信息)|(?:图片|图像|照片)(?:缺失|不存在|未提供|没有提供)",
)
_REFUSAL = re.compile("|".join(_REFUSALS))
_WORD_BEFORE = re.compile(r"^(?:yes|no) ?[,.;:!-] ?(?=.)")


def is_refusal(text: str) -> bool:
    """Whether a normal text (`thyme.rewards.spelling`) declines to answer, says that it cannot know, or hedges."""
    text = folded(text[:MAX_CHARACTERS]).replace(",", ", ")
    return any(_REFUSAL.search(said) for said in (text, _WORD_BEFORE.sub("", text).strip()))
