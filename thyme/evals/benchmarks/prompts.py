"""What a model is asked: the prompts of Thyme's own evaluation (its branch of VLMEvalKit)."""

import re

from thyme.evals.benchmarks.item import Item

_CHINESE = re.compile("[\u4e00-\u9fff]")
_CHOOSE = "Please select the correct answer from the options above."
_CHOOSE_CHINESE = "请直接回答选项字母。"


def multiple_choice(item: Item) -> str:
    """Hint, question, options by letter, and the request to choose, in Chinese where the question is."""
    prompt = f"Hint: {item.hint}\n" if item.hint else ""
    prompt += f"Question: {item.question}\n"
    if item.options:
        prompt += "Options:\n" + "".join(f"{letter}. {text}\n" for letter, text in item.options.items())
        prompt += _CHOOSE_CHINESE if _CHINESE.search(prompt) else _CHOOSE
    return prompt.rstrip()


def yes_no(item: Item) -> str:
    """The question, to be answered by yes or no."""
    return f"{item.question} Please answer yes or no."


def short(item: Item) -> str:
    """The question, to be answered in a few words."""
    return f"{item.question}\nPlease try to answer the question with short words or phrases if possible."


def bare(item: Item) -> str:
    """The question as it is."""
    return item.question
