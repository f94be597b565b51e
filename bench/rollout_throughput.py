"""The engine on random weights of published shapes: tokens per second, and how far a step is from what its bytes take.

    python bench/rollout_throughput.py --model qwen2.5-vl-7b --work decode groups [--peer] [--json OUT.json]

Works (lengths are drawn once, by a seed; nothing ends early; log-probs and entropies are always computed):
    decode    B sequences in the middle of decoding at one context: step by step, 40 steps each
    nano      256 requests, prompts and outputs of 100 to 1,024 tokens, as nano-vllm's benchmark has them
    groups    16 prompts of 1,500 tokens with 8 samples each of 100 to 512 tokens, as GRPO asks
    pictures  the same, each prompt with one picture of 1,036 tokens
    turns     32 sessions of 4 turns: 150 tokens sampled, then 100 appended, with a picture in turns 2 and 4

What a step must move at least: the decoder's weights and the head once, and the KV of every sequence once, at the rate
of a large copy measured in the same process. `of roof` is that time over the step's. `busy` is the time of all kernels
by the profiler, over steps of their own; `idle` what is left of a step's time, and `launches` their number.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import harness
import numpy as np
import product
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.engine.params import Prompt
from thyme.model import Model, ModelConfig, Processor, TextConfig
from thyme.model.layers import RMSNorm
from thyme.model.model import attach, empty
from thyme.model.sizes import SIZES

QWEN3 = ModelConfig(
    model_type="qwen3",
    text=TextConfig(
        vocab_size=151_936,
        hidden_size=1_024,
        intermediate_size=3_072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        qk_norm=True,
    ),
)
SHAPES = {"qwen3-0.6b": QWEN3, **SIZES}
DECODE = [(1, 4_000), (8, 4_000), (64, 1_000), (256, 1_000)]
"""Sequences, and the tokens that each has."""
STEPS = 40
Row = dict[str, Any]


@torch.no_grad()
def random_model(config: ModelConfig, device: torch.device, processor: Processor | None = None) -> Model:
    """In bfloat16 on a GPU; drawn there, which takes seconds for 7 B parameters."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = empty(config, device, dtype)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(module, RMSNorm):
                weight.fill_(1.0)
            elif name == "bias":
                weight.zero_()
            else:
                weight.normal_(0.0, 0.02)
    attach(model, processor)
    return model.eval()


def params(max_tokens: int, seed: int, **more: Any) -> SamplingParams:
    """As RL draws, but that nothing ends a round but its length."""
    options: dict[str, Any] = {"ignore_eos": True, "stop_at_tags": False, "repetition": None} | more
    return SamplingParams(max_tokens=max_tokens, seed=seed, **options)


class Meter:
    """An engine whose steps are timed.

    Args:
        model: runs.
        config: of the engine.
    """

    def __init__(self, model: Model, **config: Any) -> None:
        self.engine = Engine(model, EngineConfig(quiet=True, **config))
        text = model.config.text
        head = 0 if text.tie_word_embeddings else model.decoder.embed_tokens.weight.nbytes
        self.weight_bytes = sum(p.nbytes for p in model.decoder.parameters()) - head
        if model.lm_head is not None:
            self.weight_bytes += model.lm_head.weight.nbytes
        self.token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
        self.seconds: list[float] = []
        self.sampled = 0

    def step(self) -> list[Any]:
        started = time.perf_counter()
        done = self.engine.step()
        self.seconds.append(time.perf_counter() - started)
        return done

    def finish(self, turn: Callable[[Any], None] | None = None) -> Row:
        """Steps until nothing is left; `turn` is given each completion."""
        started = time.perf_counter()
        sampled = 0
        while self.engine.has_unfinished():
            for completion in self.step():
                sampled += len(completion.token_ids)
                if turn is not None:
                    turn(completion)
        seconds, stats = time.perf_counter() - started, self.engine.stats()
        return {
            "tok_per_s": sampled / seconds,
            "seconds": seconds,
            "tokens": sampled,
            "p50_ms": 1e3 * median(self.seconds),
            "p99_ms": 1e3 * sorted(self.seconds)[int(0.99 * len(self.seconds))],
            "steps": len(self.seconds),
            "prefilled_of_unique": stats["prefilled_tokens"] / max(1, stats["unique_tokens"]),
            "preemptions": stats["preemptions"],
        }

    def close(self) -> None:
        """Gives the cache's memory back."""
        self.engine.pause()
        self.engine.sleep()

    def roof_seconds(self, contexts: int) -> float:
        """Of a step that decodes sequences of so many tokens together."""
        return (self.weight_bytes + contexts * self.token_bytes) / harness.copy_bytes_per_s()


