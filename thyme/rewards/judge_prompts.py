"""What a language model is asked as a judge, byte for byte as in Thyme's release, and how its answer is read."""

from __future__ import annotations

import json
import re

_HEAD = "\nYou are an expert about question answering. "
_TAIL = (
    "### Output Format (strictly follow)\n\n"
    "Please provide an integer score to indicate the {score}. Output the score in a JSON dictionary with nothing else "
    'for easy processing, in this form: {{"{score}": score}}.\n\n'
    "Your Evaluation Result:\n"
)

CORRECTNESS = "Correctness"
CONSISTENCY = "Consistency"

_THINKING = re.compile(r"^.*</think>", re.DOTALL)
_OBJECT = re.compile(r"\{[^{}]*\}")


def correctness_prompt(question: str, answer: str, solution: str) -> str:
    """Whether an answer is consistent with the reference answer; the picture is not shown."""
    return (
        f"{_HEAD}I will provide a question, a generated answer to the question and the reference answer. "
        "Please evaluate the Correctness of the generated answer: If the generated answer is consistent with the "
        "reference answer, rate the Correctness as 1, else rate 0.\n"
        "Here is the question, the generated answer for you to evaluate and the reference answer:\n\n\n"
        f"#### Question: \n{question}\n\n\n"
        f"#### Generated Answer: \n{answer}\n\n\n"
        f"#### Reference Answer: \n{solution}\n\n\n" + _TAIL.format(score=CORRECTNESS)
    )


def consistency_prompt(thinking: str, answer: str) -> str:
    """Whether the end of a solution process draws the same conclusion as the answer."""
    return (
        f"{_HEAD}I will provide you a solution process and a final answer to the same question. "
        "Please evaluate the Consistency between the solution process and the final anwer: If the solution process "
        "draws the same conclusion with the final answer, rate the Consistency as 1, else rate 0.\n"
        "Here is the solution process and the final answer for you to evaluate:\n\n\n"
        f"#### Solution Process: \n{thinking}\n\n\n"
        f"#### Final Answer: \n{answer}\n\n\n" + _TAIL.format(score=CONSISTENCY)
    )


def read_correctness(text: str) -> bool | None:
    """The answer to `correctness_prompt`, None if it is none."""
    return read_verdict(text, CORRECTNESS)


def read_consistency(text: str) -> bool | None:
    """The answer to `consistency_prompt`, None if it is none."""
    return read_verdict(text, CONSISTENCY)


def read_verdict(text: str, key: str) -> bool | None:
    """The 0 or 1 that a judge gave as {"Correctness": 1}, whatever stands around it; None if there is no such verdict.

    What precedes a closing `</think>` is not looked at. An answer that gives both, or another number, is none.
    """
    found = set()
    for match in _OBJECT.finditer(_THINKING.sub("", text)):
        try:
            said = json.loads(match[0])
        except json.JSONDecodeError:
            continue
        if key in said:
            score = said[key]
            found.add(int(score) if score in (0, 1, "0", "1") else None)
    (verdict,) = found if len(found) == 1 else (None,)
    return None if verdict is None else bool(verdict)
