"""`thyme completion`: the scripts in the shells that they are for, asked as a person asks who presses tab."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from thyme.cli import main
from thyme.config import shipped_recipes
from thyme.verbs.completion import words
from thyme.verbs.resume import CHANGEABLE
from thyme.verbs.table import JSON_VERBS, RECIPE_VERBS, VERBS

ROOT = Path(__file__).parents[2]
ASKED: list[tuple[str, set[str], set[str]]] = [
    ("thyme ", {"rl", "data", "bench", "sandbox", "--version"}, {"build"}),
    ("thyme a", {"ask", "anneal", "ablate"}, {"rl"}),
    ("thyme data ", {"build", "check", "stats"}, {"run", "rl"}),
    ("thyme rl ", {"demo", "grpo_ats_7b"}, {"--rl.steps"}),
    ("thyme rl demo --rl.ste", {"--rl.steps"}, {"--rl.schedule"}),
    ("thyme rl --rl.greedy-tokens ", {"raw", "exclude", "is_pi", "soft"}, {"demo"}),
    ("thyme rl --engine.deterministic ", {"true", "false"}, {"demo"}),
    ("thyme export --dtype ", {"bfloat16", "float32"}, {"float16"}),
    ("thyme bench --dtype ", {"bfloat16", "float32", "float16"}, set()),
    ("thyme data check --fo", {"--format"}, {"--images"}),
    ("thyme bench sw", {"swiglu"}, {"sample"}),
    ("thyme resume runs/x --rl.ste", {"--rl.steps"}, set()),
    ("thyme completion ", {"bash", "zsh", "fish"}, set()),
    ("thyme sft --js", {"--json"}, set()),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of each shell."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        done = subprocess.run(
            [sys.executable, "-m", "thyme", "completion", shell],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        (folder / f"thyme.{shell}").write_text(done.stdout)
    return folder


def needs(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"no {shell} on this machine")
    return path


def test_every_verb_and_setting_is_in_the_table() -> None:
    found = words()
    assert set(found) == set(VERBS)
    assert all(("--json" in found[verb].flags) == (verb in JSON_VERBS) for verb in VERBS)
    assert all(set(shipped_recipes()) == set(found[verb].places) for verb in RECIPE_VERBS)
    assert len(found["rl"].flags) > 200
    may = found["resume"].flags
    assert {"--rl.steps", "--sft.save-steps", "--threads", "--eval.num-questions"} <= set(may)
    assert not {"--rl.learning-rate", "--model", "--sandbox.timeout-s"} & set(may)
    assert all(any(flag.endswith(name.replace("_", "-")) for flag in may) for name in CHANGEABLE)


def test_the_table_is_made_without_torch() -> None:
    code = "import sys\nfrom thyme.cli import main\nmain(['completion', 'bash'])\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_bash_completes_and_starts_no_process(scripts: Path) -> None:
    bash = needs("bash")
    lines = [f"source {scripts}/thyme.bash", "PATH=/nowhere"]
    for line, _, _ in ASKED:
        said = line.split(" ")
        quoted = " ".join(f"'{word}'" for word in said)
        lines += [f"COMP_WORDS=({quoted}); COMP_CWORD={len(said) - 1}; COMPREPLY=()", '_thyme; echo "${COMPREPLY[*]}"']
    # An equals sign is a word of its own there.
    lines += ["COMP_WORDS=(thyme rl --rl.greedy-tokens = s); COMP_CWORD=4", '_thyme; echo "${COMPREPLY[*]}"']
    done = subprocess.run([bash, "--norc", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    *answers, after_equals = done.stdout.splitlines()
    for (line, wanted, unwanted), answer in zip(ASKED, answers, strict=True):
        assert wanted <= set(answer.split()) and not unwanted & set(answer.split()), line
    assert after_equals == "soft"


def test_bash_offers_files_where_no_word_fits(scripts: Path, tmp_path: Path) -> None:
    """As readline does it, in a terminal."""
    (tmp_path / "photograph.png").touch()
    command = [needs("bash"), "--norc", "-i"]
    with Terminal(command, tmp_path, PS1="> ") as terminal:
        terminal.type(f"source {scripts}/thyme.bash\n")
        assert "photograph.png" in terminal.type("thyme ask model phot\t", until="photograph.png")


def test_fish_completes(scripts: Path) -> None:
    fish = needs("fish")
    for line, wanted, unwanted in [*ASKED, ("thyme rl --rl.greedy-tokens=s", {"--rl.greedy-tokens=soft"}, set())]:
        code = f"source {scripts}/thyme.fish; complete -C '{line}'"
        done = subprocess.run(
            [fish, "--no-config", "-c", code], capture_output=True, text=True, cwd=scripts, check=True
        )
        found = {one.partition("\t")[0] for one in done.stdout.splitlines()}
        assert done.stderr == "" and wanted <= found and not unwanted & found, line


def test_zsh_completes(scripts: Path) -> None:
    with Terminal([needs("zsh"), "-f", "-i"], scripts, PS1="> ") as terminal:
        terminal.type("autoload -Uz compinit; compinit -u -D; unsetopt menu_complete auto_menu\n")
        terminal.type(f"source {scripts}/thyme.zsh; echo re''ady\n", until="ready")
        for line, wanted, unwanted in ASKED:
            if line == "thyme ":  # longer than the screen
                continue
            tabs = "\t" * min(2, len(wanted))  # one that is the only one is filled in by the first
            shown = terminal.type(line + tabs, until=max(wanted)).replace("\x07", "")
            others = shown.removeprefix(line).split()
            assert all(word in shown for word in wanted) and not any(word in others for word in unwanted), shown
            terminal.type("\x15")
        assert "soft" in terminal.type("thyme rl --rl.greedy-tokens=s\t", until="soft")


class Terminal:
    """A shell on a terminal of its own, typed into."""

    def __init__(self, command: list[str], cwd: Path, **environment: str) -> None:
        pid, self._fd = pty.fork()
        if pid == 0:
            os.chdir(cwd)
            os.execvpe(command[0], command, os.environ | {"TERM": "dumb"} | environment)
        self._pid = pid

    def __enter__(self) -> "Terminal":
        self._read("> ")
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, 9)
        os.waitpid(self._pid, 0)
        os.close(self._fd)

    def type(self, text: str, until: str = "") -> str:
        """What is shown after it, until something stands there, or nothing more comes."""
        os.write(self._fd, text.encode())
        return self._read(until)

    def _read(self, until: str) -> str:
        shown, deadline = "", time.monotonic() + 20
        while time.monotonic() < deadline:
            if select.select([self._fd], [], [], 0.3)[0]:
                shown += os.read(self._fd, 65536).decode(errors="replace")
            elif until in shown:
                break
        return shown


def test_a_shell_that_nobody_knows_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "tcsh"])
    assert ended.value.code == 2 and "'tcsh' is not one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err
