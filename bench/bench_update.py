"""An SFT update and an RL update beside transformers with TRL's loss, on the same batch.

    pytest bench/bench_update.py

One random Qwen2.5-VL of 9 M parameters in float32, both sides from one folder, on 2 threads; AdamW steps both. The
batch: 4 questions, each with a picture of 64 image tokens and a prompt of 60 to 120 tokens, 4 rollouts of 24 to 160
tokens, lengths fixed by a seed. Ours packs the 16 sequences end to end, encodes each picture once and makes logits for
trained rows only. The peer pads them, as GRPOTrainer does: prompts on the left, completions on the right, logits for
completions; its log-probs and entropies are TRL's `selective_log_softmax` and `entropy_from_logits`, its loss TRL's
"grpo" (or "dapo" for SFT: a mean over tokens). Both take turns. Tokens per second count tokens that are no padding.
The first loss of both is compared before anything is timed.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from thyme.kernels.grpo_loss import GrpoLossConfig
from thyme.model import ImageConfig, Model, ModelConfig, Processor, TextConfig, VisionConfig, build, save
from thyme.toy.model import tiny_config
from thyme.toy.tokenizer import toy_tokenizer
from thyme.train.config import StageConfig
from thyme.train.objective import AllowedIds, normalize, rollout_loss, supervised_loss
from thyme.train.optim import build_optimizer
from thyme.train.packing import Sample, pack
from thyme.train.tokenization import positions

THREADS, ROUNDS = 2, 5
GROUPS, GROUP = 4, 4
SIDE = 224  # pixels: 8 x 8 image tokens
RATE = 1e-5


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Row:
    """A rollout: its prompt with the picture expanded, and what was drawn."""

    image: Any
    prompt: list[int]
    completion: list[int]
    advantage: float


@dataclass(frozen=True)
class Update:
    """One batch and both models."""

    processor: Processor
    model: Model
    reference: Any
    rows: list[Row]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.prompt) + len(row.completion) for row in self.rows)

    def samples(self) -> list[list[Sample]]:
        """By question."""
        made = []
        for row in self.rows:
            ids = np.array(row.prompt + row.completion)
            trained = np.arange(len(ids)) >= len(row.prompt)
            made.append(
                Sample(
                    token_ids=ids,
                    positions=positions(self.processor, ids, (row.image,)),
                    weights=trained.astype(np.float32),
                    images=(row.image,),
                    advantages=np.full(len(ids), row.advantage, dtype=np.float32),
                    temperatures=np.ones(len(ids), dtype=np.float32),
                )
            )
        return [made[at : at + GROUP] for at in range(0, len(made), GROUP)]

    def ours(self, kind: str) -> torch.Tensor:
        samples = normalize(self.samples(), "sequence_mean" if kind == "rl" else "batch_tokens")
        (batch,) = pack(samples, image_token_id=self.processor.image_token_id)
        everything = AllowedIds(size=self.model.config.text.vocab_size, banned_ids=())
        if kind == "sft":
            return supervised_loss(self.model, batch, everything)
        return rollout_loss(self.model, batch, everything, GrpoLossConfig(kl_coef=0.0))[0]

    def theirs(self, kind: str) -> torch.Tensor:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        widest, longest = (max(len(getattr(r, name)) for r in self.rows) for name in ("prompt", "completion"))
        ids = torch.zeros(len(self.rows), widest + longest, dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for at, row in enumerate(self.rows):
            start, end = widest - len(row.prompt), widest + len(row.completion)
            ids[at, start:end] = torch.tensor(row.prompt + row.completion)
            seen[at, start:end] = 1
        logits = self.reference(
            input_ids=ids,
            attention_mask=seen,
            mm_token_type_ids=(ids == self.processor.image_token_id).int(),
            pixel_values=torch.from_numpy(np.concatenate([row.image.pixel_values for row in self.rows])),
            image_grid_thw=torch.tensor([row.image.grid for row in self.rows]),
            logits_to_keep=longest + 1,
        ).logits[:, :-1]
        mask = seen[:, widest:].float()
        logprobs = selective_log_softmax(logits, ids[:, widest:])
        if kind == "sft":
            return -(logprobs * mask).sum() / mask.sum()
        with torch.no_grad():
            entropy_from_logits(logits)
        ratio = torch.exp(logprobs - logprobs.detach())
        advantages = torch.tensor([row.advantage for row in self.rows])[:, None]
        losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return ((losses * mask).sum(-1) / mask.sum(-1)).mean()


@pytest.fixture(scope="module")
def update(tmp_path_factory: pytest.TempPathFactory) -> Update:
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder: Path = tmp_path_factory.mktemp("update") / "model"
    processor = Processor(toy_tokenizer(), ImageConfig(), tiny_config().eos_token_ids)
    model = build(wide_config(), processor, seed=0)
    save(model, processor, folder)
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").train()
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(GROUPS):
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        image = processor.preprocess(Image.fromarray(pixels))
        asked = draw.integers(0, 90, int(draw.integers(60, 121))).tolist()
        ids = [processor.vision_start_id, *[processor.image_token_id] * image.num_tokens, processor.vision_end_id]
        advantages = draw.standard_normal(GROUP)
        for advantage in advantages - advantages.mean():
            completion = draw.integers(0, 90, int(draw.integers(24, 161))).tolist()
            rows.append(Row(image, [*ids, *asked], completion, float(advantage)))
    return Update(processor, model, reference, rows)


def wide_config() -> ModelConfig:
    """The toy's ids in a model of 9 M parameters with a head of 8,192 rows."""
    toy = tiny_config()
    text = TextConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        mrope_section=(8, 12, 12),
        max_position_embeddings=2048,
        initializer_range=0.05,
    )
    vision = VisionConfig(
        depth=4, hidden_size=192, intermediate_size=384, num_heads=4, out_hidden_size=256, fullatt_block_indexes=(1, 3)
    )
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids: dict[str, Any] = {name: getattr(toy, name) for name in (*names, "eos_token_ids", "pad_token_id")}
    return ModelConfig(text=text, vision=vision, **ids)


@pytest.mark.benchmark(group="one update beside transformers with TRL's loss, 16 sequences, 9 M parameters, 2 threads")
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_update(benchmark: Any, update: Update, kind: str) -> None:
    """Our time is the row's; every round is preceded by the peer's turn."""
    pytest.importorskip("trl", reason="the peer's package is the extra `bench`")
    optimizer = build_optimizer(update.model, StageConfig(optimizer="adamw", learning_rate=RATE, max_grad_norm=0.0))
    adamw = torch.optim.AdamW(update.reference.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    first = {name: getattr(update, name)(kind) for name in ("ours", "theirs")}
    torch.testing.assert_close(first["ours"], first["theirs"], rtol=1e-4, atol=1e-5)

    def peer() -> None:
        start = time.perf_counter()
        update.theirs(kind).backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)

    def ours() -> None:
        update.ours(kind).backward()
        optimizer.step(1.0)

    times: list[float] = []
    peer()
    ours()
    times.clear()
    benchmark.pedantic(ours, setup=peer, rounds=ROUNDS, iterations=1)
    seconds, peer_s = benchmark.stats.stats.median, median(times)
    benchmark.extra_info |= {
        "figure": f"{peer_s / seconds:.2f}x transformers with TRL's loss",
        "tok_per_s": round(update.num_tokens / seconds),
        "peer_tok_per_s": round(update.num_tokens / peer_s),
    }