def drawn(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 100_000, shape)


def profiled(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """(seconds that kernels ran, kernels) a step."""
    if harness.DEVICE.type != "cuda":
        return 0.0, 0.0
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    times = [event.device_time_total for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(times) / 1e6 / steps, len(times) / steps


def decode(model: Model, scale: int) -> list[Row]:
    rows = []
    vocab = model.config.text.vocab_size
    for batch, context in DECODE:
        batch, context = max(1, batch // scale), max(32, context // scale)
        meter = Meter(
            model,
            max_sequences=batch,
            max_batch_tokens=max(8_192, batch),
            max_context=context + 200,
            num_blocks=batch * (-(-(context + 200) // 16) + 1),
        )
        prompts = drawn(batch, batch, context) % vocab
        started = time.perf_counter()
        for seed, prompt in enumerate(prompts):
            meter.engine.add(prompt.tolist(), params(190, seed))
        while meter.engine.stats()["prefilled_tokens"] < prompts.size:
            meter.engine.step()
        meter.engine.catch_up()
        prefill_s = time.perf_counter() - started
        for _ in range(5):
            meter.engine.step()
        for _ in range(STEPS):
            meter.step()
        step_s, roof_s = median(meter.seconds), meter.roof_seconds(batch * (context + STEPS // 2))
        busy_s, launches = profiled(meter.engine.step, 10)
        rows.append(
            {
                "work": f"decode {batch} x {context}",
                "tok_per_s": batch / step_s,
                "p50_ms": 1e3 * step_s,
                "p99_ms": 1e3 * max(meter.seconds),
                "of_roof": roof_s / step_s,
                "busy_ms": 1e3 * busy_s,
                "busy_of_roof": roof_s / busy_s if busy_s else 0.0,
                "idle_us": 1e6 * (step_s - busy_s),
                "launches": launches,
                "prefill_tok_per_s": prompts.size / prefill_s,
            }
        )
        meter.close()
    return rows


def nano(model: Model, scale: int) -> list[Row]:
    vocab = model.config.text.vocab_size
    draw = np.random.default_rng(0)
    count = 256 // scale
    lengths, outs = (draw.integers(100, 1_025, count) // scale for _ in range(2))
    meter = Meter(model, max_sequences=count, max_batch_tokens=8_192, max_context=2_100)
    contexts = 0.0
    for seed, (length, out) in enumerate(zip(lengths, outs, strict=True)):
        meter.engine.add((drawn(seed, length) % vocab).tolist(), params(int(out), seed, temperature=0.6))
        contexts += out * (length + out / 2)
    row = {"work": f"nano {count}", **meter.finish()}
    # Weights once a step of the longest output, every token's context once.
    steps = outs.max()
    roof_s = (steps * meter.weight_bytes + contexts * meter.token_bytes) / harness.copy_bytes_per_s()
    meter.close()
    return [row | {"of_roof": roof_s / row["seconds"]}]


def groups(model: Model, scale: int, picture: Image.Image | None = None) -> list[Row]:
    vocab = model.config.text.vocab_size
    draw = np.random.default_rng(0)
    prompts, samples, length = 16 // scale or 1, 8, 1_500 // scale
    meter = Meter(model, max_sequences=prompts * samples, max_batch_tokens=8_192, max_context=4_096)
    images = []
    if picture is not None:
        assert model.processor is not None
        images = [model.processor.preprocess(picture)]
    for at in range(prompts):
        ids = (drawn(at, length) % min(vocab, 100_000)).tolist()
        prompt: Any = ids
        if images:
            assert model.processor is not None
            of = model.processor
            shown = [of.vision_start_id, of.image_token_id, of.vision_end_id]
            prompt = Prompt([*shown, *ids], images)
        for sample in range(samples):
            out = int(draw.integers(100, 513)) // scale
            meter.engine.add(prompt, params(out, 100 * at + sample))
    row = {"work": f"{'pictures' if images else 'groups'} {prompts} x {samples}", **meter.finish()}
    meter.close()
    return [row]


def pictures(model: Model, scale: int) -> list[Row]:
    return groups(model, scale, noise(1_036 // scale, 784 // scale))


def turns(model: Model, scale: int) -> list[Row]:
    of = model.processor
    assert of is not None
    sessions, count = 32 // scale or 1, 4
    meter = Meter(model, max_sequences=sessions, max_batch_tokens=8_192, max_context=8_192)
    image = of.preprocess(noise(448 // scale, 448 // scale))
    rounds: dict[int, int] = {}

    def turn(completion: Any) -> None:
        sequence = completion.sequence
        done = rounds[sequence.id] = rounds.get(sequence.id, 0) + 1
        if done == count:
            meter.engine.release(sequence)
            return
        ids = drawn(done, 100).tolist()
        if done % 2:
            shown = [of.vision_start_id, of.image_token_id, of.vision_end_id]
            meter.engine.append(sequence, [*shown, *ids], [image])
        else:
            meter.engine.append(sequence, ids)

    for seed in range(sessions):
        meter.engine.add(drawn(seed, 700 // scale).tolist(), params(150 // scale, seed), hold=True)
    row = {"work": f"turns {sessions} x {count}", **meter.finish(turn)}
    meter.close()
    return [row]


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (max(height, 28), max(width, 28), 3), dtype=np.uint8)
    return Image.fromarray(pixels)


WORKS: dict[str, Callable[[Model, int], list[Row]]] = {
    "decode": decode,
    "nano": nano,
    "groups": groups,
    "pictures": pictures,
    "turns": turns,
}
COLUMNS = {
    "work": "{}",
    "tok_per_s": "{:,.0f}",
    "p50_ms": "{:.2f}",
    "p99_ms": "{:.2f}",
    "of_roof": "{:.1%}",
    "busy_ms": "{:.2f}",
    "busy_of_roof": "{:.1%}",
    "idle_us": "{:,.0f}",
    "launches": "{:.0f}",
    "prefill_tok_per_s": "{:,.0f}",
    "prefilled_of_unique": "{:.3f}",
    "preemptions": "{}",
    "seconds": "{:.2f}",
}


def shown(rows: list[Row]) -> str:
    """A Markdown table."""
    cells = [[COLUMNS[name].format(row[name]) if name in row else "" for name in COLUMNS] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in ([*COLUMNS], ["---"] * len(COLUMNS), *cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen2.5-vl-7b")
    parser.add_argument("--work", nargs="+", choices=sorted(WORKS), default=["decode", "groups"])
    parser.add_argument("--layers", type=int, help="fewer than the model has, to try things out")
    parser.add_argument("--scale", type=int, default=1, help="divide requests and lengths by it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = SHAPES[options.model]
    if options.layers:
        config = replace(config, text=replace(config.text, num_hidden_layers=options.layers))
    processor = product.processor() if config.vision is not None else None
    model = random_model(config, harness.DEVICE, processor)
    print(f"{options.model}, {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B, {model.dtype}")
    print(f"copy {harness.copy_bytes_per_s() / 1e9:,.0f} GB/s", flush=True)
    rows: list[Row] = []
    for work in options.work:
        try:
            rows += WORKS[work](model, options.scale)
        except Exception as error:  # what was measured before is printed all the same
            print(f"{work}: {type(error).__name__}: {error}", flush=True)
            raise
        finally:
            if work == options.work[-1]:
                print(shown(rows), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"model": options.model, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
