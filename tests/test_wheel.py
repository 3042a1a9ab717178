"""The wheel carries everything that a run needs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

REPO = Path(__file__).parent.parent


def test_an_installed_wheel_trains(tmp_path):
    """The wheel is unpacked into an empty environment, which finds its dependencies but not this checkout.

    The folder of the run is empty too, so the config is the one that comes with the wheel.
    """
    source = tmp_path / "source"
    shutil.copytree(REPO / "grpo_jax", source / "grpo_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "configs", source / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "setup.py"):
        shutil.copyfile(REPO / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(build, check=True)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    (wheel,) = tmp_path.glob("grpo_jax-*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run = [
        environment / "bin" / "python",
        "-c",
        "from importlib.metadata import entry_points; entry_points(group='console_scripts')['grpo-jax'].load()()",
        "train",
        "--config=r1zero:tiny",
        f"--workdir={tmp_path}/run",
        "--config.total_steps=2",
        "--config.rollout.prompts=4",
        "--config.rollout.samples=4",
        "--config.eval.questions=8",
    ]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(run, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
