"""The ops as PyTorch knows them, registered with torch.library: torch.compile(fullgraph=True) goes through them.

While a graph is traced, a public op is one node, `thyme::<op>`: what it computes is not looked into, its results are
known from shapes alone, and it is differentiable. Eagerly nothing of this is run: the op's own function is called.

One row an op in OPS. What a schema cannot hold is spread out: a SharedPrefix as its two tensors, a GrpoLossConfig as
its fields, ids as a tensor. A compiled backward pass computes the forward anew from its inputs, as activation
checkpointing does, and keeps nothing else; the eager one keeps what each op says.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from thyme.kernels.policy_config import GrpoLossConfig, GrpoMetrics, TokenInputs
from thyme.kernels.shared_prefix import SharedPrefix

P = ParamSpec("P")
T = TypeVar("T")
Arguments = dict[str, Any]

watch: Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any] | None = None
"""Calls a public op by its name, and may time it; None: ops are called as they are."""
_DENSE = torch.contiguous_format
_LIBRARY = torch.library.Library("thyme", "FRAGMENT")


def _same(arguments: Arguments) -> Arguments:
    return arguments


class Op(NamedTuple):
    """How a public op looks as a node of a graph. Arguments go by name, in every function here."""

    schema: str
    """Arguments and results of the node, as torch.library words them; none has a default."""
    fake: Callable[[Arguments], Tensor | tuple[Tensor, ...]]
    """Results of the right shapes and types, from the node's arguments."""
    gradients: tuple[str, ...] = ()
    """Arguments that it is differentiable in."""
    spread: Callable[[Arguments], Arguments] = _same
    """The node's arguments, of the public ones."""
    gathered: Callable[[Arguments], Arguments] = _same
    """The public arguments, of the node's."""
    flat: Callable[[Any], Any] = _same
    """The node's results, of the public op's."""
    result: Callable[[Any, Arguments], Any] | None = None
    """The public results, of the node's and of its arguments; None: they are the same, as the tuple that the public op
    says it returns."""


def registered(run: Callable[P, T]) -> Callable[P, T]:
    """Registers a public op by its row of OPS, and has it be that node wherever a graph is traced."""
    name = run.__name__
    row = OPS[name]
    public = {parameter.name: parameter.default for parameter in signature(run).parameters.values()}
    node, names = _define(name, row, run)
    returned = signature(run).return_annotation
    is_named = hasattr(returned, "_fields")  # a NamedTuple

    @wraps(run)
    def op(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            if watch is not None:
                watched: T = watch(name, run, args, kwargs)
                return watched
            return run(*args, **kwargs)
        given = row.spread(public | dict(zip(public, args, strict=False)) | kwargs)
        out = node(*[given[one] for one in names])
        if row.result is not None:
            out = row.result(out, given)
        elif is_named:
            out = returned(*out)
        result: T = out
        return result

    return op


def _define(name: str, row: Op, run: Callable[..., Any]) -> tuple[Callable[..., Any], list[str]]:
    """The node, and the names of its arguments."""
    _LIBRARY.define(f"{name}{row.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    node = getattr(torch.ops.thyme, name).default
    names = [argument.name for argument in node._schema.arguments]

    def compute(*args: Any) -> Any:
        with torch.no_grad():
            out = row.flat(run(**row.gathered(dict(zip(names, args, strict=True)))))
        return tuple(map(_owned, out)) if isinstance(out, tuple) else _owned(out)

    def fake(*args: Any) -> Any:
        return row.fake(dict(zip(names, args, strict=True)))

    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"thyme::{name}", fake, lib=_LIBRARY)
    if row.gradients:
        _differentiate(name, row, run, names)
    return node, names


def _owned(x: Tensor) -> Tensor:
    """x in memory of its own, dense: a graph is told so of every result."""
    return x if x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes() else x.clone(memory_format=_DENSE)


def _differentiate(name: str, row: Op, run: Callable[..., Any], names: list[str]) -> None:
    """Registers `<name>_backward`, which computes the forward anew, and has autograd call it."""
    inputs = row.schema[1 : row.schema.rindex(") ->")]
    _LIBRARY.define(
        f"{name}_backward(Tensor?[] grads, bool[] needs, {inputs}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
    )
    node = getattr(torch.ops.thyme, f"{name}_backward").default

    def wanted(needs: Sequence[bool]) -> list[str]:
        return [which for which, need in zip(row.gradients, needs, strict=True) if need]

    def backward(grads: Sequence[Tensor | None], needs: Sequence[bool], *args: Any) -> list[Tensor]:
        given = dict(zip(names, args, strict=True))
        leaves = {which: given[which].detach().requires_grad_() for which in wanted(needs)}
        with torch.enable_grad():
            out = row.flat(run(**row.gathered(given | leaves)))
        outs = out if isinstance(out, tuple) else (out,)
        pairs = [(x, grad) for x, grad in zip(outs, grads, strict=True) if grad is not None and x.requires_grad]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in leaves.values()]
        results, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(results, list(leaves.values()), weights, allow_unused=True)
        return [
            torch.zeros_like(leaf) if grad is None else grad.clone(memory_format=_DENSE)
            for leaf, grad in zip(leaves.values(), found, strict=True)
        ]

    def fake(grads: Sequence[Tensor | None], needs: Sequence[bool], *args: Any) -> list[Tensor]:
        given = dict(zip(names, args, strict=True))
        return [given[which].new_empty(given[which].shape) for which in wanted(needs)]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def derive(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if other is None else other[0] for other in ctx.others]
        needs = [bool(ctx.needs_input_grad[names.index(which)]) for which in row.gradients]
        found = dict(zip(wanted(needs), node(list(grads), needs, *args), strict=True))
        return tuple(found.get(which) for which in names)

    _LIBRARY.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"thyme::{name}_backward", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"thyme::{name}", derive, setup_context=setup, lib=_LIBRARY)


