"""The optimizer: who gets Muon, the schedule, clipping, and a state that can be saved."""

import pytest
import torch
from torch import nn

from thyme.model import Model
from thyme.train.config import StageConfig
from thyme.train.muon import Muon, orthogonalized
from thyme.train.optim import build_optimizer, is_block_matrix, rate_share


def test_muon_has_the_matrices_inside_blocks_and_adamw_the_rest(model: Model) -> None:
    muon = {name for name, p in model.named_parameters() if is_block_matrix(name, p)}
    assert "decoder.layers.0.self_attn.qkv.weight" in muon
    assert "visual.blocks.1.mlp.down.weight" in muon
    assert "visual.merger.up.weight" in muon
    assert not any("embed" in name or "lm_head" in name or "norm" in name or "bias" in name for name in muon)
    optimizer = build_optimizer(model, StageConfig())
    held = {
        kind: {id(p) for group in state["param_groups"] for p in group["params"]} for kind, state in states(optimizer)
    }
    assert len(held["Muon"]) == len(muon)
    assert len(held["Muon"]) + len(held["AdamW"]) == len(list(model.parameters()))


def states(optimizer: object) -> list[tuple[str, dict]]:
    return [
        (type(inner).__name__, {"param_groups": inner.param_groups})
        for inner, _ in optimizer._peaks  # type: ignore[attr-defined]
    ]


def test_schedule_by_hand() -> None:
    config = StageConfig(warmup_steps=2, decay_share=0.4)
    shares = [rate_share(config, step, 10) for step in range(10)]
    assert shares == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    config = StageConfig(decay_share=0.5, schedule="cosine", final_rate=0.2)
    assert rate_share(config, 4, 10) == 1.0
    assert rate_share(config, 10, 10) == pytest.approx(0.2)
    half = rate_share(StageConfig(decay_share=1.0, schedule="cosine"), 5, 10)
    assert half == pytest.approx(0.5)
    assert [rate_share(StageConfig(), step, 3) for step in range(3)] == [1, 1, 1]


def test_muon_steps_along_an_orthogonal_matrix() -> None:
    layer = nn.Linear(8, 8, bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, StageConfig(muon_learning_rate=0.5, max_grad_norm=0.0))
    layer.weight.grad = torch.randn(8, 8)
    optimizer.step(0.1)
    update = (before - layer.weight.detach()) / 0.05
    # Five Newton-Schulz steps bring every singular value near 1.
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.5 and singular.max() < 1.5


def test_gradients_are_clipped_to_the_norm_and_dropped() -> None:
    layer = nn.Linear(4, 1)
    optimizer = build_optimizer(layer, StageConfig(optimizer="adamw", max_grad_norm=1.0))
    for p in layer.parameters():
        p.grad = torch.full_like(p, 3.0)
    assert optimizer.step(1.0) == pytest.approx(3 * 5**0.5)
    assert all(p.grad is None for p in layer.parameters())
    first_moment = [state["exp_avg"] for state in optimizer._peaks[0][0].state.values()]
    clipped = torch.cat([m.flatten() for m in first_moment]) / (1 - 0.9)
    assert float(clipped.norm()) == pytest.approx(1.0, rel=1e-4)


def test_norms_and_biases_do_not_decay() -> None:
    layer = nn.Linear(4, 4)
    optimizer = build_optimizer(layer, StageConfig(optimizer="adamw", weight_decay=0.1, learning_rate=1.0))
    with torch.no_grad():
        layer.bias.fill_(1.0)
    before = layer.weight.detach().clone()
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(1.0)
    torch.testing.assert_close(layer.weight.detach(), 0.9 * before)
    assert torch.equal(layer.bias.detach(), torch.ones(4))


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), StageConfig())


def test_muon_is_torch_s_muon_in_float32_on_a_cpu() -> None:
    torch.manual_seed(0)
    ours, theirs = ([torch.randn(24, 16, requires_grad=True), torch.randn(8, 40, requires_grad=True)] for _ in range(2))
    for mine, its in zip(ours, theirs, strict=True):
        its.data.copy_(mine.data)
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(4):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine - its).abs().max() < 0.02 * 4 * 0.02  # bfloat16 errs by about 1 % of a step
        assert torch.equal(optimizers[0].state[mine]["momentum_buffer"], optimizers[1].state[its]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_orthogonalized_is_float32_and_nearly_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    found = orthogonalized(matrix)
    assert found.dtype == torch.float32 and found.shape == matrix.shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97
