"""The package runs where optional packages are missing: each program below starts in a process without some of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
# Packages that a machine with a GPU need not have, and those that `make wheels` downloads for it.
OPTIONAL = [
    "array_record",
    "beartype",
    "datasets",
    "gguf",
    "grain",
    "matplotlib",
    "pyarrow",
    "pytest",
    "torch",
]
BROUGHT = ["ml_collections", "mpmath", "tensorboardX"]

PUBLIC_FUNCTIONS = """
from grpo_jax import advantages, forward, grpo_loss, load, sample, save

model_cfg, params = load("tiny")
save(sys.argv[1], model_cfg, params)
"""

SAMPLING = """
import jax

rollout = sample(model_cfg, params, [[5, 6], [7]], jax.random.key(0), samples=2, max_tokens=3)
assert rollout.tokens.shape == (2, 2, 3)
assert forward(model_cfg, params, rollout.tokens[0]).shape == (2, 3, model_cfg.vocab_size)
"""

ON_DEVICE = """
import importlib, pkgutil
sys.path.insert(0, "benchmarks")
import grpo_jax, on_device, parts, worker

for module in pkgutil.iter_modules(parts.__path__, "parts."):
    importlib.import_module(module.name)
grpo_jax.train
"""

MISTAKES = """
import importlib
from grpo_jax.errors import UserError

config = "--config=configs/r1zero.py"
for name, *argv in (
    ("main", config, "--config.rollout.samples=0"),
    ("evaluate", config, "--config.eval.questions=0"),
    ("generate", config, "--prompt=x", "--temperature=-1"),
    ("export", "--workdir=/nowhere", "--out=/nowhere/out"),
    ("check", "--workdir=/nowhere"),
    ("report", "--workdir=/nowhere"),
    ("plan", config),
):
    try:
        importlib.import_module(f"grpo_jax.{name}").main(argv)
    except UserError:
        continue
    sys.exit(f"{name} found no mistake")
"""


def run_without(packages: list[str], program: str, *argv: str) -> None:
    """Runs a program in a process in which importing any of `packages` fails."""
    prelude = f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
    environ = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device
    done = subprocess.run(
        [sys.executable, "-c", prelude + program, *argv], cwd=REPO, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Packages that only training, configs and GGUF files need.
UNUSED = ["optax", "orbax", *OPTIONAL, *BROUGHT]


@pytest.mark.slow
def test_a_model_can_be_loaded_and_saved_without_packages_that_only_training_needs(tmp_path):
    run_without(UNUSED, PUBLIC_FUNCTIONS, str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists()


@pytest.mark.slow
def test_sampling_runs_without_packages_that_only_training_needs(tmp_path):
    run_without(UNUSED, PUBLIC_FUNCTIONS + SAMPLING, str(tmp_path / "saved"))


def test_a_mistake_in_the_flags_is_found_before_jax_is_imported():
    run_without(["jax"], MISTAKES)


def test_training_and_the_on_device_parts_import_without_optional_packages():
    run_without(OPTIONAL, ON_DEVICE)
