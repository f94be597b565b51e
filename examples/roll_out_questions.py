"""Your own questions, answered in rounds: the model thinks, its code is run, it looks at what came back, and goes on.

    python examples/roll_out_questions.py                     a 1.7 M parameter model with random weights
    python examples/roll_out_questions.py MODEL PICTURE "QUESTION" ["QUESTION" ...]

Rollouts of all questions are decoded side by side, and while one waits for its code the others go on.
"""

import sys

import torch
from PIL import Image

from thyme.engine import Engine, EngineConfig
from thyme.model import build, load
from thyme.rollout import Question, RolloutConfig, RolloutLoop
from thyme.sandbox import Sandbox, SandboxConfig
from thyme.toy.model import tiny_config, tiny_processor


def main(folder: str | None = None, picture: str | None = None, *asked: str) -> None:
    if folder is None:
        processor = tiny_processor()
        model, config = build(tiny_config(), processor, seed=0), RolloutConfig(max_tokens=32, prompt_style="short")
    else:
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        model, processor = load(folder, device, dtype)
        config = RolloutConfig()
    image = Image.open(picture).convert("RGB") if picture else Image.new("RGB", (252, 252), "firebrick")
    path = picture or "sign.png"
    texts = asked or ("What digit is on the red sign?", "Which colour is the sign?")
    questions = [
        Question(id=f"q{number}", image=image, image_path=path, question=text, solution="")  # nothing to compare with
        for number, text in enumerate(texts)
    ]

    with Sandbox(SandboxConfig(workers=1)) as sandbox:
        loop = RolloutLoop(
            Engine(model, EngineConfig(max_context=4096), processor=processor), sandbox, processor, config
        )
        for group in loop.run(questions):
            print(group[0].question.question)
            for rollout in group:
                ended = f"{rollout.num_sampled} tokens, {rollout.num_code} code blocks, {rollout.status.value}"
                print(f"    {ended}: {rollout.answer!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
