"""The demo's figures: what goes to summary.json, and the sentences that say what they mean."""

from dataclasses import asdict, dataclass
from typing import Any

from thyme.demo.rivals import RivalResult
from thyme.evals import EvalResult, NoCodeControl
from thyme.train.metrics import Metrics
from thyme.verbs.recipe import Recipe

GOAL_GAIN = 0.15
"""Held-out accuracy after RL over before; two standard errors of that difference are about 0.09."""
GOAL_CODE_OK = 0.9
GOAL_WALL_S = 480.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Everything the demo measured."""

    config: Recipe
    base: Metrics
    """Last step of the base stage, with its gates."""
    anneal: Metrics
    """Last step of math annealing, with its gate; empty if the gate was already met."""
    before: EvalResult
    after: EvalResult
    full: RivalResult
    control: NoCodeControl
    history: list[Metrics]
    """RL steps."""
    cold_start_cpu_s: float
    rl_cpu_s: float
    wall_s: float
    cpu_s: float

    def gates(self) -> dict[str, dict[str, Any]]:
        """Name -> value, goal, met."""
        after, before = self.after.overall, self.before.overall
        config = self.config
        at_least = {
            "base_locate": (self.base["gate/ground"], config.base.gate_ground),
            "base_read": (self.base["gate/one"], config.base.gate_one),
            "anneal_arithmetic": (self.anneal.get("gate/arithmetic", 1.0), config.anneal.gate_accuracy),
            "accuracy_gain": (after.accuracy - before.accuracy, GOAL_GAIN),
            "code_ok_rl": (after.code_ok or 0.0, GOAL_CODE_OK),
        }
        gates = {name: {"value": v, "goal": f">= {g}", "met": v >= g} for name, (v, g) in at_least.items()}
        gates["wall_s"] = {"value": self.wall_s, "goal": f"<= {GOAL_WALL_S:.0f}", "met": self.wall_s <= GOAL_WALL_S}
        return gates

    def to_json(self) -> dict[str, Any]:
        before, after, full = self.before.overall, self.after.overall, self.full.result.overall
        return {
            "seed": self.config.seed,
            "material": self.config.toy.material,
            "n_eval": after.n,
            "accuracy_sft": before.accuracy,
            "accuracy_sft_ci": [before.low, before.high],
            "accuracy_sft_full": full.accuracy,
            "accuracy_sft_full_ci": [full.low, full.high],
            "accuracy_rl": after.accuracy,
            "accuracy_rl_ci": [after.low, after.high],
            "code_ok_sft": before.code_ok,
            "code_ok_rl": after.code_ok,
            "code_share_sft": before.code_share,
            "code_share_rl": after.code_share,
            "no_code_control": self.control.to_json(),
            "gates": self.gates(),
            "scenarios": {
                name: {
                    "sft": asdict(self.before.scenarios[name]),
                    "sft_full": asdict(self.full.result.scenarios[name]),
                    "rl": asdict(summary),
                }
                for name, summary in self.after.scenarios.items()
            },
            "rl_steps": len(self.history),
            "cold_start_cpu_s": self.cold_start_cpu_s,
            "rl_cpu_s": self.rl_cpu_s,
            "sft_full_extra_steps": self.full.extra_steps,
            "sft_full_extra_cpu_s": self.full.extra_cpu_s,
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
        }

    def in_words(self) -> str:
        """What the table means, and what it does not."""
        before, after, full = self.before.overall, self.after.overall, self.full.result.overall
        small = [n for n in ("crop", "zoom") if n in self.after.scenarios]
        decided = ", ".join(
            f"{n} {self.before.scenarios[n].code_share:.0%} -> {self.after.scenarios[n].code_share:.0%}" for n in small
        )
        return (
            f"GRPO-ATS: {before.accuracy:.1%} -> {after.accuracy:.1%} on {after.n} held-out questions in "
            f"{len(self.history)} steps, {self.rl_cpu_s:.0f} CPU s.\n"
            "Most of the rise is one decision, to write code where the picture can't be read (share of code: "
            f"{decided}); it is not better eyesight.\n"
            f"The honest rival: the same base, SFT with code in every demonstration that needs it, for the CPU time of "
            f"cold start and RL: {full.accuracy:.1%}. Whoever has such demonstrations should use them.\n"
            f"Without code the code scenarios are worth {self.control.overall.accuracy:.1%}, even to a model whose SFT "
            f"answered {self.config.toy.no_code:.0%} of them directly with the true answer."
        )

    def gate_lines(self) -> str:
        lines = [
            f"  {name:<18} {gate['value']:>8.3f}   goal {gate['goal']:<8} {'met' if gate['met'] else 'MISSED'}"
            for name, gate in self.gates().items()
        ]
        return "\n".join(["Goals:", *lines, f"Wall {self.wall_s:.0f} s, CPU {self.cpu_s:.0f} s."])
