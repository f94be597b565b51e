"""Who takes which sample, and empty passes."""

import pytest
import torch

from thyme.model import Model, Processor, build
from thyme.model.model import Model as AnyModel
from thyme.toy.model import tiny_config
from thyme.toy.scenarios import demonstrations, questions
from thyme.train.balance import _empty, _with_blank, aligned, question_length, share_of, shares
from thyme.train.distributed import World
from thyme.train.objective import AllowedIds, supervised_loss
from thyme.train.packing import pack
from thyme.train.sft import row_sample
from thyme.train.sharding import TrainedModel


def test_the_longest_are_dealt_first_to_whoever_has_least() -> None:
    assert shares([1, 9, 5, 4], 2) == [[0, 1], [2, 3]]
    assert shares([3, 3, 3, 3], 2) == [[0, 2], [1, 3]]  # equal ones in their order
    assert shares([7], 3) == [[0], [], []]
    assert shares([], 2) == [[], []]
    lengths = [float((7 * i) % 31 + 1) for i in range(64)]
    dealt = shares(lengths, 4)
    assert sorted(i for part in dealt for i in part) == list(range(64))
    loads = [sum(lengths[i] for i in part) for part in dealt]
    assert max(loads) - min(loads) <= 1


def test_one_process_takes_all_in_order() -> None:
    assert share_of("abc", [1, 3, 2], World()) == ["a", "b", "c"]


def test_a_question_s_pictures_count_exactly(processor: Processor) -> None:
    plain, pictured = (questions(0, 1, {name: 1.0})[0] for name in ("arithmetic", "crop"))
    for question in (plain, pictured):
        pictures = sum(processor.preprocess(image).num_tokens for _, image in question.pictures)
        assert question_length(processor, question, 100) == len(question.question) / 4 + 100 + pictures
    assert pictured.image is not None


class Two(World):
    """The first of two ranks; the other says what it has."""

    size = 2

    def __init__(self, other: list[bool]) -> None:
        super().__init__()
        self.other = other

    def gather(self, item: object) -> list[object]:  # type: ignore[override]
        return [item, self.other]


@pytest.mark.parametrize("fused_head", [False, True])
def test_every_rank_comes_to_the_same_passes_and_the_added_ones_teach_nothing(
    fused_head: bool, model: Model, processor: Processor
) -> None:
    rows = demonstrations(0, 2, {"arithmetic": 1.0})
    samples = [row_sample(processor, row, "all", "short") for row in rows]
    batches = pack(samples, image_token_id=processor.image_token_id, max_tokens=1)
    assert len(batches) == 2

    def gradients(trained: TrainedModel) -> dict[str, torch.Tensor]:
        model = trained.full
        model.zero_grad()
        for batch in aligned(batches, trained):
            supervised_loss(model, batch, AllowedIds.of(processor), fused_head=fused_head).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone = gradients(TrainedModel(model))
    assert [batch.pixel_values is None for batch in aligned(batches, TrainedModel(model))] == [True, True]
    beside = TrainedModel(model, Two([False, True, True, False]))
    seen = [batch.pixel_values is not None for batch in aligned(batches, beside)]
    assert seen == [False, True, True, False]
    found = gradients(beside)
    # The vision tower runs backward too, so its gradients exist: all of them zero.
    visual = {name for name, _ in model.named_parameters() if name.startswith("visual.")}
    assert visual <= found.keys() and not visual & alone.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, alone.get(name, torch.zeros_like(gradient))), name


def test_an_empty_pass_runs_every_parameter(processor: Processor) -> None:
    model: AnyModel = build(tiny_config(), processor, seed=0)
    vision = model.config.vision
    assert vision is not None
    loss = supervised_loss(model, _with_blank(_empty(), vision), AllowedIds.of(processor))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
