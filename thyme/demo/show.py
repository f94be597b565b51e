"""What the demo prints: one table by scenario, and sample traces that read in a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from thyme.evals import EvalResult, NoCodeControl, Summary
from thyme.evals.scoring import is_correct
from thyme.rollout.types import Rollout


def percent(summary: Summary) -> str:
    return f"{summary.accuracy:4.0%} [{summary.low:.0%}-{summary.high:.0%}]"


def scenario_table(columns: Mapping[str, EvalResult], control: NoCodeControl) -> Table:
    """Accuracy with 95 % intervals by scenario: one column a model, then the no-code control and chance."""
    table = Table(title="Held-out accuracy, greedy, 95 % Wilson intervals", title_justify="left")
    table.add_column("scenario")
    table.add_column("n", justify="right")
    for name in columns:
        table.add_column(name)
    table.add_column("code used / ok after RL")
    table.add_column("no-code control (chance)")
    last = list(columns.values())[-1]
    for scenario, summary in last.scenarios.items():
        row = [scenario, str(summary.n)]
        row += [percent(result.scenarios[scenario]) for result in columns.values()]
        row.append(_code(summary))
        forbidden = control.scenarios.get(scenario)
        row.append(f"{forbidden.accuracy:.0%} ({control.chance[scenario]:.0%})" if forbidden else "needs no code")
        table.add_row(*row)
    table.add_section()
    overall = [percent(result.overall) for result in columns.values()]
    table.add_row("all", str(last.overall.n), *overall, _code(last.overall), f"{control.overall.accuracy:.0%}")
    return table


def _code(summary: Summary) -> str:
    ok = "-" if summary.code_ok is None else f"{summary.code_ok:.0%}"
    return f"{summary.code_share:.0%} / {ok}"


def trace(rollout: Rollout) -> Panel:
    """One rollout, round by round: thoughts, code, what the sandbox sent back, the answer and whether it is right."""
    parts: list[Text | Syntax] = [Text(rollout.question.question, style="bold")]
    for turn in rollout.turns:
        before, _, _ = turn.text.partition("<code>")
        parts.append(Text(before.strip()))
        if turn.code is not None:
            parts.append(Syntax(turn.code, "python", background_color="default"))
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
