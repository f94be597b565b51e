"""Format rule, answers by rules, and the combination; hard cases first."""

import itertools

import pytest

from thyme.rewards import combine, formatting, result

GOOD = "<think>a</think>\n<answer>7</answer>"
COLORS = "Which color is it?\nA. red\nB. dark blue\nC. yes\nD. MICHIGAN"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1.0),
        ("<think>a\n<code>x</code><sandbox_output>1</sandbox_output></think>\n<answer>two\nlines</answer>", 1.0),
        ("first <think>a</think> <answer>7</answer>", 1.0),
        ("a</think>\t<answer><think></answer>", 1.0),  # <think> need not come first
        (GOOD + "\n", 0.0),
        (GOOD + " ", 0.0),
        ("<think>a</think><answer>7</answer>", 0.0),
        ("<think>a</think>\n\n<answer>7</answer>", 0.0),
        ("<think>a</think>\r\n<answer>7</answer>", 0.0),
        ("<think>a</think> so <answer>7</answer>", 0.0),
        ("<think>a\n<answer>7</answer>", 0.0),
        ("a</think>\n<answer>7</answer>", 0.0),
        ("<think><think>a</think>\n<answer>7</answer>", 0.0),
        ("<think>a</think></think>\n<answer>7</answer>", 0.0),
        (GOOD + GOOD, 0.0),
        ("<think>a</think>\n<answer>7</answer><answer>7</answer>", 0.0),
        ("<think>a</think>\n<answer>7", 0.0),
        ("<answer>7</answer>\n<think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_formatting(text: str, expected: float) -> None:
    assert formatting(text) == expected


RIGHT = [
    ("7", "7"),
    (" 7. ", "7"),
    ("The correct answer is 7.", "7"),
    ("So the final answer is: **7**", "7"),
    ("Answer: seven", "7"),
    ("$7$", "7"),
    ("1,234", "1234"),
    ("1234.0", "1,234"),
    ("0.5", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"1\frac{1}{2}", "3/2"),
    ("1 1/2", "1.5"),
    ("-3", "\u22123"),
    ("1.2e3", "1200"),
    (r"1.2 \times 10^{3}", "1200"),
    ("0.33334", "0.33333"),
    ("5 cm", "5"),
    ("5", "5 cm"),
    ("5 m^2", "5 m^2"),
    ("5 square meters", "5"),
    ("5 apples", "5 apple"),
    ("three apples", "3"),
    ("$5", "5"),
    ("50%", "50"),
    ("50%", "0.5"),
    ("0.5", r"50\%"),
    (r"90^\circ", "90"),
    ("Michigan.", "MICHIGAN"),
    ("the red sign", "Red  sign"),
    (r"\text{blue}", "blue"),
    ("3, 4", "3,4"),
    ("Yes", "yes"),
    ("Yes, there is no dog.", "yes"),
    ("No it is red", "no"),
    ("D", "D"),
    ("(d)", "D"),
    ("D.", "D"),
    ("D. MICHIGAN", "D"),
    ("D", "D. MICHIGAN"),
    ("(D) Michigan", "D. MICHIGAN"),
    ("michigan", "D. MICHIGAN"),
    ("Michigan", "D"),
    ("B", "dark blue"),
    ("B) dark blue", "dark blue"),
    ("C. yes", "yes"),
    (r"x^2 + 1", "x^2 + 1"),
]
WRONG = [
    ("", "7"),
    (None, "7"),
    (" ", ""),
    ("8", "7"),
    ("7 or 8", "7"),
    ("7 or more", "7"),
    ("7 is wrong", "7"),
    ("7 signs or 8", "7"),
    ("7 m and", "7"),
    ("17", "7"),
    ("7", "17"),
    ("201955", "201954"),  # within the relative tolerance, but integers are exact
    ("201954.5", "201954"),
    ("0.334", "0.333"),
    ("1/0", "1"),
    ("-3", "3"),
    ("5 cm", "5 km"),
    ("50%", "5"),
    ("0.5%", "0.5 cm"),
    ("12,34", "1234"),
    ("3 4", "34"),
    ("yes and no", "yes"),
    ("not yes", "yes"),
    ("yesterday", "yes"),
    ("no", "yes"),
    ("C", "D"),
    ("C. MICHIGAN", "D. MICHIGAN"),
    ("D. OHIO", "D. MICHIGAN"),
    ("D. OHIO", "D"),
    ("D or A", "D"),
    ("A dog", "A"),
    ("A", "dark blue"),
    ("blue", "dark blue"),
    ("red", "D"),
    ("a", "an apple"),
    ("the", "7"),
]


@pytest.mark.parametrize(("answer", "solution"), RIGHT)
def test_right_answers(answer: str, solution: str) -> None:
    assert result(answer, solution, COLORS) == 1.0


@pytest.mark.parametrize(("answer", "solution"), WRONG)
def test_wrong_answers(answer: str | None, solution: str) -> None:
    assert result(answer, solution, COLORS) == 0.0


@pytest.mark.parametrize("question", ["Which? (A) red (B) dark blue (C) green", "Which? A: red B: dark blue C: green"])
def test_options_listed_in_one_line(question: str) -> None:
    assert result("dark blue", "B", question) == 1.0
    assert result("A", "red", question) == 1.0
    assert result("C", "dark blue", question) == 0.0


def test_a_letter_counts_without_known_options() -> None:
    assert result("D. anything", "D", "Which?") == 1.0
    assert result("anything", "D", "Which?") == 0.0


class _Judge:
    def __init__(self, verdict: bool) -> None:
        self.verdict = verdict
        self.asked: list[tuple[str, str, str]] = []

    def correct(self, question: str, answer: str, solution: str) -> bool:
        self.asked.append((question, answer, solution))
        return self.verdict

    def consistent(self, thinking: str, answer: str) -> bool:
        raise AssertionError("result does not ask about consistency")


def test_the_judge_decides_what_rules_do_not_accept_and_only_that() -> None:
    kind, strict = _Judge(True), _Judge(False)
    assert result("a kind of azure", "blue", "q", kind) == 1.0
    assert result("a kind of azure", "blue", "q", strict) == 0.0
    assert kind.asked == strict.asked == [("q", "a kind of azure", "blue")]
    assert result("blue", "blue", "q", strict) == 1.0
    assert result("", "blue", "q", kind) == 0.0
    assert len(kind.asked) == len(strict.asked) == 1


def test_combination_is_gated() -> None:
    values = {parts: combine(*parts) for parts in itertools.product((0.0, 1.0), repeat=3)}
    assert values == {
        (0, 0, 0): 0.0,
        (0, 0, 1): 0.5,
        (0, 1, 0): 0.0,  # consistency pays nothing for a wrong answer
        (0, 1, 1): 0.5,
        (1, 0, 0): 1.0,
        (1, 0, 1): 1.5,
        (1, 1, 0): 1.5,
        (1, 1, 1): 2.0,
    }
