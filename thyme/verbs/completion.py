"""Print what a shell needs to complete verbs, settings, their values, recipes and files: bash, zsh or fish.

    eval "$(thyme completion bash)"                                    in ~/.bashrc
    eval "$(thyme completion zsh)"                                     in ~/.zshrc, after compinit
    thyme completion fish > ~/.config/fish/completions/thyme.fish      once

The script knows everything itself, so that completing starts no process; print it anew after an update.
"""

from __future__ import annotations

import enum
import types
import typing
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from thyme.config import POSITIONAL, shipped_recipes
from thyme.options import flag, keys
from thyme.verbs.resume import CHANGEABLE, CHANGEABLE_ELSEWHERE
from thyme.verbs.table import JSON_VERBS, RECIPE_VERBS, VERBS

STAGES = ("sft", "anneal", "rl")


@dataclass(frozen=True, kw_only=True)
class Config:
    """For which shell."""

    shell: Literal["bash", "zsh", "fish"] = field(metadata=POSITIONAL)
    """Its name."""


def run(config: Config) -> None:
    """Prints the script."""
    print({"bash": BASH, "zsh": ZSH, "fish": FISH}[config.shell].format(**_parts(config.shell)))


@dataclass(frozen=True, slots=True)
class Words:
    """What may follow a verb."""

    flags: dict[str, tuple[str, ...]]
    """By flag the values it may have; none where these are numbers, texts or files."""
    places: tuple[str, ...]
    """Words that may stand without a flag; files may always."""


def words() -> dict[str, Words]:
    """Of every verb."""
    found = {}
    for verb, path in VERBS.items():
        config = import_module(path).Config
        flags = {flag(key): _values(hint) for key, hint in _said(verb, config) if typing.get_origin(hint) is not dict}
        flags |= {"--json": ()} if verb in JSON_VERBS else {}
        flags |= {"--dry-run": ()} if verb in RECIPE_VERBS else {}
        places = tuple(shipped_recipes()) if verb in RECIPE_VERBS else _places(verb)
        found[verb] = Words(flags | {"--help": (), "--help-all": ()}, places)
    return found


def _said(verb: str, config: Any) -> list[tuple[str, Any]]:
    """The keys that the verb's command line may say."""
    if verb != "resume":
        return keys(config)
    stages = (import_module(f"thyme.verbs.{stage}").Config for stage in STAGES)
    every = {key: hint for stage in stages for key, hint in keys(stage)}
    return [(key, hint) for key, hint in every.items() if _may_change(key)]


def _may_change(key: str) -> bool:
    table, _, last = key.rpartition(".")
    elsewhere = any(key == may or key.startswith(f"{may}.") for may in CHANGEABLE_ELSEWHERE)
    return elsewhere or (table in STAGES and last in CHANGEABLE)


def _places(verb: str) -> tuple[str, ...]:
    if verb == "completion":
        return typing.get_args(typing.get_type_hints(Config)["shell"])
    if verb == "bench":
        from thyme.verbs.bench import ROOT, groups_of

        try:
            return tuple(groups_of(ROOT))
        except ValueError:  # no checkout
            return ()
    return ()


def _values(hint: Any) -> tuple[str, ...]:
    """The words that a setting may be, where they are few."""
    if hint is bool:
        return ("true", "false")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return tuple(str(member.value) for member in hint)
    if typing.get_origin(hint) is Literal:
        return tuple(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_values(part) for part in typing.get_args(hint) if part is not type(None)]
        none = ("none",) if type(None) in typing.get_args(hint) else ()
        return (*(value for part in parts for value in part), *none) if any(parts) else ()
    return ()


def _parts(shell: str) -> dict[str, str]:
    """What differs in a script with every version: the verbs, and the cases of the functions that list words."""
    found = words()
    seconds: dict[str, list[str]] = {}
    for verb in found:
        first, _, second = verb.partition(" ")
        seconds.setdefault(first, []).extend([second] if second else [])
    values: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for verb, one in found.items():
        for name, choices in one.flags.items():
            if choices:
                values.setdefault((name, choices), []).append(verb)
    # A flag has the same values wherever it is said, but for a few.
    told: dict[str, int] = {}
    for name, _ in values:
        told[name] = told.get(name, 0) + 1
    cases = {
        tuple(f"{verb} {name}" for verb in verbs) if told[name] > 1 else (f"* {name}",): choices
        for (name, choices), verbs in values.items()
    }
    case = _fish_case if shell == "fish" else _posix_case
    return {
        "firsts": " ".join(seconds),
        "seconds": case({(first,): rest for first, rest in seconds.items() if rest}),
        "flags": case({(verb,): tuple(one.flags) for verb, one in found.items()}),
        "places": case({(verb,): one.places for verb, one in found.items() if one.places}),
        "values": case(cases),
    }


