"""Each hand-written backward against finite differences in float64, each forward against its formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests import tiny
from thyme.kernels import linear_rows
from thyme.kernels.mrope import mrope
from thyme.kernels.swiglu import swiglu
from thyme.model.config import ModelConfig
from thyme.model.layers import MIN_ROWS, GatedMLP, RMSNorm
from thyme.model.model import Model


def test_rms_norm() -> None:
    norm = RMSNorm(6, 1e-3).double()
    norm.weight.data.normal_()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert torch.autograd.gradcheck(
        lambda y, w: torch.func.functional_call(norm, {"weight": w}, (y,)), (x, norm.weight)
    )


def test_rms_norm_of_bfloat16_squares_in_float32() -> None:
    norm = RMSNorm(4096, 1e-6).bfloat16()
    x = torch.randn(3, 4096).bfloat16() * 300
    expected = F.rms_norm(x.float(), (4096,), eps=1e-6)
    torch.testing.assert_close(norm(x).float(), expected, atol=0, rtol=2**-7)


def test_swiglu() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(swiglu(x), F.silu(x[:, :4]) * x[:, 4:])
    assert torch.autograd.gradcheck(swiglu, x)


def test_gated_mlp_with_bias() -> None:
    mlp = GatedMLP(4, 6, bias=True)
    x = torch.randn(5, 4)
    gate = F.linear(x, mlp.gate_up.weight[:6], mlp.gate_up.bias[:6])
    up = F.linear(x, mlp.gate_up.weight[6:], mlp.gate_up.bias[6:])
    torch.testing.assert_close(mlp(x), mlp.down(F.silu(gate) * up))


def test_rotation() -> None:
    angles = torch.randn(3, 1, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    out = mrope(x, angles.cos(), angles.sin())
    # As complex numbers (first half real, second half imaginary) it is a multiplication by e^(i angle).
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1))
    assert torch.autograd.gradcheck(lambda y: mrope(y, angles.cos(), angles.sin()), x)


def test_rotation_of_bfloat16_is_computed_in_float32() -> None:
    angles = torch.rand(5, 1, 8) * 1000
    x = torch.randn(5, 2, 16).bfloat16()
    exact = mrope(x.float(), angles.cos(), angles.sin())
    assert torch.equal(mrope(x, angles.cos(), angles.sin()), exact.bfloat16())


def test_without_gradients_the_arithmetic_is_the_same() -> None:
    norm, mlp = RMSNorm(16, 1e-6), GatedMLP(16, 24, bias=False)
    x, angles = torch.randn(5, 2, 16), torch.randn(5, 1, 8)

    def run() -> list[torch.Tensor]:
        return [norm(x), mlp(x), mrope(x, angles.cos(), angles.sin())]

    with torch.inference_mode():
        plain = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, run(), strict=True))


def test_logits_of_few_rows_are_made_among_zero_rows() -> None:
    """No bits of their own: those the rows have in a larger product. The kernels' own padding is to the same number."""
    model = Model(ModelConfig(model_type="qwen2", text=tiny.text_config()))
    hidden = torch.randn(40, 48)
    whole = model.logits(hidden)
    for count in (1, 2, MIN_ROWS - 1, MIN_ROWS, MIN_ROWS + 1):
        padded = torch.cat((hidden[:count], torch.zeros(max(0, MIN_ROWS - count), 48)))
        logits = model.logits(hidden[:count], min_rows=MIN_ROWS)
        assert torch.equal(logits, model.logits(padded)[:count])
        torch.testing.assert_close(logits, whole[:count])
    assert linear_rows.MIN_ROWS == MIN_ROWS
