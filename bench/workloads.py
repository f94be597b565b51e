"""Six workloads of a rollout engine on random weights of published shapes, with a record of every step.

    python bench/workloads.py --model qwen2.5-vl-7b --work W1 W4 [--scale 16] [--layers 2] [--json OUT.json]

    W1  256 requests, prompts and outputs of 100 to 1,024 tokens, temperature 0.6: ids and lengths are nano-vllm's
    W2  64 prompts of 1,500 tokens with 8 samples each of 100 to 2,048 tokens, as GRPO asks
    W3  the same, each prompt with one picture of 1,036 tokens
    W4  64 sessions of 4 turns: 300 tokens sampled, then 200 of a tool appended after a log-normal wait of 0.5 s in the
        middle, with a picture after turns 1 and 3
    W5  256 requests whose outputs have a long tail, 5 % of them greedy with the stop for repetition, which random
        weights then need
    W6  B sequences in the middle of decoding at one context: 1, 8, 64, 256 of 1,000 and of 4,000 tokens

Lengths are drawn once, by a seed; nothing ends early but in W5; log-probs and entropies are always computed.
`--scale N` divides requests and lengths, to try things out. Figures: `thyme.engine.step_record`.
"""

import argparse
import heapq
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import harness
import numpy as np
import product
from rollout_throughput import SHAPES, noise, params, random_model

from thyme.engine import Engine, EngineConfig
from thyme.engine.params import Prompt
from thyme.engine.step_cost import Ceilings
from thyme.engine.step_record import StepRecorder
from thyme.model import Model
from thyme.profile.ceilings import measured_ceilings

Row = dict[str, Any]
CONTEXTS = (1_000, 4_000)
BATCHES = (1, 8, 64, 256)
MOST_IDS = 10_000


_measured: list[Ceilings] = []


class Run:
    """An engine whose steps are recorded.

    Args:
        model: runs.
        config: of the engine.
    """

    def __init__(self, model: Model, **config: Any) -> None:
        options: dict[str, Any] = {"quiet": True, "max_batch_tokens": 8_192} | config
        self.engine = Engine(model, EngineConfig(**options))
        self.recorder = StepRecorder(self.engine, ceilings_of(model))
        self.ended: Counter[str] = Counter()
        self.drawn = 0
        self.started = time.perf_counter()

    def finish(self, turn: Callable[[Any], None] | None = None) -> None:
        """Steps until nothing is left to compute; `turn` is given each completion."""
        while self.engine.has_unfinished():
            for completion in self.engine.step():
                self.drawn += len(completion.token_ids)
                self.ended[completion.finish_reason] += 1
                if turn is not None:
                    turn(completion)

    def row(self, work: str) -> Row:
        """What was measured; gives the cache's memory back."""
        seconds, stats, records = time.perf_counter() - self.started, self.engine.stats(), self.recorder.records
        took = sorted(record.host_us + record.device_us for record in records)
        self.recorder.close()
        self.engine.pause()
        self.engine.sleep()
        return {
            "work": work,
            "seconds": seconds,
            "out_tok_per_s": self.drawn / seconds,
            "tok_per_s": (self.drawn + stats["prefilled_tokens"]) / seconds,
            "of_roof": sum(record.floor_us or 0.0 for record in records) / sum(took),
            "p50_ms": median(took) / 1e3,
            "p99_ms": took[int(0.99 * len(took))] / 1e3,
            "host_us": median(record.host_us for record in records),
            "idle_us": median(record.idle_us + record.host_us for record in records),
            "steps": len(records),
            "prefilled_of_unique": stats["prefilled_tokens"] / max(1, stats["unique_tokens"]),
            "peak_blocks": max(record.blocks for record in records),
            "preemptions": stats["preemptions"],
            "ended": dict(self.ended),
        }


def ceilings_of(model: Model) -> Ceilings:
    """Of this machine, measured once."""
    if not _measured:
        _measured.append(measured_ceilings(model.device, model.dtype))
    return _measured[0]


