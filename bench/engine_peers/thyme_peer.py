"""Thyme as a contender: `python thyme_peer.py FOLDER DTYPE packed|plain`; "ceiling" is a workload too."""

import os
import sys
import time
from typing import Any

import torch
from races import WORKLOADS, Workload
from serve import Outputs, serve

from thyme.engine import Completion, Engine, EngineConfig, SamplingParams
from thyme.model import Model, load_model
from thyme.model.packed import PackedView
from thyme.toy.model import tiny_processor


class Peer:
    def __init__(self, folder: str, dtype: str, mode: str) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.model: Model = load_model(folder, dtype=getattr(torch, dtype))
        self.packs = mode == "packed"
        self.products = Products(self.model)
        self.engines = {adaptive: self._engine(adaptive) for adaptive in (False, True)}

    def _engine(self, adaptive: bool) -> Engine:
        config = EngineConfig(
            num_blocks=2048, max_sequences=64, max_batch_tokens=1024, quiet=True, pack_weights=self.packs
        )
        return Engine(self.model, config, processor=tiny_processor() if adaptive else None)

    def run(self, name: str) -> Outputs:
        """Prefixes of the last run are forgotten first."""
        if name.startswith("ceiling "):
            self.products.run(WORKLOADS[name.removeprefix("ceiling ")]())
            return []
        work = WORKLOADS[name]()
        engine = self.engines[work.adaptive]
        engine.blocks.forget_prefixes()
        return self._sessions(engine, work)

    def _sessions(self, engine: Engine, work: Workload) -> Outputs:
        options: dict[str, Any] = dict(temperature=work.temperature, ignore_eos=True, stop_at_tags=False, seed=0)
        if not work.adaptive:
            options |= dict(adaptive=False, banned_ids=())
        outputs: Outputs = [[] for _ in range(len(work.sessions) * work.n)]
        turn = [0] * len(work.sessions)
        places: dict[int, tuple[int, int]] = {}
        away: list[tuple[float, Any, int]] = []
        hold = any(len(session.lengths) > 1 for session in work.sessions)
        for index, session in enumerate(work.sessions):
            params = SamplingParams(n=work.n, max_tokens=session.lengths[0], repetition=None, **options)
            for sequence in engine.add_group(session.prompt, params, hold=hold):
                places[sequence.id] = (index, index * work.n + sequence.index)
        while engine.has_unfinished() or away:
            now = time.perf_counter()
            for item in [item for item in away if item[0] <= now]:
                away.remove(item)
                _, sequence, index = item
                turn[index] += 1
                session = work.sessions[index]
                engine.append(sequence, session.appended[turn[index] - 1], max_tokens=session.lengths[turn[index]])
            if not engine.has_unfinished():
                time.sleep(max(0.0, away[0][0] - now))
                continue
            for completion in engine.step():
                self._end(engine, work, completion, places, turn, away, outputs)
        return outputs

    def _end(
        self,
        engine: Engine,
        work: Workload,
        completion: Completion,
        places: dict[int, tuple[int, int]],
        turn: list[int],
        away: list[tuple[float, Any, int]],
        outputs: Outputs,
    ) -> None:
        index, place = places[completion.sequence.id]
        outputs[place] += list(completion.token_ids)
        if turn[index] + 1 < len(work.sessions[index].lengths):
            away.append((time.perf_counter() + work.tool_ms / 1e3, completion.sequence, index))
        elif len(work.sessions[index].lengths) > 1:
            engine.release(completion.sequence)


class Products:
    """The ceiling: the matrix products that a workload's tokens need, on packed weights, and nothing else.

    Given tokens 1024 at a time, then as many rows as sequences are left at each step; prompts of a group once.
    """

    def __init__(self, model: Model) -> None:
        self.view = PackedView(model)
        self.view.refresh()

    @torch.inference_mode()
    def run(self, work: Workload) -> None:
        model = self.view.model
        given = sum(len(s.prompt) + sum(map(len, s.appended)) for s in work.sessions)
        samples = [sum(session.lengths) for session in work.sessions for _ in range(work.n)]
        sizes = [1024] * (given // 1024) + [given % 1024]
        sizes += [sum(length > step for length in samples) for step in range(1, max(samples))]
        layers = [(layer.self_attn.qkv, layer.self_attn.o_proj, layer.mlp) for layer in model.decoder.layers]
        for size in filter(None, sizes):
            text = model.config.text
            x = torch.empty(size, text.hidden_size, dtype=model.dtype).normal_()
            active = torch.empty(size, text.intermediate_size, dtype=model.dtype).normal_()
            for qkv, o_proj, mlp in layers:
                qkv(x), o_proj(x), mlp.gate_up(x), mlp.down(active)
            model.logits(x[: min(size, len(samples))])


if __name__ == "__main__":
    arguments: Any = sys.argv[1:4]
    serve(Peer(*arguments).run)
