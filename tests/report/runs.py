"""Run folders as a training run writes them, made without a model: by the very functions that write rollouts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from thyme.engine.tags import TokenKind
from thyme.rollout.image_folder import ImageFolder
from thyme.rollout.records import to_row, write_rollouts
from thyme.rollout.trajectory import COLUMNS
from thyme.rollout.types import Question, Rollout, RolloutStatus, Turn
from thyme.sandbox import Fix, SandboxResult, SnippetError, Status
from thyme.toy.model import tiny_processor

BOX = (120, 60, 200, 120)
"""Of the crop in `looked_closer`."""
HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>\"'`${window.hit = 1}"
"""Text that does something wherever markup is made of it."""


def photograph(seed: int, size: tuple[int, int] = (320, 200)) -> Image.Image:
    """Noise with a sign on it: every region of it is unlike every other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    ImageDraw.Draw(picture).rectangle((130, 70, 190, 110), fill="red")
    return picture


def question(name: str, picture: Image.Image | None, asked: str = "What digit is on the red sign?") -> Question:
    path = "" if picture is None else f"{name}.png"
    return Question(id=name, image=picture, image_path=path, question=asked, solution="7", scenario="crop")


def looked_closer(asked: Question) -> Turn:
    """A round that crops and prints, repaired on its way."""
    assert asked.image is not None
    opened = f'img = Image.open("{asked.image_path}")\nbox = {BOX}\n'
    code = opened + 'part = img.crop(box)\npart.save("out.png")\nprint("out.png")'
    result = SandboxResult(
        status=Status.OK,
        stdout="out.png\n",
        images=(asked.image.crop(BOX),),
        fixes=(Fix("import", 0, "from PIL import Image was added"),),
        wall_s=0.012,
        isolation="full",
    )
    text = f"<think>The sign is small.\n<code>\n```python\n{code}\n```\n</code>"
    return Turn(
        text=text, code=code, result=result, output_text="<sandbox_output><image></sandbox_output>", num_images=1
    )


def failed(message: str = "name 'imgg' is not defined") -> Turn:
    """A round whose code raises."""
    error = SnippetError("NameError", message, 1)
    code = "imgg.size  # " + message
    result = SandboxResult(status=Status.ERROR, error=error, wall_s=0.003, isolation="full")
    shown = f"<sandbox_output>Error: NameError: {message} (line 1)</sandbox_output>"
    return Turn(text=f"<think>Again.\n<code>{code}</code>", code=code, result=result, output_text=shown, num_images=0)


def said(text: str) -> Turn:
    """A last round, without code."""
    return Turn(text=text, code=None, result=None, output_text="", num_images=0)


