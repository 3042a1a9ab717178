"""The commands of README and its pages run, and the paths, keys and functions that they name exist."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from grpo_jax.config import check, default
from grpo_jax.config.flags import load_config
from grpo_jax.config.keys import flatten
from grpo_jax.run.metrics import console_line
from grpo_jax.run.train import LOSS_NOTE
from grpo_jax.text.answers import judge

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()
GUIDE = (REPO / "docs" / "changing.md").read_text()
PROBLEMS = (REPO / "docs" / "problems.md").read_text(encoding="utf-8")
HOW_IT_WORKS = (REPO / "docs" / "how-it-works.md").read_text(encoding="utf-8")
TROUBLESHOOTING = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
DEVICES = (REPO / "docs" / "devices.md").read_text(encoding="utf-8")
CHECKPOINTS = (REPO / "docs" / "checkpoints.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README + DEVICES + CHECKPOINTS, flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
PACKAGE = os.environ | {"PYTHONPATH": str(REPO)}
# Flags appended to the commands to shorten them; the commands themselves stay as they are.
SHORT = {
    "grpo_jax.main": [
        "--config.total_steps=1",
        "--config.rollout.prompts=4",
        "--config.rollout.samples=4",
        "--config.eval.questions=8",
    ],
    "grpo_jax.evaluate": ["--config.eval.questions=8"],
    "grpo_jax.generate": [],
    "grpo_jax.export": [],
    "grpo_jax.report": [],
    "grpo_jax.check": [],
}
WITH_CONFIG = "--config=configs/r1zero.py --workdir=runs/r1zero"
# The same for the Python examples.
SHORT_CONFIG = """
from grpo_jax import config
from grpo_jax.config import default
def short_default():
    cfg = default()
    cfg.total_steps, cfg.eval.questions = 1, 1
    cfg.rollout.prompts, cfg.rollout.samples, cfg.rollout.max_tokens = 2, 2, 24
    return cfg
config.default = short_default
"""

# Stands in for what the notebook installs, and shows what it asks pip to do.
NOTEBOOK_STUBS = """
import subprocess, sys
from types import SimpleNamespace
from unittest.mock import MagicMock
import pathlib
def record(command, **options):
    pathlib.Path("pip.txt").write_text(" ".join(command[1:]).replace(command[command.index("-c") + 1], "CONSTRAINTS"))
    pathlib.Path("keep.txt").write_text(pathlib.Path(command[command.index("-c") + 1]).read_text())
    return SimpleNamespace(returncode=0, stderr="")
