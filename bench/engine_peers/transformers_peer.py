"""transformers as a contender of the plain race: `python transformers_peer.py FOLDER DTYPE generate|generate_batch`."""

import os
import sys
from typing import Any

import torch
from races import WORKLOADS
from serve import Outputs, serve
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2ForCausalLM


class Peer:
    def __init__(self, folder: str, dtype: str, mode: str) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.mode = mode
        options: dict[str, Any] = {} if mode == "generate" else {"attn_implementation": "sdpa"}
        self.model: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()

    def run(self, name: str) -> Outputs:
        if name != "plain":
            raise SystemExit(f"transformers_peer.py: only the plain workload, got {name!r}")
        sessions = WORKLOADS[name]().sessions
        prompts, lengths = [s.prompt for s in sessions], [s.lengths[0] for s in sessions]
        return (self._generate if self.mode == "generate" else self._batch)(prompts, lengths)

    def _generate(self, prompts: list[list[int]], lengths: list[int]) -> Outputs:
        """All prompts left-padded into one batch, which runs to the longest output."""
        longest, new = max(map(len, prompts)), max(lengths)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return [row[longest : longest + n].tolist() for row, n in zip(out, lengths, strict=True)]

    def _batch(self, prompts: list[list[int]], lengths: list[int]) -> Outputs:
        """Continuous batching, each request with its own length."""
        settings = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
        cache = ContinuousBatchingConfig(num_blocks=2048, max_batch_tokens=1024)
        results: dict[str, list[int]] = {}
        manager = self.model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=cache, block=True, timeout=5
        )
        with manager as running:
            names = [running.add_request(prompt, max_new_tokens=n) for prompt, n in zip(prompts, lengths, strict=True)]
            while len(results) < len(names):
                result = running.get_result(timeout=1)
                if result is not None and result.is_finished():
                    results[result.request_id] = result.generated_tokens
        return [results[name] for name in names]


if __name__ == "__main__":
    arguments: Any = sys.argv[1:4]
    serve(Peer(*arguments).run)
