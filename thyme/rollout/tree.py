"""How many of a group begin at the prompt, and where the others branch off. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeConfig:
    """Trees of rollouts: some begin at the prompt, and the rest of the group branches off them."""

    trunks: int = 0
    """Rollouts of a question that begin at its prompt and run to their ends first; 0: all of the group, no tree."""
    branches: int = 2
    """Rollouts that branch off at the start of one round: of that whose entropy is highest, then of the next."""
    window: int = 8
    """Tokens at the start of a round over which its entropy is a mean."""

    def __post_init__(self) -> None:
        if self.trunks < 0:
            raise ValueError(f"trunks: {self.trunks} must be at least 0")
        for name in ("branches", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
