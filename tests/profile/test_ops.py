"""The table of ops: what is counted of torch's and of ours."""

import pytest
import torch

from thyme.engine import Engine, EngineConfig, SamplingParams
from thyme.engine.step_cost import Ceilings
from thyme.kernels import library
from thyme.kernels.rmsnorm import rmsnorm
from thyme.model import Model
from thyme.profile.ceilings import measured_ceilings
from thyme.profile.ops import OpTable, op_lines

CPU = torch.device("cpu")


def test_products_are_counted_by_hand() -> None:
    x, weight = torch.randn(6, 10), torch.randn(4, 10)
    with OpTable(CPU) as table:
        for _ in range(3):
            torch.nn.functional.linear(x, weight)
        torch.bmm(torch.ones(2, 3, 5), torch.ones(2, 5, 7))
    rows = {row.name: row for row in table.rows()}
    (product,) = (row for name, row in rows.items() if name.startswith(("mm", "linear")))
    assert (product.calls, product.flops, product.bytes) == (3, 3 * 2 * 6 * 10 * 4, 3 * 4 * (60 + 40 + 24))
    assert (rows["torch.bmm"].flops, rows["torch.bmm"].bytes) == (2 * 2 * 3 * 5 * 7, 4 * (30 + 70 + 42))
    assert 0 < sum(row.seconds for row in rows.values()) <= table.wall_s


def test_an_op_of_ours_is_one_op_and_what_it_calls_is_its_own() -> None:
    x, weight = torch.randn(8, 16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    rmsnorm(x, weight, 1e-6)
    with OpTable(CPU) as table:
        rmsnorm(x, weight, 1e-6)
    (row,) = table.rows()  # in float64 it is made of several of torch's
    assert (row.name, row.calls, row.bytes) == ("thyme.rmsnorm", 1, 8 * (2 * 8 * 16 + 16))


def test_nothing_is_watched_afterwards_an_error_inside_or_not() -> None:
    x, weight = torch.randn(2, 3), torch.ones(4)
    with pytest.raises(ValueError), OpTable(CPU) as table:
        rmsnorm(x, weight, 1e-6)
    assert library.watch is None
    rmsnorm(x, torch.ones(3), 1e-6)
    assert not table.rows()


def test_views_move_nothing_and_gathers_what_they_take() -> None:
    table_of = torch.randn(1000, 8)
    ids = torch.tensor([1, 2, 3])
    with OpTable(CPU) as table:
        table_of.view(-1).unsqueeze(0)
        found = torch.nn.functional.embedding(ids, table_of)
        table_of[ids] = found
    rows = {row.name: row.bytes for row in table.rows()}
    assert rows["torch.embedding"] == rows["torch.index_put_"] == 2 * 3 * 8 * 4
    assert sum(rows.values()) == 2 * rows["torch.embedding"]


def test_the_backward_pass_of_torchs_ops_is_seen() -> None:
    weight = torch.randn(4, 10, requires_grad=True)
    with OpTable(CPU) as table:
        torch.nn.functional.linear(torch.randn(6, 10), weight).sum().backward()
    assert sum(row.flops for row in table.rows()) == 2 * (2 * 6 * 10 * 4)


def test_a_step_of_the_engine_is_made_of_ops_with_work(model: Model) -> None:
    engine = Engine(model, EngineConfig(num_blocks=32, max_sequences=4, quiet=True))
    engine.add([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True, repetition=None))
    engine.step()
    with OpTable(CPU) as table:
        engine.step()
    rows = {row.name: row for row in table.rows()}
    text = model.config.text
    layers = text.num_hidden_layers
    assert rows["thyme.paged_attention"].calls == rows["thyme.mrope_write_kv"].calls == layers
    assert rows["thyme.paged_attention"].flops == layers * 4 * text.num_attention_heads * text.head_dim * 4
    assert rows["thyme.sample"].calls == 1 and "thyme.mrope" not in rows
    wide = sum(row.flops for name, row in rows.items() if name.startswith(("linear", "mm", "addmm")))
    matrices = sum(p.numel() for p in model.decoder.layers.parameters() if p.dim() == 2)
    assert wide == 2 * (matrices + model.lm_head_weight.numel())
    lines = op_lines(table.rows(), table.wall_s, Ceilings(1e10, 1e11), most=3)
    assert len(lines) == 2 + 3 + 1 + 1 and "others" in lines[-2] and "outside of ops" in lines[-1]


def test_ceilings_are_of_this_machine() -> None:
    found = measured_ceilings(CPU, torch.float32)
    assert 1e8 < found.copy_bytes_per_s < 1e13 and 1e8 < found.matmul_flops_per_s < 1e14