# --- what is spread out ----------------------------------------------------------------------------------------------


def _ids(arguments: Arguments) -> Arguments:
    """Ids as a tensor."""
    banned = arguments.get("banned_ids")
    if banned is None or isinstance(banned, Tensor):
        return arguments
    device = arguments["hidden" if "hidden" in arguments else "logits"].device
    return arguments | {"banned_ids": torch.tensor(list(banned), dtype=torch.int64, device=device)}


def _without_prefix(arguments: Arguments) -> Arguments:
    shared = arguments["shared"]
    groups = (None, None) if shared is None else (shared.cu_groups, shared.num_blocks)
    return arguments | {"cu_groups": groups[0], "group_blocks": groups[1]}


def _with_prefix(arguments: Arguments) -> Arguments:
    rest = dict(arguments)
    groups, blocks = rest.pop("cu_groups"), rest.pop("group_blocks")
    return rest | {"shared": None if groups is None else SharedPrefix(groups, blocks)}


def _limits(arguments: Arguments) -> Arguments:
    """Limits as one tensor each."""
    logits = arguments["logits"]
    given = dict(_ids(arguments))
    for name, dtype in (("top_k", torch.int64), ("top_p", torch.float32), ("min_p", torch.float32)):
        limit = given.get(name)
        if limit is not None and not isinstance(limit, Tensor):
            given[name] = torch.full((logits.shape[0],), limit, dtype=dtype, device=logits.device)
    return given


_CONFIG = (
    ("loss", "str"),
    ("kl", "str"),
    ("kl_coef", "float"),
    ("kl_times_ratio", "bool"),
    ("clip_eps_low", "float"),
    ("clip_eps_high", "float"),
    ("ratio_cap", "float?"),
    ("rollout_ratio_cap", "float?"),
    ("entropy_coef", "float"),
    ("greedy_tokens", "str"),
)


def _without_config(arguments: Arguments) -> Arguments:
    config = arguments["config"] or GrpoLossConfig()
    return (_limits(arguments) if "top_k" in arguments else _ids(arguments)) | {
        name: getattr(config, name) for name, _ in _CONFIG
    }


def _with_config(arguments: Arguments) -> Arguments:
    fields = {name for name, _ in _CONFIG}
    rest = {name: value for name, value in arguments.items() if name not in fields}
    return rest | {"config": GrpoLossConfig(**{name: arguments[name] for name in fields})}


def _metric_names(arguments: Arguments) -> tuple[str, ...]:
    """Of the values that a loss returns beside itself."""
    config = GrpoLossConfig(**{name: arguments[name] for name, _ in _CONFIG})
    some = arguments["weights"]
    names = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "temperature", "cu_seqlens", "segments")
    inputs = TokenInputs(some, some, some, some, *(arguments[name] for name in names))
    return inputs.metric_names(config)


def _loss(operands: str, gradients: tuple[str, ...], options: str = "") -> Op:
    fields = ", ".join(f"{kind} {name}" for name, kind in _CONFIG)
    schema = (
        f"({operands}, Tensor advantages, Tensor weights, Tensor? old_logprobs, Tensor? ref_logprobs, "
        f"Tensor? rollout_logprobs, Tensor? temperature, Tensor? cu_seqlens, Tensor? segments, {options}{fields})"
        " -> (Tensor, Tensor)"
    )

    def fake(arguments: Arguments) -> tuple[Tensor, Tensor]:
        first = arguments[gradients[0]]
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        return first.new_empty((), dtype=wide), first.new_empty(len(_metric_names(arguments)), dtype=torch.float32)

    return Op(
        schema,
        fake,
        gradients,
        _without_config,
        _with_config,
        lambda out: (out[0], out[1].values.clone()),
        lambda out, arguments: (out[0], GrpoMetrics(_metric_names(arguments), out[1])),
    )


