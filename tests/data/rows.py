"""Rows of each layout for the tests of data: the same question and demonstration, said in every one."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from thyme.rollout.prompts import SYSTEM_PROMPT, user_prompt

HDD = "/mllm_hdd/someone/data/temp_processed_images/sign_00110792.png_rotated_image_318.png"
CODE = f"""<code>
```python
from PIL import Image
image_path = "{HDD}"
image = Image.open(image_path).crop((2, 2, 30, 20))
processed_path = "/mnt/data/temp_processed_images/sign_7.png"
image.save(processed_path)
print(processed_path)
```
</code>"""
RESPONSE = (
    f"<think>The sign is small. {CODE}<sandbox_output><image></sandbox_output>It says 7.</think>\n<answer>7</answer>"
)


def png(width: int = 60, height: int = 40, color: str = "red", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + b64(data)


FIRST, SECOND = png(), png(28, 18, "blue")


def thyme_sft(number: int = 7, **changes: Any) -> dict[str, Any]:
    """As in the released set: the whole prompt with a path of the authors' disk."""
    row = {
        "image": [b64(FIRST), b64(SECOND)],
        "question": user_prompt(f"Which digit is on sign {number}?", HDD, (60, 40)),
        "response": RESPONSE,
    }
    return row | changes


def thyme_rl(number: int = 7, **changes: Any) -> dict[str, Any]:
    """As in the released set."""
    user = user_prompt(f"Which digit is on sign {number}?", HDD, (60, 40))
    row = {
        "messages": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user}],
        "images": [b64(FIRST)],
        "solution": "7",
        "question": f"Which digit is on sign {number}?",
    }
    return row | changes


def write_released_sets(folder: Path) -> None:
    """Thyme-SFT and Thyme-RL with four rows a file, as released, and held.jsonl with three more questions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    demonstrations = pa.Table.from_pylist([thyme_sft(i) for i in range(4)])
    files = dict.fromkeys(("wo_thinking_thyme_single_round", "2round", "computation"), demonstrations)
    files = {f"Thyme-SFT/data/{name}-00000-of-00001.parquet": rows for name, rows in files.items()}
    files["Thyme-RL/data/train-00000-of-00001.parquet"] = pa.Table.from_pylist([thyme_rl(i) for i in range(4)])
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, folder / name)
    held = [json.dumps(thyme_rl(i)) + "\n" for i in range(4, 7)]
    (folder / "held.jsonl").write_text("".join(held))
