"""Where rollouts branch, and what a rollout was when one of its rounds began.

A branch has its parent's tokens, turns and session up to the start of a round and draws its own from there on.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from thyme.rollout.prompts import extract_answer, until_answer
from thyme.rollout.trajectory import COLUMNS
from thyme.rollout.tree import TreeConfig
from thyme.rollout.types import Rollout, RolloutStatus


def start_of(rollout: Rollout, round: int) -> int:
    """Tokens before a round.

    Raises:
        ValueError: nothing was drawn in such a round.
    """
    drawn = np.flatnonzero((rollout.rounds == round) & rollout.sampled)
    if not len(drawn):
        raise ValueError(
            f"rollout {rollout.question.id}/{rollout.index} drew nothing in round {round}: it has rounds 0 to "
            f"{int(rollout.rounds[rollout.sampled].max(initial=0))}"
        )
    return int(drawn[0])


def prefix_of(rollout: Rollout, round: int) -> Rollout:
    """The rollout as it was when this round began. Raises ValueError as `start_of` does."""
    length, turns = start_of(rollout, round), rollout.turns[:round]
    text = until_answer("".join(turn.text + turn.output_text for turn in turns))
    num_images = len(rollout.question.pictures) + sum(turn.num_images for turn in turns)
    return replace(
        rollout,
        **{name: getattr(rollout, name)[:length] for name in COLUMNS},
        images=rollout.images[:num_images],
        turns=turns,
        text=text,
        answer=extract_answer(text),
        status=RolloutStatus.ABORTED,
    )


def failed_round(rollout: Rollout) -> int | None:
    """The first round whose code did not end well; None where all did."""
    for number, turn in enumerate(rollout.turns):
        if turn.result is not None and turn.result.status.name != "OK":
            return number
    return None


def starting_entropy(rollout: Rollout, round: int, window: int) -> float:
    """Mean entropy, in nats, of the first `window` tokens that were drawn in a round."""
    return float(rollout.entropies[(rollout.rounds == round) & rollout.sampled][:window].mean())


def places(trunks: Sequence[Rollout], count: int, config: TreeConfig) -> list[tuple[int, int]]:
    """(index in `trunks`, round) where each of `count` branches begins: `config.branches` where the entropy at a
    round's start is highest, as many at the next, and so on, over again where rounds run out. Rounds after a tool's
    output count, and the first ones only where there is no other."""
    rounds = [(i, r) for i, trunk in enumerate(trunks) for r in np.unique(trunk.rounds[trunk.sampled]).tolist()]
    later = [place for place in rounds if place[1] > 0] or rounds
    later.sort(key=lambda place: -starting_entropy(trunks[place[0]], place[1], config.window))  # stable
    return [later[number // config.branches % len(later)] for number in range(count)]
