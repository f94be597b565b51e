"""Which journals stay: those that a run which is killed now could still use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from thyme.train.journals import StepJournals


class Loop:
    """Makes the file and nothing else."""

    @contextmanager
    def journaled(self, path: Path) -> Iterator[None]:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        yield


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix(".step_")) for path in (folder / "rollouts").iterdir())


@pytest.mark.parametrize(("same_bits", "kept"), [(True, [4, 5, 6]), (False, [4])])
def test_journals_of_repeated_steps_stay_while_they_are_of_use(
    same_bits: bool, kept: list[int], tmp_path: Path
) -> None:
    """Saved before step 4, killed in step 7."""
    loop: Any = Loop()
    journals = StepJournals(tmp_path, loop, same_bits=same_bits)
    for step in range(7):
        with journals.step(step):
            assert step in steps(tmp_path)
        journals.forget(next_step=step + 1, saved_step=step // 4 * 4 if step != 3 else 4)
    assert steps(tmp_path) == kept
    with journals.step(7):
        assert steps(tmp_path) == [*kept, 7]
    (tmp_path / "rollouts" / "step_3.jsonl").touch()
    journals.forget(next_step=8, saved_step=8)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_3.jsonl"]


def test_without_a_run_there_are_none(tmp_path: Path) -> None:
    loop: Any = Loop()
    journals = StepJournals(None, loop, same_bits=True)
    with journals.step(0) as journal:
        assert journal is None
    journals.forget(next_step=1, saved_step=0)
