"""The multi-round rollout: prompts, the loop over engine and sandbox, and what is written to disk."""

from typing import TYPE_CHECKING

from thyme._lazy import facade

if TYPE_CHECKING:
    from thyme.rollout.config import RolloutConfig as RolloutConfig
    from thyme.rollout.prompts import SYSTEM_PROMPT as SYSTEM_PROMPT
    from thyme.rollout.prompts import build_prompt as build_prompt
    from thyme.rollout.prompts import extract_answer as extract_answer
    from thyme.rollout.prompts import extract_code as extract_code
    from thyme.rollout.prompts import text_prompt as text_prompt
    from thyme.rollout.prompts import user_prompt as user_prompt
    from thyme.rollout.records import read_rollouts as read_rollouts
    from thyme.rollout.records import write_rollouts as write_rollouts
    from thyme.rollout.rollout import RolloutLoop as RolloutLoop
    from thyme.rollout.sampling import Sampling as Sampling
    from thyme.rollout.tree import TreeConfig as TreeConfig
    from thyme.rollout.types import Parent as Parent
    from thyme.rollout.types import Question as Question
    from thyme.rollout.types import Rollout as Rollout
    from thyme.rollout.types import RolloutStatus as RolloutStatus
    from thyme.rollout.types import Turn as Turn
else:
    __all__, __getattr__ = facade(
        __name__,
        {
            "config": ["RolloutConfig"],
            "prompts": [
                "SYSTEM_PROMPT",
                "build_prompt",
                "extract_answer",
                "extract_code",
                "text_prompt",
                "user_prompt",
            ],
            "records": ["read_rollouts", "write_rollouts"],
            "rollout": ["RolloutLoop"],
            "sampling": ["Sampling"],
            "tree": ["TreeConfig"],
            "types": ["Parent", "Question", "Rollout", "RolloutStatus", "Turn"],
        },
    )