subprocess.run = record
plots = MagicMock()
plots.subplots.return_value = MagicMock(), (MagicMock(), MagicMock())
sys.modules |= {"matplotlib": plots, "matplotlib.pyplot": plots}
plots.pyplot = plots
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Makes a folder with what the commands use: configs, problems, a reward part, a model folder and a run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(REPO / "configs", folder / "configs")
    shutil.copytree(REPO / "launch", folder / "launch")
    shutil.copytree(REPO / "grpo_jax" / "tiny" / "base", folder / "path/to/a/model/folder")
    lines = [f'{{"question": "What is {i} + 1?", "answer": {i + 1}}}' for i in range(20)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    part = re.search(r"^\+\+\+ b/length.py\n@@.*@@\n((?:\+.*\n)+)", GUIDE, flags=re.M)[1]
    (folder / "length.py").write_text(re.sub(r"^\+", "", part, flags=re.M))
    before = os.getcwd()
    os.chdir(folder)
    try:  # the tests may run in any order
        import_module("grpo_jax.main").main(
            ["--config=configs/r1zero.py", "--workdir=runs/r1zero", *SHORT["grpo_jax.main"]]
        )
    finally:
        os.chdir(before)
    return folder


# `make test-plan` runs the others.
@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith(".venv-plan/")])
def test_readme_command_runs(command, workplace, monkeypatch):
    words = shlex.split(command)
    if words[0] == "make":
        made = subprocess.run([*words, "--dry-run"], cwd=REPO, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    elif "grpo_jax.plan" in words:
        command = [sys.executable, *words[1:], "--program=placement"]  # tests/test_plan.py makes whole plans
        planned = subprocess.run(command, cwd=workplace, env=PACKAGE, capture_output=True, text=True)
        assert planned.returncode == 0 and json.loads(planned.stdout)["name"] == "placement", planned.stderr
    elif words[-1].startswith("--help="):
        assert subprocess.run([sys.executable, *words[1:]], cwd=workplace, capture_output=True).returncode == 0
    elif "--config=configs/dapo.py" in words:  # tests/test_recipe_runs.py runs the recipes
        check(load_config(str(workplace / "configs/dapo.py")))
    elif "-m" in words and words[words.index("-m") + 1] in SHORT:
        name = words[words.index("-m") + 1]
        monkeypatch.chdir(workplace)
        shorter = ["--config.rollout.max_tokens=24"] * any("own.py" in word for word in words)
        import_module(name).main(words[words.index("-m") + 2 :] + SHORT[name] + shorter)
    elif "-m" in words:  # venv, pip, pytest: what `make` runs, with these very arguments
        assert words[words.index("-m") + 1] in ("venv", "pip", "pytest")
        environ = os.environ | {"MAKEFLAGS": ""}  # `make test-newest` changes variables
        make = ["make", "--dry-run", "--always-make", "test"]
        made = subprocess.run(make, cwd=REPO, env=environ, capture_output=True, text=True)
        commands = made.stdout.replace("'", "").replace(" --quiet --disable-pip-version-check", "")
        assert " ".join(words[words.index("-m") + 1 :]) in commands
    else:
        run = subprocess.run(words, cwd=workplace, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("code", "calls"), [(0, 1), (2, 1), (75, 2)])
def test_the_slurm_script_requeues_a_run_that_is_not_finished(tmp_path, code, calls):
    """`srun` and `scontrol` are stubs that write down how they are called."""
    (script,) = re.findall(r"```sh\n(.*?)```", CHECKPOINTS, flags=re.S)
    for name, status in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >> "{tmp_path}/calls"\nexit {status}\n')
        (tmp_path / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    assert subprocess.run(["bash", "-c", script], env=environ).returncode == code
    assert "#SBATCH --requeue --open-mode=append --signal=TERM@300\n" in script
    train = f"srun .venv/bin/python -m grpo_jax.main {WITH_CONFIG}"
    assert (tmp_path / "calls").read_text().splitlines() == [train, "scontrol requeue 7"][:calls]


def notebook_code() -> str:
    """Returns the code of docs/quickstart.ipynb, with a training run of one update."""
    cells = json.loads((REPO / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for key, value in (("total_steps", 1), ("eval.questions", 1)):
        code, count = re.subn(rf"^cfg\.{key} = \d+$", f"cfg.{key} = {value}", code, flags=re.M)
        assert count == 1
    return code


def test_python_examples_and_the_notebook_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 3
    (tmp_path / "pyproject.toml").touch()  # the notebook looks for the repository
    environ = os.environ | {"PYTHONPATH": str(REPO), "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device
    environ |= {"TMPDIR": str(tmp_path)}
    programs = [*blocks, NOTEBOOK_STUBS + notebook_code()]
    code = "\n".join([SHORT_CONFIG, *(f"exec({program!r}, {{}})" for program in programs)])  # each in its own namespace
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for run, parts in (("doubles", {"reward/accuracy", "reward/brevity"}), ("quickstart", {"reward/digits"})):
        rows = [json.loads(line) for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1] and parts <= rows[1].keys()
    assert done.stdout.count("Expected: ") == 2 * 1 and done.stdout.count("advantage ") == 2 * 2  # two groups of two
    # The notebook leaves a preinstalled JAX as it is.
    assert (tmp_path / "pip.txt").read_text() == "-m pip install --quiet -c CONSTRAINTS -e .[plot]"
    kept = dict(line.split("==") for line in (tmp_path / "keep.txt").read_text().splitlines())
    assert {"jax": version("jax"), "jaxlib": version("jaxlib")}.items() <= kept.items()


def test_the_notebook_shows_what_a_run_of_it_printed():
    cells = json.loads((REPO / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"] == [1, 2, 3, 4, 5, 6, 7]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_readme_shows_the_lines_that_a_run_prints():
    assert f"\n{LOSS_NOTE}\n" in README
    metrics = {"reward/mean": 1.04, "reward/accuracy": 0.27, "reward/format": 0.77, "rollout/length_mean": 21.3}
    metrics |= {"policy/kl_ref": 0.0, "rollout/tokens_per_s": 6394, "time/step_s": 2.9, "optim/no_signal": 0.0}
    metrics |= {"rollout/truncated_frac": 0.0, "groups/zero_variance_frac": 0.0}
    assert f"\n{console_line(1, 80, metrics)}\n" in README


def headings(page):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_link_and_every_path_leads_somewhere():
    broken, links = [], 0
    for page in (REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
            target = page.parent / path if path else page
            found = target.exists() and (not anchor or anchor in headings(target.read_text(encoding="utf-8")))
            broken += [] if found else [f"{page.name}: {path}#{anchor}"]
            links += 1
        for path in re.findall(r"`((?:configs|tests|launch|docs|benchmarks)/[\w./-]+)`", text):
            broken += [] if (REPO / path).exists() else [f"{page.name}: {path}"]
    assert links > 50 and broken == []


def test_the_readme_links_every_page():
    pages = {f"docs/{page.name}" for page in (REPO / "docs").glob("*.md")}
    assert pages == set(re.findall(r"^\| \[[\w.-]+\]\((docs/[\w.-]+)\)", README, flags=re.M))


def test_every_key_exists():
    keys = flatten(default().to_dict())
    sections = "|".join(default().to_dict())
    pages = README + HOW_IT_WORKS + DEVICES + CHECKPOINTS + TROUBLESHOOTING
    named = set(re.findall(rf"`((?:{sections})\.[a-z_0-9]+)`", pages))
    named |= set(re.findall(r"--config\.([a-z_.]+[a-z])", pages))
    assert len(named) > 25
    assert sorted(named - set(keys) - {"model.safetensors", "run.lock"}) == []


def test_every_function_in_the_equations_exists():
    named = re.findall(r"\bgrpo\.([a-z_0-9]+)", HOW_IT_WORKS)
    grpo = import_module("grpo_jax.learn.grpo")
    assert len(named) == 3 and all(callable(getattr(grpo, name)) for name in named)


def test_the_command_of_the_page_on_problems_is_one_of_the_readme():
    (command,) = re.findall(r"```bash\n(.*?)\n```", PROBLEMS, flags=re.S)
    assert f".venv/bin/{command}".replace("\\\n", " ") in COMMANDS


def test_every_key_on_the_page_on_problems_exists():
    named = set(re.findall(r"(?:`|--config\.)((?:task|prompt|reward|rollout|eval)\.[a-z_]+)", PROBLEMS))
    assert len(named) > 10
    assert sorted(named - set(flatten(default().to_dict())) - {"reward_model.ground_truth"}) == []


def test_the_answers_on_the_page_on_problems_are_judged_as_it_says():
    table = PROBLEMS[PROBLEMS.index("| expected | equal | not equal |") :].split("\n\n")[0]
    rows = [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:4]] for line in table.splitlines()[2:]]
    cases = [(want, text, i == 0) for wants, *cells in rows for want in wants for i in (0, 1) for text in cells[i]]
    assert len(cases) > 40
    assert [case for case in cases if judge(f"<answer>{case[1]}</answer>", case[0]).correct != case[2]] == []


def source_texts():
    """Returns the string literals of the package, with a NUL for each replaced field, and the lines of the Makefile."""
    texts = re.sub(r"\$\(\w+\)", "\0", (REPO / "Makefile").read_text(encoding="utf-8")).splitlines()
    for path in (REPO / "grpo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_the_messages_on_the_page_on_troubleshooting_are_those_of_the_code():
    messages = re.findall(r"^\*\*`(.*)`\*\*$", TROUBLESHOOTING, flags=re.M)
    assert len(messages) > 25
    texts = source_texts()
    for message in messages:
        fixed = [part.strip() for part in message.removeprefix("error: ").split("...") if part.strip(" .")]
        pattern = re.compile(r".*\0?.*".join(map(re.escape, fixed)), flags=re.S)
        assert any(map(pattern.search, texts)), f"nothing in the package prints {message!r}"