def nano_requests(count: int, most: int = 1_024) -> list[tuple[list[int], int]]:
    """(prompt, tokens to draw) of each request."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, MOST_IDS) for _ in range(draw.randint(100, most))] for _ in range(count)]
    return [(prompt, draw.randint(100, most)) for prompt in prompts]


def w1(model: Model, scale: int) -> list[Row]:
    vocab, count = model.config.text.vocab_size, max(1, 256 // scale)
    run = Run(model, max_sequences=count, max_context=2_100)
    for seed, (prompt, out) in enumerate(nano_requests(256)[:count]):
        ids = [token % vocab for token in prompt[: max(1, len(prompt) // scale)]]
        run.engine.add(ids, params(max(1, out // scale), seed, temperature=0.6))
    run.finish()
    return [run.row("W1")]


def w2(model: Model, scale: int, pictures: bool = False) -> list[Row]:
    draw, samples = np.random.default_rng(0), 8
    count, length = max(1, 64 // scale), max(1, 1_500 // scale)
    run = Run(model, max_sequences=min(256, count * samples), max_context=4_700)
    image = _picture(model, 1_036 // scale, 784 // scale) if pictures else None
    for at in range(count):
        prompt = _shown(model, _ids(model, at, length), image)
        for sample in range(samples):
            out = max(1, int(draw.integers(100, 2_049)) // scale)
            run.engine.add(prompt, params(out, 100 * at + sample))
    run.finish()
    return [run.row("W3" if pictures else "W2")]


def w3(model: Model, scale: int) -> list[Row]:
    return w2(model, scale, pictures=True)


def w4(model: Model, scale: int) -> list[Row]:
    draw, turns = np.random.default_rng(0), 4
    sessions, tool = max(1, 64 // scale), max(1, 200 // scale)
    run = Run(model, max_sequences=sessions, max_context=4_096)
    image = _picture(model, 448 // scale, 448 // scale) if model.config.vision is not None else None
    waits = np.exp(draw.normal(np.log(0.5 / scale), 0.5, (sessions, turns)))
    due: list[tuple[float, int, Any]] = []
    done: Counter[int] = Counter()

    def turn(completion: Any) -> None:
        sequence = completion.sequence
        done[sequence.id] += 1
        if done[sequence.id] == turns:
            run.engine.release(sequence)
            return
        wait = float(waits[sequence.id % sessions, done[sequence.id]])
        heapq.heappush(due, (time.perf_counter() + wait, sequence.id, sequence))

    for seed in range(sessions):
        run.engine.add(_ids(model, seed, max(1, 700 // scale)), params(max(1, 300 // scale), seed), hold=True)
    while run.engine.has_unfinished() or due:
        if due and not run.engine.has_unfinished():
            time.sleep(max(0.0, due[0][0] - time.perf_counter()))
        while due and due[0][0] <= time.perf_counter():
            _, number, sequence = heapq.heappop(due)
            prompt = _shown(model, _ids(model, number, tool), image if done[number] % 2 else None)
            run.engine.append(sequence, prompt.token_ids, prompt.images)
        for completion in run.engine.step():
            run.drawn += len(completion.token_ids)
            run.ended[completion.finish_reason] += 1
            turn(completion)
    return [run.row("W4")]


def w5(model: Model, scale: int) -> list[Row]:
    draw, count = np.random.default_rng(0), max(1, 256 // scale)
    run = Run(model, max_sequences=count, max_context=5_000)
    outs = np.minimum(4_096, 100 * (1 + draw.pareto(1.2, count))).astype(int) // scale
    greedy = set(draw.choice(count, max(1, count // 20), replace=False).tolist())
    for seed, out in enumerate(outs):
        more: dict[str, Any] = {}
        if seed in greedy:
            out, more = 4_096 // scale, {"temperature": 0.0, "repetition": "default"}
        run.engine.add(_ids(model, seed, max(1, 300 // scale)), params(max(1, int(out)), seed, **more))
    run.finish()
    return [run.row("W5")]


def w6(model: Model, scale: int) -> list[Row]:
    rows, steps = [], 40
    for context in CONTEXTS:
        for size in BATCHES:
            batch, length = max(1, size // scale), max(32, context // scale)
            blocks = batch * (-(-(length + steps + 20) // 16) + 1)
            run = Run(model, max_sequences=batch, max_context=length + steps + 20, num_blocks=blocks)
            for seed in range(batch):
                run.engine.add(_ids(model, seed, length), params(steps + 10, seed))
            while run.engine.stats()["prefilled_tokens"] < batch * length:
                run.engine.step()
            for _ in range(3):
                run.engine.step()
            run.recorder.records.clear()
            run.started = time.perf_counter()
            for _ in range(steps):
                run.engine.step()
            run.drawn = batch * steps
            rows.append(run.row(f"W6 {batch} x {length}") | {"tok_per_s": None, "prefilled_of_unique": None})
    return rows


def _ids(model: Model, seed: int, length: int) -> list[int]:
    special = () if model.processor is None else model.processor.never_sampled_ids
    ids = np.setdiff1d(np.arange(min(model.config.text.vocab_size, MOST_IDS)), special)
    return np.random.default_rng(seed).choice(ids, length).tolist()


def _picture(model: Model, height: int, width: int) -> Any:
    assert model.processor is not None, "this workload shows pictures: choose a model that sees"
    return model.processor.preprocess(noise(height, width))


def _shown(model: Model, ids: list[int], image: Any) -> Prompt:
    if image is None:
        return Prompt(ids)
    of = model.processor
    assert of is not None
    return Prompt([of.vision_start_id, of.image_token_id, of.vision_end_id, *ids], (image,))


WORKS: dict[str, Callable[[Model, int], list[Row]]] = {"W1": w1, "W2": w2, "W3": w3, "W4": w4, "W5": w5, "W6": w6}
COLUMNS = {
    "work": "{}",
    "out_tok_per_s": "{:,.0f}",
    "tok_per_s": "{:,.0f}",
    "of_roof": "{:.1%}",
    "p50_ms": "{:.2f}",
    "p99_ms": "{:.2f}",
    "host_us": "{:,.0f}",
    "idle_us": "{:,.0f}",
    "steps": "{}",
    "prefilled_of_unique": "{:.3f}",
    "peak_blocks": "{}",
    "preemptions": "{}",
    "seconds": "{:.2f}",
    "ended": "{}",
}


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [[*COLUMNS], ["---"] * len(COLUMNS)]
    for row in rows:
        row = row | {"ended": ", ".join(f"{count} {reason}" for reason, count in row["ended"].items())}
        lines.append(["" if row[name] is None else shown.format(row[name]) for name, shown in COLUMNS.items()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen2.5-vl-7b")
    parser.add_argument("--work", nargs="+", choices=sorted(WORKS), default=["W1", "W2", "W6"])
    parser.add_argument("--layers", type=int, help="fewer than the model has, to try things out")
    parser.add_argument("--scale", type=int, default=1, help="divide requests and lengths by it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    config = SHAPES[options.model]
    if options.layers:
        config = replace(config, text=replace(config.text, num_hidden_layers=options.layers))
    if config.vision is None and "W3" in options.work:
        parser.error(f"W3 shows pictures, and {options.model} sees none")
    model = random_model(config, harness.DEVICE, product.processor() if config.vision is not None else None)
    found = ceilings_of(model)
    print(f"{options.model}, {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B, {model.dtype}")
    print(f"copy {found.copy_bytes_per_s / 1e9:,.0f} GB/s, matmul {found.matmul_flops_per_s / 1e12:,.3f} TFLOP/s")
    rows: list[Row] = []
    for work in options.work:
        rows += WORKS[work](model, options.scale)
    print(table(rows), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "scale": options.scale, "rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main()
