"""Which characters are trained: the table of outputs, the three rules, malformed text."""

import pytest

from thyme.train.masks import LOSS_RULES, loss_spans

OUT = "<sandbox_output><image></sandbox_output>"


def trained(response: str, rule: str) -> list[str]:
    return [response[start:end] for start, end in loss_spans(response, rule)]


@pytest.mark.parametrize(
    ("response", "paper", "code", "everything"),
    [
        ("just text", ["just text"], ["just text"], ["just text"]),
        ("", [], [], []),
        (f"a{OUT}b", ["a", "b"], ["a", "b"], ["a", "b"]),
        (f"a{OUT}b{OUT}c", ["c"], ["b", "c"], ["a", "b", "c"]),
        (f"a{OUT}b{OUT}c{OUT}d", ["d"], ["c", "d"], ["a", "b", "c", "d"]),
        (f"a{OUT}b{OUT}", [], ["b"], ["a", "b"]),  # nothing follows the last output
        (f"a{OUT}{OUT}c", ["c"], ["c"], ["a", "c"]),  # nothing between the outputs
        ("a<sandbox_output>3\n4</sandbox_output>b", ["a", "b"], ["a", "b"], ["a", "b"]),  # newlines inside
    ],
    ids=["none", "empty", "one", "two", "three", "ends-in-output", "touching", "text-output"],
)
def test_table(response: str, paper: list[str], code: list[str], everything: list[str]) -> None:
    assert trained(response, "paper") == paper
    assert trained(response, "code") == code
    assert trained(response, "all") == everything


@pytest.mark.parametrize("rule", LOSS_RULES)
def test_sandbox_text_is_never_trained(rule: str) -> None:
    for response in (
        "a<sandbox_output>secret",  # never closed: the rest is the sandbox's
        "a<sandbox_output>secret<sandbox_output>secret</sandbox_output>b",
        "a</sandbox_output>b",
        "a<image>b",
    ):
        for piece in trained(response, rule):
            assert piece in ("a", "b")


def test_spans_are_ascending_and_disjoint() -> None:
    response = f"a{OUT}b{OUT}c<image>d{OUT}e"
    for rule in LOSS_RULES:
        flat = [edge for span in loss_spans(response, rule) for edge in span]
        assert flat == sorted(set(flat))


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="paper, code, all"):
        loss_spans("a", "first")  # type: ignore[arg-type]
