"""The reference policy: a copy that does not move with the policy, on the device or mostly in host memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.train.test_trainable import packed
from thyme.model import ImageInputs, Model, Processor
from thyme.train.config import RlConfig
from thyme.train.objective import AllowedIds, reference_logprobs
from thyme.train.packing import TrainBatch
from thyme.train.reference import blocks, frozen_copy, reference_policy, stream


@pytest.fixture
def batch(processor: Processor, picture: Callable[[int], ImageInputs]) -> TrainBatch:
    return packed(processor, [(9, [picture(1)]), (30, [])])


def logprobs(model: Model, batch: TrainBatch) -> Tensor:
    return reference_logprobs(model, batch, AllowedIds(size=64, banned_ids=()))


@pytest.mark.parametrize("place", ["device", "host"])
def test_the_reference_stays_where_training_began(place: str, model: Model, batch: TrainBatch) -> None:
    reference = reference_policy(model, RlConfig(reference=place))  # type: ignore[arg-type]
    assert reference is not None and not any(p.requires_grad for p in reference.parameters())
    before = logprobs(model, batch)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    assert not torch.equal(logprobs(model, batch), before)
    assert torch.equal(logprobs(reference, batch), before)
    assert torch.equal(logprobs(reference, batch), before)  # every micro-batch brings the blocks anew


def test_without_a_kl_term_there_is_no_copy(model: Model) -> None:
    assert reference_policy(model, RlConfig(kl_coef=0.0)) is None


def test_blocks_are_on_the_device_while_they_run_and_at_home_else(model: Model) -> None:
    """The device is `meta`, where a tensor that was not brought would not meet the others."""
    reference = frozen_copy(model, blocks_on_host=True)
    seen: list[list[str]] = []
    for block in blocks(reference):
        stream(block, torch.device("meta"))
        block.register_forward_pre_hook(lambda *_: seen.append(places(reference)))
        block.forward = lambda *_args: None
    for block in blocks(reference):
        block()
    count = len(blocks(reference))
    assert count == 6
    assert seen == [["meta" if i == at else "cpu" for i in range(count)] for at in range(count)]
    assert places(reference) == ["cpu"] * count
    assert all(torch.equal(p, q) for p, q in zip(reference.parameters(), model.parameters(), strict=True))


def places(model: Model) -> list[str]:
    """Of each block, the device that all its parameters are on."""
    found = [{p.device.type for p in block.parameters()} for block in blocks(model)]
    assert all(len(devices) == 1 for devices in found)
    return [devices.pop() for devices in found]


def test_a_block_that_fails_goes_home(model: Model) -> None:
    reference = frozen_copy(model, blocks_on_host=True)
    block = blocks(reference)[0]
    stream(block, torch.device("meta"))
    with pytest.raises(TypeError):
        block()
    assert places(reference) == ["cpu"] * 6
