"""The package's shape: one order of modules, few files that know a library, and an import that does no device work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "grpo_jax"

# The data's way. A module imports only modules that stand before it.
ORDER = (
    "types",
    "config",
    "flags",
    "processes",
    "tasks",
    "gguf_file",
    "prompt",
    "stops",
    "mesh",
    "architecture",
    "attend",
    "blockwise",
    "kernels",
    "rope",
    "layers",
    "attention",
    "experts",
    "model",
    "families",
    "source",
    "tensors",
    "weights",
    "draws",
    "slots",
    "memory",
    "sampler",
    "answers",
    "reward",
    "grpo",
    "packing",
    "score",
    "optimizer",
    "train_step",
    "checkpoint",
    "metrics",
    "context",
    "evaluate",
    "generate",
    "export",
    "train",
    "corpus",
    "pretrain",
    "main",
)


def modules() -> dict[str, ast.Module]:
    """Module name -> its syntax tree, without the package's __init__, which only re-exports."""
    paths = [path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imported(tree: ast.Module) -> set[str]:
    """The dotted names that a module imports anywhere, functions and the __main__ block included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "grpo_jax" + f".{node.module}" * bool(node.module) if node.level else node.module
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def importers(library: str) -> set[str]:
    """The modules that import a library or anything in it."""
    return {
        name
        for name, tree in modules().items()
        if any(f"{found}.".startswith(f"{library}.") for found in imported(tree))
    }


def test_every_module_has_a_place_in_the_order():
    assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_module_imports_only_modules_before_it(module):
    own = {name.split(".")[1] for name in imported(modules()[module]) if name.split(".")[0] == "grpo_jax"}
    assert own <= set(ORDER[: ORDER.index(module)])


def test_only_the_model_imports_flax_linen_and_nothing_imports_nnx():
    assert importers("flax.linen") == {"layers", "attention", "experts", "model"}
    assert importers("flax.nnx") == set()


def test_only_config_and_flags_may_import_ml_collections():
    assert importers("ml_collections") <= {"config", "flags", "main"}


def test_no_module_hides_a_function_of_the_package():
    """`import grpo_jax.load` would replace the attribute `grpo_jax.load`, the function."""
    assert not {"load", "save", "forward", "sample", "advantages", "grpo_loss"} & set(modules())


def test_importing_does_no_device_work():
    """A backend that is started at import takes memory of every GPU and comes too early for jax.distributed."""
    code = "\n".join(f"import grpo_jax.{name}" for name in ORDER)
    code += "\nfrom jax._src import xla_bridge; print(len(xla_bridge._backends))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr
