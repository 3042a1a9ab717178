"""Every command of the README runs, and every file it names is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
# What makes the long commands short; the commands themselves stay as they are.
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
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands name: the configs, a file of questions, a model folder, a run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(REPO / "configs", folder / "configs")
    shutil.copytree(REPO / "launch", folder / "launch")
    shutil.copytree(REPO / "grpo_jax" / "tiny" / "base", folder / "path/to/a/model/folder")
    lines = [f'{{"question": "What is {i} + 1?", "answer": {i + 1}}}' for i in range(20)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    before = os.getcwd()
    os.chdir(folder)
    try:  # tests come in any order
        import_module("grpo_jax.main").main(
            ["--config=configs/r1zero.py", "--workdir=runs/r1zero", *SHORT["grpo_jax.main"]]
        )
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, workplace, monkeypatch):
    words = shlex.split(command)
    if words[0] == "make":
        made = subprocess.run([*words, "--dry-run"], cwd=REPO, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    elif "-m" in words and words[words.index("-m") + 1] in SHORT:
        name = words[words.index("-m") + 1]
        monkeypatch.chdir(workplace)
        import_module(name).main(words[words.index("-m") + 2 :] + SHORT[name])
    elif "-m" in words:  # venv, pip, pytest: what `make` runs, with these very arguments
        assert words[words.index("-m") + 1] in ("venv", "pip", "pytest")
        assert " ".join(words[words.index("-m") + 1 :]).replace("'", "") in (
            (REPO / "Makefile").read_text().replace("'", "").replace(" --quiet --disable-pip-version-check", "")
        )
    else:
        run = subprocess.run(words, cwd=workplace, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True, cwd=REPO, timeout=120)


def test_files_named_are_there():
    names = set(re.findall(r"`(\w+\.py)`", README))
    missing = [name for name in names if not (REPO / "grpo_jax" / name).exists()]
    assert len(names) > 15 and not missing
    listed = {path.name for path in (REPO / "grpo_jax").glob("*.py")} - {"__init__.py"}
    assert listed <= names, listed - names
    for path in re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(
        r"`((?:configs|tests|launch|docs)/[\w./]+)`", README
    ):
        assert (REPO / path).exists(), path


def test_keys_and_functions_named_exist():
    """`section.key` is a key of the config, or `module.function` is one of the package."""
    from grpo_jax.config import default
    from grpo_jax.config.keys import flatten

    named = set(re.findall(r"`([a-z_]+\.[a-z_0-9]+)`", README)) | set(re.findall(r"--config\.([a-z_.]+[a-z])", README))
    missing = []
    for name in {name for name in named if not name.endswith((".py", ".json", ".jsonl"))}:
        module, _, attribute = name.rpartition(".")
        if name not in flatten(default().to_dict()) and not hasattr(import_module(f"grpo_jax.{module}"), attribute):
            missing.append(name)
    assert len(named) > 10 and not missing
