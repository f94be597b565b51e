"""How large the KV cache of a training run's engine is, where its config leaves that open."""

from dataclasses import replace

import torch

from thyme.engine.config import EngineConfig
from thyme.model.config import LoraConfig
from thyme.model.model import Model
from thyme.train.config import RlConfig
from thyme.train.memory import GIB, Job, plan

RESERVE = 4 * GIB
"""Of a GPU, what is kept back for CUDA itself and for gaps between tensors."""


def beside_training(
    engine: EngineConfig, model: Model, rl: RlConfig, lora: LoraConfig, *, gpus: int = 1, total: int | None = None
) -> EngineConfig:
    """The config with `kv_bytes` said: what weights, reference and the optimizer's state leave of a GPU.

    The engine sleeps while the policy is updated, so activations and gradients need no room beside the cache. The
    optimizer's moments, which do, are not there yet when the engine is made: a share of free memory would miss them.

    Args:
        engine: returned as it is where it says num_blocks or kv_bytes, or the model is on a CPU.
        model: that is trained, with its adapters.
        rl, lora: how.
        gpus: ranks that train together.
        total: bytes of the GPU; None: asked.

    Raises:
        ValueError: what is left does not hold one sequence of the engine's context.
    """
    is_said = engine.num_blocks is not None or engine.kv_bytes is not None
    if is_said or (total is None and model.device.type != "cuda"):
        return engine
    if total is None:
        total = torch.cuda.get_device_properties(model.device).total_memory
    config, text = model.config, model.config.text
    job = Job(
        model=config,
        stage=rl,
        lora=lora,
        itemsize=model.dtype.itemsize,
        gpus=gpus,
        longest=engine.max_context or 0,
        step_tokens=engine.max_batch_tokens,
        sequences=engine.max_sequences,
        fp8_weights=engine.weight_dtype == "fp8",
        fp8_cache=engine.kv_dtype == "fp8",
    )
    found = plan(job)
    left, context = found.kv_bytes(total - RESERVE), engine.max_context or text.max_position_embeddings
    rounded = -(-context // engine.block_size) * engine.block_size
    if engine.max_context is not None and left < rounded * found.kv_token:
        raise ValueError(
            f"rl: {total / GIB:.1f} GiB leave {left / GIB:.1f} for the KV cache, and one sequence of "
            f"engine.max_context = {context} needs {rounded * found.kv_token / GIB:.1f}: `thyme plan` with this recipe "
            "says what to change, engine.kv_bytes takes what it says"
        )
    if left < engine.block_size * found.kv_token:
        raise ValueError(f"rl: {total / GIB:.1f} GiB leave nothing for a KV cache: `thyme plan` says what to change")
    return replace(engine, kv_bytes=min(left, engine.max_sequences * rounded * found.kv_token))
