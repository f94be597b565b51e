"""The evidence stage: what a check is shown, and what the built-in one drops."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.build.endpoint import picture
from tests.build.test_rules import TARGET, boxed, drafted, raw
from thyme.build.boxes import Box
from thyme.build.draft import Draft
from thyme.build.evidence import Case, lacking, load_check
from thyme.build.scenarios import assign


def shown(box: Box) -> Draft:
    """A draft whose code crops a box, with the crop that it gives."""
    return drafted(boxed(box), images=(picture(1).crop(tuple(int(v) for v in box)),))


def test_the_built_in_check_drops_a_crop_that_misses_the_target() -> None:
    pytest.importorskip("thyme.rewards.evidence")
    check, made = load_check("builtin"), assign(raw(), "crop", 0)
    assert check is not None
    assert asyncio.run(lacking(check, made, shown(TARGET))) is None
    said = asyncio.run(lacking(check, made, shown(Box(150, 100, 230, 170))))
    assert said is not None and said.startswith("absent: ")


def test_a_function_of_ones_own_sees_the_case_and_may_be_async(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Case] = []

    async def check(case: Case) -> str | None:
        seen.append(case)
        return "no: reason"

    made = assign(raw(), "crop", 0)
    assert asyncio.run(lacking(check, made, shown(TARGET))) == "no: reason"
    assert (seen[0].answer, seen[0].solution, seen[0].box) == ("A", "A", TARGET) and len(seen[0].rounds) == 2
    assert asyncio.run(lacking(check, assign(raw(), "no_code", 0), drafted())) is None and len(seen) == 1, "no code"
    asyncio.run(lacking(check, assign(raw(), "rotation", 0), shown(TARGET)))
    assert seen[-1].box is None, "the picture was turned, the box is of another"
    for wrong, words in (("x.py:f", "no file 'x.py'"), ("own.py:gone", "'gone' is not there")):
        Path("own.py").write_text("x = 1\n")
        with pytest.raises(ValueError, match=words):
            load_check(wrong)
    for bad in (lambda case: 1 / 0, lambda case: True):
        with pytest.raises(ValueError, match=r"build\.evidence: the check"):
            asyncio.run(lacking(bad, made, shown(TARGET)))
