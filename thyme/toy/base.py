"""Stage 0, the tiny stand-in for pre-training: learn to read and to locate from dense captions.

Demonstrations alone teach a model from random weights perfect code and nothing visual. Captions whose every token must
be read off the picture do, in minutes, given Muon and a flat rate with a decay at the end. Some go on with the code
that cuts out what they located: to copy a place from words into code is a skill of its own, which a few hundred
demonstrations teach badly and a model that was pre-trained on code has.
"""

from collections.abc import Sequence
from typing import Unpack

from thyme.data.streams import Stream
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.toy.captions import Caption
from thyme.toy.config import BaseStageConfig
from thyme.toy.gates import CaptionGate, caption_sample
from thyme.train.balance import share_of
from thyme.train.metrics import Metrics
from thyme.train.optim import rate_share
from thyme.train.sharding import trained_model
from thyme.train.stage import Stage, StageOptions
from thyme.train.supervised import supervised_step
from thyme.train.trainable import fuses_head, trainable


def train_base(
    model: Model,
    processor: Processor,
    captions: Stream[Caption],
    config: BaseStageConfig,
    *,
    heldout: Sequence[Caption],
    **options: Unpack[StageOptions],
) -> list[Metrics]:
    """Trains `model` in place until the gates are met after the last decay, or `config.max_steps` are done.

    Args:
        model: the model to train.
        processor: its tokenizer and picture processor.
        captions: the stream; each is seen once.
        config: steps, rates and gates.
        heldout: captions for the gates, none of them in the stream; some of kind "ground" and some of kind "one".
        options: see `thyme.train.stage.StageOptions`.

    Returns:
        The metrics of every step; those with a gate check have `gate/<kind>` in [0, 1].

    Raises:
        ValueError: `heldout` lacks a kind that a gate needs.
    """
    missing = {"ground", "one"} - {caption.kind for caption in heldout}
    if missing:
        kinds = " and ".join(sorted(missing))
        raise ValueError(
            f"base.gate_captions: of {len(heldout)} held-out captions none is of kind {kinds}, which a gate needs: "
            "give it more, or such kinds a larger share in toy.captions"
        )
    gate = CaptionGate(processor, heldout)
    trained = trained_model(model, options.get("world"))
    with (
        trainable(trained.module, config, are_masters=trained.are_masters) as optimizer,
        Stage("base", trained, processor, optimizer, config, memory={"end": config.steps}, **options) as stage,
    ):
        while stage.step < stage.memory["end"] and not stage.stopped:
            with trained.world.phase("update"):
                batch = captions(stage.step * config.batch_size, config.batch_size)
                share = share_of(batch, [1.0] * len(batch), trained.world)
                metrics, unfit = supervised_step(
                    trained,
                    processor,
                    optimizer,
                    [caption_sample(processor, caption) for caption in share],
                    rate=_rate(config, stage.step),
                    max_tokens=config.max_tokens_per_micro_batch,
                    fused_head=fuses_head(model, config),
                )
            is_last = stage.step + 1 == stage.memory["end"]
            if is_last or (stage.step + 1) % config.gate_steps == 0:
                trained.publish()
                accuracies = trained.world.from_main(gate(model))
                metrics |= {f"gate/{kind}": accuracy for kind, accuracy in accuracies.items()}
            if is_last and not gates_met(metrics, config):
                stage.memory["end"] = min(stage.memory["end"] + _decay_steps(config), config.max_steps)
            stage.end_step(metrics, unfit)
    return stage.history


def gates_met(metrics: Metrics, config: BaseStageConfig) -> bool:
    """Whether the last gate check in `metrics` passed: single signs located, single digits read."""
    return metrics["gate/ground"] >= config.gate_ground and metrics["gate/one"] >= config.gate_one


def _decay_steps(config: BaseStageConfig) -> int:
    return max(1, round(config.decay_share * config.steps))


def _rate(config: BaseStageConfig, step: int) -> float:
    """The schedule; a stage that goes on beyond it decays again and again from half the peak rate."""
    if step < config.steps:
        return rate_share(config, step, config.steps)
    return 0.5 * (1 - (step - config.steps) % _decay_steps(config) / _decay_steps(config))