def rollout(
    asked: Question,
    turns: Sequence[Turn],
    answer: str | None,
    *,
    group: int = 0,
    index: int = 0,
    status: RolloutStatus = RolloutStatus.ANSWERED,
) -> Rollout:
    """A rollout with tokens of the toy's tokenizer and made-up log-probs."""
    processor = tiny_processor()
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    rng = np.random.default_rng(index)

    def add(text: str, kind: TokenKind, number: int, *, sampled: bool) -> None:
        for token in processor.encode_untrusted(text):
            greedy = kind == TokenKind.CODE
            drawn = -float(rng.exponential(0.7)) if sampled and not greedy else 0.0
            values = {
                "token_ids": token,
                "kinds": kind,
                "rounds": number,
                "sampled": sampled,
                "temperatures": float(sampled and not greedy),
                "logprobs": drawn,
                "logprobs_raw": -0.01 if greedy else drawn,
                "entropies": float(rng.uniform(0, 2)) if sampled else 0.0,
                "weight_versions": 3 if sampled else -1,
            }
            for name in COLUMNS:
                columns[name].append(values.get(name, 0))

    add(asked.question, TokenKind.PROMPT, 0, sampled=False)
    for number, turn in enumerate(turns):
        before, code, after = turn.text.partition(turn.code or "\0")
        add(before, TokenKind.TEXT, number, sampled=True)
        add(code, TokenKind.CODE, number, sampled=True)
        add(after, TokenKind.TEXT, number, sampled=True)
        add(turn.output_text, TokenKind.SANDBOX, number, sampled=False)
    return Rollout(
        question=asked,
        group=group,
        index=index,
        seed=2**60 + 8 * group + index,
        **{name: np.array(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()},
        images=[],
        turns=list(turns),
        text="".join(turn.text + turn.output_text for turn in turns),
        answer=answer,
        status=status,
        wall_s=0.5,
        sandbox_s=0.02,
    )


def trainer_logprobs(made: Rollout, shift: float) -> dict[str, list[float | None]]:
    """Log-probs as a trainer that is off by `shift` nats would give them."""
    engine = np.where(made.temperatures == 0, made.logprobs_raw, made.logprobs)
    pairs = zip(engine.tolist(), made.sampled.tolist(), strict=True)
    return {"trainer_logprobs": [value + shift if sampled else None for value, sampled in pairs]}


def group_of_four(number: int = 0, name: str = "crop-0") -> list[Rollout]:
    """Right after a crop; failed code and a wrong answer; repetition without an answer; right without code."""
    asked = question(name, photograph(number))
    closer = looked_closer(asked)
    return [
        rollout(asked, [closer, said("It says 7.</think>\n<answer>7</answer>")], "7", group=number, index=0),
        rollout(asked, [failed(), said("So 3.</think>\n<answer>3</answer>")], "3", group=number, index=1),
        rollout(asked, [said("no no no no")], None, group=number, index=2, status=RolloutStatus.REPETITION),
        rollout(asked, [said("<think>Plain.</think>\n<answer>7</answer>")], "7", group=number, index=3),
    ]


def rewards_of(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    out = []
    for made in rollouts:
        right = float(made.answer == made.question.solution)
        parts = {"total": 1.5 * right, "result": right, "consistency": right, "formatting": 0.0}
        held = 0.5 * right * (made.num_code > 0)
        out.append({**parts, "parts": {"length": -0.25, "evidence": held}, "error": None})
    return out


def write_step(folder: Path, step: int, rollouts: Sequence[Rollout], *, shifts: Sequence[float] | None = None) -> Path:
    """rollouts/step_N.jsonl, with the trainer's log-probs where `shifts` says by how much they are off."""
    path = folder / "rollouts" / f"step_{step}.jsonl"
    columns = None if shifts is None else [trainer_logprobs(r, s) for r, s in zip(rollouts, shifts, strict=True)]
    write_rollouts(path, rollouts, rewards_of(rollouts), columns=columns)
    return path


def write_metrics(folder: Path, steps: int, **more: float) -> None:
    """metrics.jsonl of a stage."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            row = {"reward/mean": step / steps, "rollout/code_share": 0.5, "mismatch/kl": 0.001 * step, **more}
            file.write(json.dumps({"stage": "rl", "step": step, **row}) + "\n")


def small_run(folder: Path) -> Path:
    """Two steps of two groups, the last with trainer's log-probs of which one rollout's are far off."""
    write_metrics(folder, 3)
    rollouts = [*group_of_four(0, "crop-0"), *group_of_four(1, "crop-1")]
    write_step(folder, 0, rollouts)
    write_step(folder, 2, rollouts, shifts=[0.0, 0.0, 0.0, 1.5, 0.0, 0.01, 0.0, 0.0])
    (folder / "config.toml").write_text('name = "small"\nmodel = "tiny"\n\n[rl.mismatch]\nmax_kl = 0.2\n')
    (folder / "run.json").write_text(json.dumps({"verb": "rl", "is_finished": True}))
    alarm = {"step": 2, "alarm": "entropy", "metric": "reward/mean", "value": 0.1, "level": 1, "text": "it fell"}
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    return folder


def large_run(folder: Path, rollouts: int, step: int = 0) -> Path:
    """One step of many rollouts in groups of eight: the lines of four real ones under other numbers."""
    made = group_of_four()
    store = ImageFolder(folder / "images")
    rows = [to_row(one, store) | {"rewards": reward} for one, reward in zip(made, rewards_of(made), strict=True)]
    write_metrics(folder, 2_000, **{f"extra/{i}": float(i) for i in range(40)})
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        asked = {**row["question"], "id": "q-@group", "question": "Question @group?"}
        changed = row | {"group": "@group", "index": "@index", "seed": "@seed", "question": asked}
        lines.append(json.dumps(changed, separators=(",", ":")) + "\n")
    with (folder / "rollouts" / f"step_{step}.jsonl").open("w") as file:
        for number in range(rollouts):
            group, index = divmod(number, 8)
            head, tokens, rest = lines[number % 4].partition(',"tokens"')
            head = head.replace('"@group"', str(group)).replace("@group", str(group))
            file.write(head.replace('"@index"', str(index)).replace('"@seed"', str(number)) + tokens + rest)
    return folder
