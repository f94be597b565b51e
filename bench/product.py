"""The engine and the trainer as they are, on a model of the shape of Qwen2.5-VL-7B with one decoder layer: what they
launch, for whoever records it (launches.py). Nothing is computed and no weight takes memory.

Vocabulary, banned ids, temperatures, workspaces and modes are what thyme.engine and thyme.train.objective choose.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.engine.params import Prompt
from thyme.model import Model, Processor
from thyme.model.config import ImageConfig, ModelConfig
from thyme.model.model import empty
from thyme.model.sizes import SIZES
from thyme.train.config import RlConfig
from thyme.train.objective import AllowedIds, rollout_loss, supervised_loss, trained_logprobs
from thyme.train.packing import Sample, TrainBatch, pack
from thyme.train.policy_update import loss_of

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    *("<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
]
"""Of Qwen2.5-VL, its last ids: 151,643 to 151,664."""
FIRST_SPECIAL = 151_643
GSPO: dict[str, Any] = {"loss": "gspo", "rollout_ratio_cap": 2.0}
PROMPT = 1_100
"""Tokens: two splits of the attention kernels and some."""


def processor() -> Processor:
    """Of a tokenizer as large as Qwen2.5-VL's, with its special tokens; the others but for bytes are made up."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"a{index}": index for index in range(len(vocabulary), FIRST_SPECIAL)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    return Processor(tokenizer, ImageConfig())


def config() -> ModelConfig:
    seven = SIZES["qwen2.5-vl-7b"]
    assert seven.vision is not None
    vision = replace(seven.vision, depth=2, fullatt_block_indexes=(1,))
    return replace(seven, text=replace(seven.text, num_hidden_layers=1), vision=vision)


def policy(dtype: torch.dtype) -> Model:
    """For `run_trainer`: on the device that has no memory."""
    return empty(config(), "meta", dtype)


def model(of: Processor, dtype: torch.dtype) -> Model:
    """For `run_engine`: on a CPU, each large weight one number of memory."""
    made = policy(dtype)
    for part in made.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            shape, large = weight.shape, weight.numel() > 1e6
            value = torch.zeros((), dtype=dtype).expand(shape) if large else torch.zeros(shape, dtype=dtype)
            setattr(part, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, torch.zeros_like(buffer, device="cpu"), persistent=False)
    made.processor = of
    return made.eval()


@contextmanager
def without_products() -> Iterator[None]:
    """Inside, linear layers return zeros."""
    linear = nn.functional.linear

    def zeros(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_zeros(*x.shape[:-1], len(weight))

    nn.functional.linear = zeros
    try:
        yield
    finally:
        nn.functional.linear = linear


def run_engine(of: Processor, model: Model, **more: Any) -> None:
    """Prompts of one and of several samples, with a picture and without, plain and truncated, to a second token."""
    with without_products():
        engine = Engine(model, EngineConfig(attention="triton", num_blocks=1_000, quiet=True, **more))
        text = list(range(300, 300 + PROMPT))
        picture = Prompt(of.encode(of.chat("<image> what is it?")), [of.preprocess(Image.new("RGB", (56, 56)))])
        for params in (SamplingParams(n=4), SamplingParams(top_p=0.9), SamplingParams(top_k=20, temperature=0.0)):
            for prompt in (text, picture):
                engine.add_group(prompt, replace(params, max_tokens=3, seed=0, repetition=None))
            while engine.has_unfinished():
                engine.step()


def batch(of: Processor) -> TrainBatch:
    """Two sampled trajectories as the trainer packs them: after a picture, text at a temperature of 1, code that is
    greedy."""
    image = of.preprocess(Image.new("RGB", (56, 56)))
    length, start = 40 + image.num_tokens, 8 + image.num_tokens
    ids = np.arange(300, 300 + length)
    ids[4 : 4 + image.num_tokens] = of.image_token_id
    samples = []
    for code in (10, 0):
        column = np.arange(length, dtype=np.float32)
        samples.append(
            Sample(
                token_ids=ids,
                images=(image,),
                positions=np.arange(length)[None].repeat(3, 0),
                weights=(column >= start).astype(np.float32) / length,
                advantages=np.ones(length, dtype=np.float32),
                temperatures=(column >= start + code).astype(np.float32),
                rollout_logprobs=-np.ones(length, dtype=np.float32),
                segments=(column < start + code).astype(np.uint8),
            )
        )
    (packed,) = pack(samples, image_token_id=of.image_token_id)
    return packed.to(torch.device("meta"))


def run_trainer(of: Processor, policy: Model) -> None:
    """The losses of both stages there and back, and the old policy's log-probs, with the head fused and without."""
    allowed, packed = AllowedIds.of(of), batch(of)
    plain = loss_of(RlConfig())
    for fused_head in (True, False):
        with torch.no_grad():
            old = trained_logprobs(policy, packed, allowed, packed.temperatures, fused_head=fused_head)
        entropy = replace(plain, entropy_coef=0.01)
        for loss, before in ((plain, None), (plain, old), (entropy, old), (replace(entropy, **GSPO), old)):
            given = replace(packed, old_logprobs=before, ref_logprobs=old)
            rollout_loss(policy, given, allowed, loss, fused_head=fused_head)[0].backward()
        supervised_loss(policy, packed, allowed, fused_head=fused_head).backward()
