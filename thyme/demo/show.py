"""What the demo prints: one table by scenario, and sample traces that read in a terminal."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from thyme.evals import EvalResult, NoCodeControl, Summary
from thyme.evals.scoring import is_correct
from thyme.rollout.types import Rollout


def percent(summary: Summary) -> str:
    return f"{100 * summary.accuracy:.0f} [{100 * summary.low:.0f}-{100 * summary.high:.0f}]"


def scenario_table(columns: Mapping[str, EvalResult], control: NoCodeControl) -> Table:
    """Accuracy by scenario: one column a model, then its code, then the no-code control and chance. 80 columns wide."""
    title = "Held-out accuracy in %, greedy [95 % Wilson interval]; code after RL"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("scenario")
    table.add_column("n", justify="right")
    for name in columns:
        table.add_column(name)
    table.add_column("code\nused/ok")
    table.add_column("no code\n(chance)")
    after = list(columns.values())[1]
    for scenario, summary in after.scenarios.items():
        row = [scenario, str(summary.n)]
        row += [percent(result.scenarios[scenario]) for result in columns.values()]
        row.append(_code(summary))
        forbidden = control.scenarios.get(scenario)
        chance = 100 * control.chance.get(scenario, 0.0)
        row.append(f"{100 * forbidden.accuracy:.0f} ({chance:.0f})" if forbidden else "")
        table.add_row(*row)
    table.add_section()
    overall = [percent(result.overall) for result in columns.values()]
    table.add_row("all", str(after.overall.n), *overall, _code(after.overall), f"{100 * control.overall.accuracy:.0f}")
    return table


def _code(summary: Summary) -> str:
    ok = "-" if summary.code_ok is None else f"{100 * summary.code_ok:.0f}"
    return f"{100 * summary.code_share:.0f}/{ok}"


def trace(rollout: Rollout) -> Panel:
    """One rollout, round by round: thoughts, code, what the sandbox sent back, the answer and whether it is right."""
    parts: list[Text | Syntax] = [Text(rollout.question.question, style="bold")]
    for turn in rollout.turns:
        before, _, _ = turn.text.partition("<code>")
        parts.append(Text(before.strip()))
        if turn.code is not None:
            code = Syntax(turn.code, "python", background_color="default")
            parts += [Text("<code>", style="dim"), code, Text("</code>", style="dim")]
        if turn.output_text:
            parts.append(Text(turn.output_text, style="cyan"))
    right = is_correct(rollout)
    verdict = f"{'right' if right else 'wrong'}: answered {rollout.answer!r}, solution {rollout.question.solution!r}"
    title = f"{rollout.question.scenario} {rollout.question.id}: {verdict}"
    return Panel(Group(*parts), title=title, title_align="left", border_style="green" if right else "red")


def show_traces(console: Console, before: EvalResult, after: EvalResult, scenarios: Sequence[str]) -> None:
    """One rollout a scenario, after RL; the first shows the same question before RL too."""
    position = {group[0].question.id: i for i, group in enumerate(after.rollouts)}
    for k, scenario in enumerate(scenarios):
        candidates = [group[0] for group in after.rollouts if group[0].question.scenario == scenario]
        if not candidates:
            continue
        chosen = next((r for r in candidates if is_correct(r) and r.num_code), candidates[0])
        if k == 0:
            console.print("Before RL:", style="dim")
            console.print(trace(before.rollouts[position[chosen.question.id]][0]))
            console.print("After RL:", style="dim")
        console.print(trace(chosen))