def _row_results(arguments: Arguments, operand: str) -> tuple[Tensor, Tensor]:
    rows = arguments[operand]
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows.new_empty(rows.shape[0], dtype=wide), rows.new_empty(rows.shape[0], dtype=wide)


def _drawn(arguments: Arguments) -> tuple[Tensor, ...]:
    logits = arguments["logits"]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    others = [logits.new_empty(logits.shape[0], dtype=wide) for _ in range(4)]
    return logits.new_empty(logits.shape[0], dtype=torch.int64), *others


def _half(gate: Tensor) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))


def _like(name: str) -> Callable[[Arguments], Tensor]:
    return lambda arguments: arguments[name].new_empty(arguments[name].shape)


_ROWS = "Tensor? temperature, Tensor? mask, int? vocab_size, Tensor? banned_ids"
_HEAD = "int? vocab_size, Tensor? banned_ids, str backward, int workspace_bytes"
_CUTS = "Tensor? top_k, Tensor? top_p, Tensor? min_p"

OPS = {
    "rmsnorm": Op("(Tensor x, Tensor weight, float eps) -> Tensor", _like("x"), ("x", "weight")),
    "add_rmsnorm": Op(
        "(Tensor delta, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
        lambda arguments: (_like("delta")(arguments), _like("delta")(arguments)),
        ("delta", "residual", "weight"),
    ),
    "swiglu": Op(
        "(Tensor gate, Tensor? up) -> Tensor",
        lambda arguments: _like("gate")(arguments) if arguments["up"] is not None else _half(arguments["gate"]),
        ("gate", "up"),
    ),
    "fp8_linear": Op(
        "(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor",
        lambda arguments: arguments["x"].new_empty(arguments["x"].shape[0], arguments["codes"].shape[0]),
    ),
    "packed_product": Op(
        "(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor",
        lambda arguments: arguments["x"].new_empty(arguments["x"].shape[0], arguments["outputs"]),
    ),
    "mrope": Op("(Tensor heads, Tensor cos, Tensor sin) -> Tensor", _like("heads"), ("heads",)),
    "mrope_write_kv": Op(
        "(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
        "Tensor? bias, Tensor(c!)? k_scales, Tensor(d!)? v_scales) -> Tensor",
        lambda arguments: arguments["qkv"].new_empty(
            arguments["qkv"].shape[0],
            arguments["qkv"].shape[1] - 2 * arguments["k_cache"].shape[2],
            arguments["qkv"].shape[2],
        ),
    ),
    "paged_attention": Op(
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens, Tensor cu_seqlens_q, "
        "float scale, int? max_query_len, Tensor? cu_groups, Tensor? group_blocks, bool batch_invariant, "
        "Tensor? k_scales, Tensor? v_scales) -> Tensor",
        _like("q"),
        spread=_without_prefix,
        gathered=_with_prefix,
    ),
    "sample": Op(
        "(Tensor logits, Tensor temperature, Tensor seed, Tensor position, Tensor? top_k, Tensor? top_p, "
        "Tensor? min_p, int? vocab_size, Tensor? banned_ids, bool bitwise_logprobs)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _drawn,
        spread=_limits,
        flat=tuple,
    ),
    "token_logprobs": Op(
        f"(Tensor logits, Tensor targets, {_ROWS}) -> (Tensor, Tensor)",
        lambda arguments: _row_results(arguments, "logits"),
        ("logits",),
        _ids,
    ),
    "truncated_logprobs": Op(
        f"(Tensor logits, Tensor targets, {_ROWS}, {_CUTS}) -> (Tensor, Tensor)",
        lambda arguments: _row_results(arguments, "logits"),
        ("logits",),
        _limits,
    ),
    "linear_logprob": Op(
        f"(Tensor hidden, Tensor weight, Tensor targets, Tensor? temperature, Tensor? mask, int? num_counted, {_HEAD}, "
        "Tensor? logprob_gradient) -> (Tensor, Tensor)",
        lambda arguments: _row_results(arguments, "hidden"),
        ("hidden", "weight"),
        _ids,
    ),
    "policy_loss": _loss("Tensor logprob, Tensor entropy", ("logprob", "entropy")),
    "grpo_loss": _loss("Tensor logits, Tensor targets", ("logits",), f"int? vocab_size, Tensor? banned_ids, {_CUTS}, "),
    "linear_grpo_loss": _loss(
        "Tensor hidden, Tensor weight, Tensor targets",
        ("hidden", "weight"),
        f"int? num_counted, bool tempered, {_HEAD}, ",
    ),
}
"""By the public op's name."""
