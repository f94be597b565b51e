"""Say what isolates the sandbox on this machine, tried and not guessed."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to set."""


def run(config: Config) -> int:
    """Prints every layer; the exit code says whether the sandbox would run."""
    from rich.console import Console
    from rich.table import Table

    from thyme.sandbox.doctor import report

    table = Table("layer", "holds", "needed", "what was tried")
    layers = report()
    for layer in layers:
        table.add_row(layer.name, "yes" if layer.ok else "NO", "core" if layer.core else "", layer.detail)
    Console(highlight=False).print(table)
    return 0 if layers[-1].ok else 2
