"""The optimizer: who gets Muon, the schedule, clipping, and a state that can be saved."""

import copy
import math
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

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


def in_bfloat16(model: Model) -> Model:
    return model.to(torch.bfloat16)


def updates(model: Model, config: StageConfig, gradients: Iterator[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """What the optimizer's own weights and the model's moved by under given gradients, each flattened to one vector."""
    optimizer = build_optimizer(model, config)
    stepped = [optimizer._masters.get(p, p) for p in model.parameters()]
    before = [p.detach().float().clone() for p in stepped]
    for step in gradients:
        for p, gradient in zip(model.parameters(), step, strict=True):
            p.grad = gradient.to(p.dtype)
        optimizer.step(1.0)

    def moved(parameters: Iterable[Tensor]) -> Tensor:
        return torch.cat([(p.detach().float() - b).flatten() for p, b in zip(parameters, before, strict=True)])

    return moved(stepped), moved(model.parameters())


def drawn(model: Model, steps: int) -> Iterator[list[Tensor]]:
    """Gradients with a direction of their own and noise on it, bfloat16 so that both arms get the same."""
    draw = torch.Generator().manual_seed(0)
    steady = [torch.randn(p.shape, generator=draw) for p in model.parameters()]
    for _ in range(steps):
        yield [(s + torch.randn(s.shape, generator=draw)).bfloat16() for s in steady]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("rate", [5e-7, 1e-5])
def test_small_steps_add_up_under_a_bfloat16_model(rate: float, offload: bool, optimizer: str, model: Model) -> None:
    config = StageConfig(optimizer=optimizer, learning_rate=rate, muon_learning_rate=rate, optimizer_offload=offload)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())  # both arms begin at the same weights
    exact, _ = updates(copy.deepcopy(model), config, drawn(model, 8))
    masters, weights = updates(in_bfloat16(model), config, drawn(model, 8))
    assert cosine(masters, exact) > 0.9999
    assert weights.count_nonzero() < 0.9 * len(weights)  # which is why there are masters


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()) / a.double().norm() / b.double().norm())


def test_micro_batches_are_added_up_in_float32(model: Model) -> None:
    """256 + 1 is 256 in bfloat16."""
    optimizer = build_optimizer(in_bfloat16(model), StageConfig())
    first = next(model.parameters())
    for value in (256.0, 1.0, 1.0):
        first.grad = torch.full_like(first, value)
        optimizer.add_up()
    assert optimizer._masters[first].grad is not None and (optimizer._masters[first].grad == 258).all()
    assert optimizer.step(1.0) == pytest.approx(258 * first.numel() ** 0.5, rel=1e-3)


def test_masters_are_saved_and_come_back_to_the_bit(model: Model) -> None:
    config = StageConfig(learning_rate=1e-6, muon_learning_rate=1e-6)
    whole, halved = in_bfloat16(copy.deepcopy(model)), in_bfloat16(model)
    updates(whole, config, drawn(whole, 6))
    optimizer = build_optimizer(halved, config)
    gradients = list(drawn(halved, 6))
    for half in (gradients[:3], gradients[3:]):
        state = pickle.loads(pickle.dumps(optimizer.state_dict()))
        optimizer = build_optimizer(halved, config)
        if state["AdamW"]:
            optimizer.load_state_dict(state)
        for step in half:
            for p, gradient in zip(halved.parameters(), step, strict=True):
                p.grad = gradient
            optimizer.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halved.parameters(), strict=True))


def test_a_state_of_another_layout_is_refused_in_words(model: Model) -> None:
    plain = build_optimizer(model, StageConfig())
    mastered = build_optimizer(in_bfloat16(copy.deepcopy(model)), StageConfig())
    adamw = build_optimizer(model, StageConfig(optimizer="adamw"))
    for one, other in ((plain, mastered), (mastered, plain), (plain, adamw), (adamw, plain)):
        with pytest.raises(ValueError, match="resume with its optimizer"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("gradient", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_what_is_not_finite_moves_nothing(gradient: float, loss: float, dtype: torch.dtype) -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)
    optimizer = build_optimizer(layers, StageConfig())
    before = copy.deepcopy(layers.state_dict())
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    layers[0].weight.grad[0, 0] = gradient  # type: ignore[index, union-attr]
    optimizer.step(1.0, loss)
    assert all(torch.equal(before[name], value) for name, value in layers.state_dict().items())
    assert all(p.grad is None for p in layers.parameters())
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1.0, 1.0)  # and the next one is as if it had never been
    assert all(value.isfinite().all() for value in layers.state_dict().values())


@pytest.mark.soak
def test_states_in_bfloat16_are_for_weights_in_bfloat16() -> None:
    pytest.importorskip("torchao", reason="the extra train is not installed")
    with pytest.raises(ValueError, match="is for weights in bfloat16"):
        build_optimizer(nn.Linear(2, 2), StageConfig(optimizer="adamw", optimizer_state="bf16"))


@pytest.mark.soak
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("state", "least"), [("bf16", 0.9), ("8bit", 0.9)])
def test_small_states_learn_by_rounding_at_random(state: str, least: float, model: Model) -> None:
    pytest.importorskip("torchao", reason="the extra train is not installed")
    config = StageConfig(optimizer="adamw", learning_rate=1e-5, optimizer_state=state)
    shapes = nn.ModuleList([nn.Linear(256, 256) for _ in range(2)]).to(torch.bfloat16)
    exact, _ = updates(copy.deepcopy(shapes).float(), replace(config, optimizer_state="fp32"), drawn(shapes, 300))
    _, weights = updates(shapes, config, drawn(shapes, 300))
    assert cosine(weights, exact) > least
