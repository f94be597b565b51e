"""What leaves the repository: a checkout whose link was lost, the source distribution, the wheel, and its use from an
environment that has never seen the checkout."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

import thyme

ROOT = Path(__file__).parent.parent
SOURCES = ("csrc/", "docs/", "examples/", "kernels/", "thyme/")
"""Folders that a source distribution holds whole."""


def tracked() -> list[str]:
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in out.split("\0") if name and (ROOT / name).is_symlink() | (ROOT / name).is_file()]


def check_out(folder: Path) -> Path:
    """A copy of the tracked files as they are now."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def run_setup(checkout: Path, *, code: str = "") -> subprocess.CompletedProcess[str]:
    """`python setup.py --version`, after `code`."""
    start = f"import runpy, sys\n{code}\nsys.argv = ['setup.py', '--version']\nrunpy.run_path('setup.py')"
    return subprocess.run([sys.executable, "-c", start], cwd=checkout, capture_output=True, text=True, check=False)


def plain_environment() -> dict[str, str]:
    """Ours without what was told to this Python: a PYTHONPATH to the checkout, say, which pip takes for installed."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "TRITON"))}


def build_sdist(checkout: Path) -> Path:
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = (checkout / "dist").glob("*.tar.gz")
    return made


# A checkout whose link was lost.


def test_a_zip_of_git_archive_holds_the_link_as_text(tmp_path: Path) -> None:
    """The accident that setup.py mends, made by the tools that make it."""
    archive = tmp_path / "archive.zip"
    subprocess.run(["git", "archive", "--format=zip", "-o", archive, "HEAD", "thyme/kernels"], cwd=ROOT, check=True)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    assert (tmp_path / "thyme" / "kernels").read_text() == "../kernels"
    assert not (tmp_path / "thyme" / "kernels").is_symlink()


def lose_link(link: Path, state: str) -> None:
    link.unlink()
    if state == "text":
        link.write_text("../kernels")
    elif state == "link to nowhere":
        link.symlink_to("../nowhere")
    elif state == "copy":
        shutil.copytree(link.parent.parent / "kernels", link)
        (link / "__pycache__").mkdir(exist_ok=True)
        (link / "__pycache__" / "sample.cpython-311.pyc").write_bytes(b"cache")


@pytest.mark.parametrize("state", ["text", "missing", "link to nowhere", "copy"])
def test_a_lost_link_is_made_again(state: str, tmp_path: Path) -> None:
    link = check_out(tmp_path) / "thyme" / "kernels"
    lose_link(link, state)
    done = run_setup(tmp_path)
    assert done.returncode == 0, done.stderr
    assert link.is_symlink() and str(link.readlink()) == "../kernels"
    assert (link / "sample.py").read_text() == (ROOT / "kernels" / "sample.py").read_text()
    said, version = done.stdout.splitlines()
    assert said.startswith("setup.py: thyme/kernels was ") and version.count(".") == 2
    assert not list((tmp_path / "thyme").glob(".kernels*"))


def test_a_link_that_is_there_is_left_alone(tmp_path: Path) -> None:
    link = check_out(tmp_path) / "thyme" / "kernels"
    before = link.lstat().st_ino
    done = run_setup(tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done
    assert link.lstat().st_ino == before


@pytest.mark.parametrize("state", ["text", "missing", "copy"])
def test_where_no_link_can_be_made_it_becomes_a_copy(state: str, tmp_path: Path) -> None:
    link = check_out(tmp_path) / "thyme" / "kernels"
    lose_link(link, state)
    done = run_setup(
        tmp_path, code="import os\ndef symlink(*_, **__): raise PermissionError(1, 'no')\nos.symlink = symlink"
    )
    assert done.returncode == 0, done.stderr
    assert link.is_dir() and not link.is_symlink()
    assert (link / "sample.py").read_bytes() == (ROOT / "kernels" / "sample.py").read_bytes()
    assert "no link can be made here" in done.stdout


def test_what_would_be_lost_is_named_and_kept(tmp_path: Path) -> None:
    checkout = check_out(tmp_path)
    link = checkout / "thyme" / "kernels"

    def refused() -> str:
        done = run_setup(checkout)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done
        return done.stderr

    lose_link(link, "copy")
    (link / "sample.py").write_text("# changed by hand\n")
    (link / "notes.txt").write_text("mine\n")
    said = refused()
    assert "notes.txt, sample.py" in said and "remove thyme/kernels" in said
    assert (link / "sample.py").read_text() == "# changed by hand\n" and (link / "notes.txt").exists()

    shutil.rmtree(link)
    link.write_text("something else\n")
    assert "thyme/kernels is no link" in refused()
    assert link.read_text() == "something else\n"

    shutil.rmtree(checkout / "kernels")
    assert f"{checkout / 'kernels'} is missing" in refused()


# The source distribution.


def test_the_source_distribution_is_whole_and_holds_each_file_once(tmp_path: Path) -> None:
    with tarfile.open(build_sdist(check_out(tmp_path))) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive.getmembers() if "/" in member.name}
    files = {name for name, member in members.items() if member.isfile()}
    wanted = {name for name in tracked() if name.startswith(SOURCES) and name != "thyme/kernels"}
    top = {"CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
    assert wanted | top <= files
    assert not {name for name in files if name.startswith(("thyme/kernels", "tests/", "build/"))}
    assert not {name for name in files if name.endswith((".so", ".pyc"))}
    assert not {name for name, member in members.items() if member.issym() or member.islnk()}


def test_the_version_has_an_entry_in_the_changelog() -> None:
    titles = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == "Unreleased" and thyme.__version__ in titles


# The wheel, in an environment of its own.


class Installed(NamedTuple):
    wheel: Path
    home: Path
    """The environment."""
    work: Path
    """A folder to run in, far from the checkout."""

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment."""
        program, *arguments = command
        return subprocess.run(
            [str(self.home / "bin" / program), *arguments],
            cwd=self.work,
            env={**plain_environment(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=False,
        )

    def python(self, code: str) -> str:
        done = self.run("python", "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Checkout -> source distribution -> wheel -> a fresh environment. Dependencies are those of the running one, by
    path: the .pth files among them, a link to the checkout say, are not read."""
    folder = tmp_path_factory.mktemp("packaging")
    sdist = build_sdist(check_out(folder / "checkout"))
    shutil.rmtree(folder / "checkout" / "csrc")  # the wheel comes from the archive alone
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, sdist]
    done = subprocess.run(build, cwd=folder, env=plain_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    home, work = folder / "environment", folder / "work"
    venv.create(home, with_pip=False, symlinks=True)
    install = [*pip, "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, cwd=folder, env=plain_environment(), check=True)
    own = next((home / "lib").glob("python*")) / "site-packages"
    (own / "dependencies.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    work.mkdir()
    return Installed(wheel, home, work)


@pytest.mark.soak
def test_the_wheel_holds_every_file_of_the_package_as_a_file(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    for name in tracked():
        if name.startswith(("thyme/", "kernels/")) and name != "thyme/kernels":
            inside = f"thyme/{name}" if name.startswith("kernels/") else name
            assert held.get(inside) == (ROOT / name).read_bytes(), f"the wheel lacks {inside}, or has another"
    (info,) = {name.split("/")[0] for name in held if ".dist-info/" in name}
    assert held[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert {name.split("/")[0] for name in held} == {"thyme", info}


@pytest.mark.soak
def test_everything_is_imported_from_the_wheel_and_an_op_runs(installed: Installed) -> None:
    out = installed.python(
        "import json, torch, thyme, thyme._native, thyme.kernels.sample as s\n"
        "from thyme.repetition import RepetitionConfig, RepetitionDetector\n"
        "logits = torch.tensor([[0.0, 3.0, 1.0], [9.0, 0.0, 0.0]])\n"
        "keys = torch.tensor([1, 2])\n"
        "drawn = s.sample(logits, torch.zeros(2), seed=keys, position=keys)\n"
        "RepetitionDetector(RepetitionConfig(), 1).open()\n"
        "files = [m.__file__ for m in (thyme, thyme._native, s)]\n"
        "print(json.dumps([files, drawn.token.tolist(), drawn.logprob_raw.tolist()]))\n"
    )
    files, tokens, logprobs = json.loads(out)
    for path in files:
        assert Path(path).resolve().is_relative_to(installed.home.resolve()), f"{path} is not the wheel's"
    assert tokens == [1, 0]
    # log softmax by hand: 3 - ln(1 + e^3 + e^1), 9 - ln(e^9 + 2)
    assert logprobs == pytest.approx([-0.16984602, -0.00024679], abs=1e-6)


@pytest.mark.soak
def test_every_verb_explains_itself(installed: Installed) -> None:
    verbs = json.loads(
        installed.python("import json; from thyme.verbs.table import VERBS; print(json.dumps(list(VERBS)))")
    )
    shown = installed.run("thyme", "--help")
    assert shown.returncode == 0 and len(verbs) >= 10
    for verb in verbs:
        assert set(verb.split()) <= set(re.findall(r"\w+", shown.stdout)), f"thyme --help does not name {verb}"
        done = installed.run("thyme", *verb.split(), "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: thyme {verb}") and not done.stderr, (verb, done)
    version = installed.run("thyme", "--version")
    assert version.stdout.strip() in installed.wheel.name


@pytest.mark.soak
def test_the_demo_runs_for_one_step_a_stage_and_its_model_is_used(installed: Installed) -> None:
    steps = "--base.steps 1 --base.max-steps 1 --sft.steps 1 --anneal.steps 1 --rl.steps 1"
    sizes = (
        "--base.batch-size 4 --base.gate-captions 40 --sft.batch-size 2 --anneal.batch-size 3 --rl.batch-size 2 "
        "--rollout.group-size 2 --rollout.max-tokens 48 --rollout.max-tokens-per-round 24 --eval.num-questions 6"
    )
    model = "runs/demo/checkpoints/rl"
    Image.new("RGB", (252, 252), "firebrick").save(installed.work / "sign.png")
    for command in (
        ["demo", *steps.split(), *sizes.split()],
        ["eval", "--name", "eval", "--model", model, *sizes.split()[-8:]],
        ["ask", model, "sign.png", "What digit is it?"],
    ):
        done = installed.run("thyme", *command)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (command, done.stdout, done.stderr)
    run = installed.work / "runs" / "demo"
    stages = [json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"base", "sft", "anneal", "rl"} <= set(stages) and stages.count("rl") == 1
    assert json.loads((run / "summary.json").read_text()) and (run / "curve.png").stat().st_size > 0
    assert json.loads((installed.work / "runs" / "eval" / "eval.json").read_text())
    assert (installed.work / model / "model.safetensors").stat().st_size > 1 << 20


@pytest.mark.soak
def test_the_sandbox_runs_from_the_wheel(installed: Installed) -> None:
    (installed.work / "snippet.py").write_text("print(6 * 7)\n")
    done = installed.run("thyme", "sandbox", "run", "snippet.py")
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "42", (done.stdout, done.stderr)
    assert installed.run("thyme", "doctor").returncode == 0
