"""What a judge is asked, and how its answer is read."""

import hashlib

import pytest

from thyme.rewards.judge_prompts import CORRECTNESS, consistency_prompt, correctness_prompt, read_verdict


def test_the_prompts_are_those_of_the_release() -> None:
    """SHA-256 of the released templates, the words that stand for what is filled in included."""
    correctness = correctness_prompt("input_question", "gen_answer", "ref_answer")
    consistency = consistency_prompt("gen_solution", "gen_answer")
    digests = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in (correctness, consistency)]
    assert digests == [
        "9e0c132ac306f074ae8f485fec9645b134e26500c6fa2e5b9ca369444295274c",
        "7ca0cf800b8b32e4ec59bf60b0e6a5caad3a8643355f16a1807a7547df823ebb",
    ]


def test_what_is_filled_in_may_hold_anything() -> None:
    prompt = correctness_prompt("{a} gen_answer", "{score} ref_answer %s", r"\frac{1}{2}")
    for text in ("{a} gen_answer\n", "{score} ref_answer %s\n", "\\frac{1}{2}\n", '{"Correctness": score}'):
        assert text in prompt


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"Correctness": 1}', True),
        ('{"Correctness": 0}', False),
        ('```json\n{"Correctness": 1}\n```', True),
        ('Here it is:\n{ "Correctness" : 0 }\nThe answer is wrong.', False),
        ('{"Correctness": "1"}', True),
        ('{"Correctness": 1.0}', True),
        ('{"Correctness": true}', True),
        ('{"Correctness": 1, "why": "the same"}', True),
        ('<think>{"Correctness": 0}? No.</think>{"Correctness": 1}', True),
        ('{"Correctness": 1} {"Correctness": 1}', True),
        ('{"Correctness": 1} {"Correctness": 0}', None),
        ('{"Correctness": 2}', None),
        ('{"Correctness": 0.5}', None),
        ('{"Correctness": "yes"}', None),
        ('{"Correctness": null}', None),
        ('{"Correctness": [1]}', None),
        ('{"Correctness": score}', None),
        ('{"Consistency": 1}', None),
        ('{"Correctness": 1', None),
        ("1", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_there_is_none(text: str, verdict: bool | None) -> None:
    assert read_verdict(text, CORRECTNESS) is verdict
