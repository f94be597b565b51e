"""Four answers to one question about a picture, from the engine itself.

    python examples/generate.py                      a 1.7 M parameter model with random weights: nothing is downloaded
    python examples/generate.py MODEL PICTURE        a Hugging Face Qwen2.5-VL folder and a picture of yours

The four share their prompt: it is prefilled once, whatever n is. Each token comes with its log-probability and with
the temperature it was drawn at, which inside of `<code>` is another one than outside.
"""

import sys

import torch
from PIL import Image

from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.model import Model, Processor, build, load
from thyme.rollout import Question, build_prompt
from thyme.toy.model import tiny_config, tiny_processor

QUESTION = "What digit is on the red sign?"


def open_model(folder: str | None) -> tuple[Model, Processor]:
    if folder is None:
        processor = tiny_processor()
        return build(tiny_config(), processor, seed=0), processor
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, found = load(folder, device, torch.bfloat16 if device == "cuda" else torch.float32)
    if found is None:
        raise SystemExit(f"{folder} has no tokenizer: tokenizer.json belongs beside the weights")
    return model, found


def main(folder: str | None = None, picture: str | None = None) -> None:
    model, processor = open_model(folder)
    image = Image.open(picture).convert("RGB") if picture else Image.new("RGB", (252, 252), "firebrick")
    question = Question(id="example", image=image, image_path=picture or "sign.png", question=QUESTION, solution="7")
    prompt = build_prompt(question, "thyme" if folder else "short", processor)

    engine = Engine(model, EngineConfig(max_context=2048), processor=processor)
    params = SamplingParams(n=4, max_tokens=256 if folder else 24, temperature=1.0, code_temperature=0.0, seed=0)
    completions = engine.generate([prompt], params)

    for number, completion in enumerate(completions):
        mean = sum(completion.logprobs) / len(completion.token_ids)
        ended = f"{len(completion.token_ids)} tokens, ended by {completion.finish_reason}"
        print(f"answer {number}: {ended}, mean log-probability {mean:.3f}")
        print(f"    {processor.decode(completion.token_ids)!r}")
    prompt_tokens, prefilled = completions[0].sequence.prompt_len, engine.stats()["prefilled_tokens"]
    print(f"a prompt of {prompt_tokens} tokens, {prefilled} prefilled for {len(completions)} answers")


if __name__ == "__main__":
    main(*sys.argv[1:3])