def _posix_case(cases: dict[tuple[str, ...], Any]) -> str:
    lines = []
    for patterns, listed in cases.items():
        shown = "|".join(f"*'{one[1:]}'" if one.startswith("*") else f"'{one}'" for one in patterns)
        lines.append(f"        {shown}) echo '{' '.join(listed)}' ;;")
    return "\n".join(lines)


def _fish_case(cases: dict[tuple[str, ...], Any]) -> str:
    lines = []
    for patterns, listed in cases.items():
        shown = " ".join(f"'{one}'" for one in patterns)
        lines += [f"        case {shown}", f"            string split -- ' ' '{' '.join(listed)}'"]
    return "\n".join(lines)


TABLES = """_thyme_seconds() {{
    case "$1" in
{seconds}
    esac
}}
_thyme_flags() {{
    case "$1" in
{flags}
    esac
}}
_thyme_places() {{
    case "$1" in
{places}
    esac
}}
_thyme_values() {{
    case "$1" in
{values}
    esac
}}
"""

BASH = (
    """# bash completion of thyme: eval "$(thyme completion bash)"
"""
    + TABLES
    + """_thyme() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" verb="${{COMP_WORDS[1]}}" at=2 words
    if [[ $before == "=" ]]; then before="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
    if [[ $cur == "=" ]]; then cur=""; fi
    local seconds="$(_thyme_seconds "$verb")"
    if [[ -n $seconds ]]; then verb="$verb ${{COMP_WORDS[2]}}" at=3; fi
    if ((COMP_CWORD == 1)); then
        words="{firsts} --help --version"
    elif ((COMP_CWORD < at)); then
        words="$seconds --help"
    elif [[ $cur == -* ]]; then
        words="$(_thyme_flags "$verb")"
    else
        words="$(_thyme_values "$verb $before")"
        if [[ -z $words && $before != --* ]]; then words="$(_thyme_places "$verb")"; fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _thyme thyme"""
)

ZSH = (
    """#compdef thyme
# zsh completion of thyme: eval "$(thyme completion zsh)" after compinit, or as _thyme in a folder of $fpath
"""
    + TABLES
    + """_thyme() {{
    local cur="$PREFIX" before="${{words[CURRENT-1]}}" verb="${{words[2]}}" at=3 listed
    local seconds="$(_thyme_seconds "$verb")"
    if [[ -n $seconds ]]; then verb="$verb ${{words[3]}}" at=4; fi
    if ((CURRENT == 2)); then
        compadd -- {firsts} --help --version
        return
    elif ((CURRENT < at)); then
        compadd -- ${{=seconds}} --help
        return
    elif [[ $cur == --*=* ]]; then
        listed="$(_thyme_values "$verb ${{cur%%=*}}")"
        compset -P '*='
        if [[ -n $listed ]]; then compadd -- ${{=listed}}; else _files; fi
        return
    elif [[ $cur == -* ]]; then
        compadd -- $(_thyme_flags "$verb")
        return
    fi
    listed="$(_thyme_values "$verb $before")"
    if [[ -z $listed && $before != --* ]]; then
        listed="$(_thyme_places "$verb")"
        if [[ -n $listed ]]; then compadd -- ${{=listed}}; fi
        _files
    elif [[ -n $listed ]]; then
        compadd -- ${{=listed}}
    else
        _files
    fi
}}
if [[ ${{zsh_eval_context[-1]}} == loadautofunc ]]; then _thyme "$@"; else compdef _thyme thyme; fi"""
)

FISH = """# fish completion of thyme: thyme completion fish > ~/.config/fish/completions/thyme.fish
function __thyme_seconds
    switch $argv[1]
{seconds}
    end
end
function __thyme_flags
    switch $argv[1]
{flags}
    end
end
function __thyme_places
    switch $argv[1]
{places}
    end
end
function __thyme_values
    switch $argv[1]
{values}
    end
end
function __thyme_words
    set -l said (commandline -opc)
    set -l cur (commandline -ct)
    set -l verb $said[2]
    if test (count $said) -lt 2
        string split ' ' '{firsts} --help --version'
        return
    end
    set -l seconds (__thyme_seconds $verb)
    if test (count $seconds) -gt 0
        if test (count $said) -lt 3
            printf '%s\\n' $seconds --help
            return
        end
        set verb "$verb $said[3]"
    end
    if string match -q -- '--*=*' $cur
        set -l name (string split -m 1 = -- $cur)[1]
        for value in (__thyme_values "$verb $name")
            echo $name=$value
        end
        return
    else if string match -q -- '-*' $cur
        __thyme_flags $verb
        return
    end
    set -l listed (__thyme_values "$verb $said[-1]")
    if test (count $listed) -gt 0
        printf '%s\\n' $listed
        return
    end
    if not string match -q -- '--*' $said[-1]
        __thyme_places $verb
    end
    __fish_complete_path $cur
end
complete -c thyme -f -a '(__thyme_words)'"""
