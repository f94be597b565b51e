"""Controls beside the run with tools: shares and tables against hand-computed ones."""

from thyme.evals.benchmarks.answers import Answered
from thyme.evals.benchmarks.controls import compare, control_table, solved


def answers(**values: float) -> dict[str, Answered]:
    """By index, what each answer is worth."""
    counts = {"calls": 1, "calls_ok": 1, "repairs": 0, "pictures": 0, "rounds": 1.0, "tokens": 1.0}
    said = {"prediction": "", "extracted": None, "by_judge": False, "status": "answered"}
    return {
        index: Answered(index=index, value=value, best=value, majority=value, **said, **counts)  # type: ignore[arg-type]
        for index, value in values.items()
    }


TOOLS = answers(a=1.0, b=1.0, c=1.0, d=0.0, e=0.0, only_here=1.0)
FREE = answers(a=1.0, b=0.0, c=0.5, d=1.0, e=0.0, only_there=1.0)


def test_what_only_tools_solve() -> None:
    assert solved(FREE, TOOLS) == {
        "only_with_tools": 20.0,  # b
        "lost_by_tools": 20.0,  # d
        "with_both": 40.0,  # a, c
        "also_without": 100 * 2 / 3,
    }
    assert solved(FREE, answers(a=0.0, d=0.0)) == {
        "only_with_tools": 0.0,
        "lost_by_tools": 100.0,
        "with_both": 0.0,
        "also_without": None,
    }


def test_the_table_says_it_where_there_is_something_to_say() -> None:
    text = control_table([compare("tools", TOOLS, TOOLS), compare("tool_free", FREE, TOOLS)], solved(FREE, TOOLS))
    assert "| tools | 6 | 66.7 |  |  |  |  | 1.00 |" in text
    assert "| tool_free | 5 | 50.0 | -10.0 | 1 | 1 | 1.000 | 1.00 |" in text
    assert "Solved only with tools: 20.0 %; lost by tools: 20.0 %.\n" in text
    assert "Of what is right with tools, 66.7 % is right without them too.\n" in text
    nothing = answers(a=0.0)
    assert "Of what is right" not in control_table([compare("tools", nothing, nothing)], solved(FREE, nothing))
