"""Every example runs as its docstring says, and shows what it is there to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, folder: Path) -> list[str]:
    """The lines that an example prints, started elsewhere than in the checkout."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir()), "an example leaves nothing behind"
    return done.stdout.splitlines()


def numbers(line: str) -> list[float]:
    return [float(found) for found in re.findall(r"[-+]?\d+(?:\.\d+)?", line)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_it_is_run_and_is_tested(path: Path) -> None:
    assert (
        f"    python examples/{path.name}\n" in path.read_text() or f"python examples/{path.name} " in path.read_text()
    )
    assert f'run("{path.name}"' in Path(__file__).read_text()


def test_generate_prefills_the_prompt_of_a_group_once(tmp_path: Path) -> None:
    *lines, last = run("generate.py", tmp_path)
    answers = [line for line in lines if line.startswith("answer ")]
    assert len(answers) == 4 and len(set(lines[1::2])) == 4, "four answers that differ"
    for answer in answers:
        _, tokens, mean = numbers(answer)
        assert 1 <= tokens <= 24 and mean < 0
    prompt, prefilled, n = numbers(last)
    assert prompt == prefilled > 9 and n == 4


def test_roll_out_questions_has_a_group_for_each(tmp_path: Path) -> None:
    lines = run("roll_out_questions.py", tmp_path)
    at = [number for number, line in enumerate(lines) if line.endswith("?")]
    assert len(at) == 2 and at[0] == 0 and at[1] == len(lines) // 2 >= 3
    for line in (line for number, line in enumerate(lines) if number not in at):
        tokens, code = numbers(line)[:2]
        assert 1 <= tokens <= 32 and code <= 5 and ": " in line


def test_run_code_repairs_keeps_variables_and_refuses_the_network(tmp_path: Path) -> None:
    isolation, *lines = run("run_code.py", tmp_path)
    assert isolation.startswith("isolation: ") and not isolation.endswith("none")
    starts = [i for i, line in enumerate(lines) if not line.startswith(" ")]
    crop, value, escape = (lines[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True))
    assert crop[0].startswith("crop: OK") and "    image    320 x 240" in crop
    assert len([line for line in crop if line.startswith("    fixed")]) == 3
    assert value[0].startswith("value: OK") and "    printed  (320, 240) 5.0" in value
    assert escape[0].startswith("escape: ERROR") and "PermissionError" in escape[1]


def test_write_a_reward_prefers_the_shorter_of_two_equal_answers(tmp_path: Path) -> None:
    rows = [numbers(line) for line in run("write_a_reward.py", tmp_path)]
    assert len(rows) == 8
    for tokens, reward, _ in rows:
        assert reward == pytest.approx(-0.002 * tokens, abs=6e-4)
    by_length = sorted(rows)
    assert by_length[0][2] == max(row[2] for row in rows) > 0 > by_length[-1][2]
    assert sum(row[2] for row in rows) == pytest.approx(0, abs=0.01)


def test_ask_a_judge_prefers_the_plainer_of_two_right_answers(tmp_path: Path) -> None:
    rows = [numbers(line) for line in run("ask_a_judge.py", tmp_path)]
    assert [row[0] for row in rows] == [9, 9, 10]
    plain, winding, wrong = (row[1] for row in rows)
    assert plain > winding >= 1.0 and wrong == 0.0


def test_call_an_op_draws_the_largest_where_greedy_and_leaves_weightless_rows_alone(tmp_path: Path) -> None:
    lines = run("call_an_op.py", tmp_path)
    said = {line[:17].strip(): numbers(line[17:]) for line in lines if not line.startswith(" ")}
    assert said["tokens"][3:] == said["largest logits"][3:] != said["tokens"][:3]
    assert all(value < 0 for value in said["log-probability"][:3]) and said["log-probability"][3:] == [0, 0, 0]
    rows = said["gradient by row"]
    assert rows[2] == rows[5] == 0 and all(rows[i] > 0 for i in (0, 1, 3, 4))
    # On-policy the ratio is 1, so the loss is minus the weighted sum of advantages: -(2 * 0.7 - 2 * 1.2) / 4.
    assert said["loss"] == [0.25]
    assert any(line.split() == ["ratio", "1.0000"] for line in lines)
