"""The layout of the package: one order of imports, unique names, libraries confined to one package, small files."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PACKAGE = REPO / "grpo_jax"
ENTRY_POINTS = {"main", "evaluate", "generate", "export", "check", "plan", "report", "cli"}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 80


def readme_order() -> list[str]:
    """Returns the packages and top-level modules in the order of README's table, such as `errors` and `config`."""
    section = (REPO / "README.md").read_text(encoding="utf-8").split("## Where things are")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name.removesuffix(".py").rstrip("/") for cell in cells for name in re.findall(r"`([\w./]+)`", cell)]


def documented_modules(package: str) -> list[str]:
    """Returns the modules that a package's docstring lists, in its order."""
    docstring = ast.get_docstring(
        ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8")), clean=False
    )
    return re.findall(r"^    (\w+)  +\S", docstring, flags=re.M)


def reading_order() -> list[str]:
    """Returns all modules in the order of imports that README and the packages' docstrings state."""
    order = []
    for name in readme_order():
        if (PACKAGE / name).is_dir():
            order += [*(f"{name}.{module}" for module in documented_modules(name)), name]
        else:
            order.append(name)
    return order


def syntax_trees() -> dict[str, ast.Module]:
    """Maps each module, such as `learn.grpo` (and `learn` for its `__init__`), to its syntax tree."""
    trees = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


TREES = syntax_trees()
ORDER = reading_order()


def imported_names(tree: ast.Module) -> set[str]:
    """Returns every dotted name that a module imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide what is imported"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(name: str) -> set[str]:
    """Returns the modules of the package that a module imports."""
    found = set()
    for dotted in imported_names(TREES[name]):
        parts = dotted.split(".")
        if parts[0] != "grpo_jax":
            continue
        candidates = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
        found |= {next(candidate for candidate in candidates if candidate in TREES)}
    return found


def importers(library: str) -> set[str]:
    """Returns the modules that import a library or anything in it."""
    return {
        name
        for name, tree in TREES.items()
        if any(f"{dotted}.".startswith(f"{library}.") for dotted in imported_names(tree))
    }


def definitions(tree: ast.Module) -> set[str]:
    """Returns the functions and classes that a module defines at its top level."""
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_readme_and_docstrings_list_every_module_once():
    assert sorted(ORDER) == sorted(TREES)


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_module_imports_only_what_stands_before_it(name):
    assert own_imports(name) <= set(ORDER[: ORDER.index(name)])


def test_entry_points_are_imported_by_no_module():
    imported = set().union(*(own_imports(name) for name in TREES))
    assert ENTRY_POINTS <= set(TREES) and not ENTRY_POINTS & imported


def test_flax_linen_is_used_in_the_model_package_only():
    assert {name.split(".")[0] for name in importers("flax.linen")} == {"model"}
    assert importers("flax.nnx") == set()


def test_ml_collections_is_used_in_the_config_package_only():
    assert {name.split(".")[0] for name in importers("ml_collections")} == {"config"}


def test_no_function_or_class_name_is_defined_in_two_modules():
    homes = defaultdict(set)
    for name, tree in TREES.items():
        for definition in definitions(tree) - {"main", "__getattr__", "__dir__"}:
            homes[definition].add(name)
    assert {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1} == {}


def test_no_module_has_the_name_of_a_public_function():
    """`import grpo_jax.load` would rebind the attribute `grpo_jax.load`, the function."""
    top_level = {name.split(".")[0] for name in TREES}
    assert not {"load", "save", "forward", "sample", "advantages", "grpo_loss", "train"} & top_level
    assert not {"rewards.accuracy", "rewards.format", "rewards.language"} & set(TREES)


def test_modules_and_functions_stay_small():
    long = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_MODULE_LINES:
            long.append(f"{path.relative_to(REPO)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
                long.append(f"{path.relative_to(REPO)}: {node.name}, {node.end_lineno - node.lineno + 1} lines")
    assert long == []


def test_importing_the_package_starts_no_backend():
    """A backend started at import takes the memory of every GPU and is too early for jax.distributed."""
    code = "\n".join(f"import grpo_jax.{name}" for name in ORDER)
    code += "\nfrom jax._src import xla_bridge; print(len(xla_bridge._backends))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


def test_importing_grpo_jax_does_not_import_jax():
    code = "import sys, grpo_jax; from grpo_jax import config; config.default(); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_public_names_resolve():
    import grpo_jax

    assert all(callable(getattr(grpo_jax, name)) for name in grpo_jax.__all__)
    assert set(grpo_jax.__all__) <= set(dir(grpo_jax))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        grpo_jax.nothing  # noqa: B018 (the access itself is tested)
