"""Say what this machine lacks and the command that mends it: packages, GPU, kernels, parity, the sandbox's layers."""

from collections.abc import Callable
from dataclasses import dataclass

from thyme.result import Result
from thyme.verbs.doctor_check import Check


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is looked at."""

    kernels: bool = True
    """Compare each kernel with its reference; without a GPU by Triton's interpreter."""
    parity: bool = True
    """Compare the engine with the trainer on a small model."""


def run(config: Config) -> Result:
    """Prints everything; the exit code is 2 where something fails that this project needs."""
    checks = examine(config)
    _print(checks)
    return Result(checks, 2 if any(check.needed and not check.ok for check in checks) else 0)


def examine(config: Config) -> list[Check]:
    """Everything, in the order in which it is to be mended."""
    from thyme.verbs.doctor_kernels import kernels_in_child
    from thyme.verbs.doctor_machine import machine_checks, package_checks
    from thyme.verbs.doctor_parity import parity_checks

    parts: list[Callable[[], list[Check]]] = [machine_checks, package_checks]
    parts += [kernels_in_child] if config.kernels else []
    parts += [parity_checks] if config.parity else []
    return [check for part in [*parts, _sandbox_checks] for check in part()]


def _sandbox_checks() -> list[Check]:
    from thyme.sandbox.doctor import report

    layers = report()
    return [
        Check(
            part="sandbox",
            name=layer.name,
            ok=layer.ok,
            needed=layer is layers[-1],
            found=layer.detail,
            remedy=""
            if layer is not layers[-1] or layer.ok
            else "what the layers above say; SECURITY.md has the table",
        )
        for layer in layers
    ]


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("part", "what", "", "found")
    for before, check in zip([None, *checks], checks, strict=False):
        state = Text("ok", "green") if check.ok else Text("FAILS", "bold red") if check.needed else Text("no", "yellow")
        part = check.part if before is None or before.part != check.part else ""
        table.add_row(part, Text(check.name), state, Text(check.found))
    console = Console(highlight=False)
    console.print(table)
    for check in checks:
        if check.remedy:
            console.print(Text(f"{check.part}, {check.name}: {check.remedy}"), soft_wrap=True)
