"""Tests the recipes in configs/ against published values, and docs/algorithms.md against the recipes."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.config import check, default
from grpo_jax.config.flags import load_config
from grpo_jax.config.keys import flatten
from grpo_jax.errors import UserError

REPO = Path(__file__).parent.parent
PAGE = (REPO / "docs" / "algorithms.md").read_text()

# Values published in the papers and the authors' scripts, by preset. They were taken from there, not from the configs.
PUBLISHED = {
    "r1zero:deepseek-v3": {  # arXiv 2501.12948v2, 2.1; the clip of 10 is R1's first stage
        "optim.lr": 3e-6,
        "loss.kl_coef": 0.001,
        "loss.kl": "k3",
        "loss.clip_low": 10.0,
        "loss.clip_high": 10.0,
        "loss.ratio": "token",
        "loss.aggregate": "sequence",
        "advantage.mean": "group",
        "advantage.std": "group",
        "rollout.samples": 16,
        "rollout.prompts": 8192 // 16,
        "train.minibatches": 16,
        "train.epochs": 1,
        "rollout.max_tokens": 32768,
        "rollout.temperature": 1.0,
        "reference.every_updates": 400,
        "total_steps": 10400,
    },
    "deepseekmath:deepseek-math-7b": {  # arXiv 2402.03300, 4.2
        "loss.kl_coef": 0.04,
        "loss.kl": "k3",
        "loss.kl_in": "loss",
        "loss.ratio": "token",
        "loss.aggregate": "sequence",
        "advantage.mean": "group",
        "advantage.std": "group",
        "rollout.samples": 64,
        "rollout.max_tokens": 1024,
        "train.minibatches": 1,
        "train.epochs": 1,
        "optim.lr": 1e-6,
    },
    "dr_grpo:qwen2.5-math-7b": {  # arXiv 2503.20783; examples/qwen2.5-math-7b.sh
        "advantage.mean": "group",
        "advantage.std": "none",
        "loss.ratio": "token",
        "loss.clip_low": 0.2,
        "loss.clip_high": 0.2,
        "loss.aggregate": "constant",
        "loss.constant_length": 3000,
        "loss.kl_coef": 0.0,
        "rollout.prompts": 128,
        "rollout.samples": 8,
        "rollout.max_prompt_tokens": 1024,
        "rollout.max_tokens": 3000,
        "rollout.overlong": "zero",
        "train.minibatches": 128 * 8 // 128,
        "optim.lr": 1e-6,
        "optim.schedule": "constant",
        "eval.temperature": 0.0,
    },
    "dapo:qwen2.5-32b": {  # arXiv 2503.14476, 4.1; run_dapo_qwen2.5_32b.sh
        "advantage.mean": "group",
        "advantage.std": "group",
        "loss.ratio": "token",
        "loss.clip_low": 0.2,
        "loss.clip_high": 0.28,
        "loss.clip_dual": 10.0,
        "loss.aggregate": "token",
        "loss.kl_coef": 0.0,
        "groups.equal": "drop",
        "rollout.prompts": 512,
        "rollout.samples": 16,
        "rollout.max_prompt_tokens": 2048,
        "rollout.max_tokens": 16384 + 4096,
        "rollout.overlong": "soft",
        "rollout.overlong_cache": 4096,
        "train.minibatches": 16,
        "optim.lr": 1e-6,
        "optim.schedule": "constant",
        "optim.warmup_steps": 20 * 16,
        "optim.weight_decay": 0.1,
        "optim.grad_clip": 1.0,
        "eval.temperature": 1.0,
        "eval.top_p": 0.7,
    },
    "gspo:qwen3-30b-a3b": {  # arXiv 2507.18071, 5.1
        "advantage.mean": "group",
        "advantage.std": "group",
        "loss.ratio": "sequence",
        "loss.clip_low": 3e-4,
        "loss.clip_high": 4e-4,
        "loss.aggregate": "sequence",
        "loss.kl_coef": 0.0,
        "train.minibatches": 4,
    },
    "cispo:qwen2.5-32b": {  # arXiv 2506.13585, 3
        "advantage.mean": "group",
        "advantage.std": "group",
        "loss.ratio": "detached",
        "loss.aggregate": "prompt",
        "loss.kl_coef": 0.0,
        "groups.equal": "drop",
        "rollout.overlong": "soft",
        "train.minibatches": 16,
        "optim.b1": 0.9,
        "optim.b2": 0.95,
        "optim.eps": 1e-15,
        "model.logit_dtype": "float32",
    },
    "dppo:qwen3-30b-a3b": {  # arXiv 2602.04879; verl, run_qwen30b_dppo.sh
        "advantage.mean": "group",
        "advantage.std": "none",
        "loss.ratio": "difference",
        "loss.clip_difference": 0.15,
        "loss.aggregate": "constant",
        "loss.constant_length": 8192,
        "loss.kl_coef": 0.0,
        "rollout.prompts": 256,
        "rollout.samples": 16,
        "rollout.max_prompt_tokens": 2048,
        "rollout.max_tokens": 8192,
        "train.minibatches": 256 // 32,
        "optim.lr": 1e-6,
        "total_steps": 500 * 256 // 32,
    },
    "scalerl:llama3.1-8b": {  # arXiv 2510.13786, A.3
        "advantage.mean": "group",
        "advantage.std": "batch",
        "loss.ratio": "detached",
        "loss.clip_high": 5.0 - 1.0,
        "loss.aggregate": "prompt",
        "loss.kl_coef": 0.0,
        "groups.equal": "drop",
        "rollout.prompts": 48,
        "rollout.samples": 16,
        "rollout.max_prompt_tokens": 2048,
        "rollout.max_tokens": 12288 + 2048,
        "optim.lr": 5e-7,
        "optim.warmup_steps": 100,
        "optim.weight_decay": 0.01,
        "optim.eps": 1e-15,
        "model.logit_dtype": "float32",
    },
    "magistral:mistral-small-24b": {  # arXiv 2506.10910, 2
        "advantage.mean": "group",
        "advantage.std": "batch",
        "loss.ratio": "token",
        "loss.clip_high": 0.3,
        "loss.aggregate": "prompt",
        "loss.kl_coef": 0.0,
        "groups.equal": "drop",
        "reward.parts": ("format", "accuracy", "length", "language"),
        "reward.weights": (0.1, 0.9, 0.1, 0.1),
    },
    "justrl:deepseek-r1-distill-qwen-1.5b": {  # arXiv 2512.16649; run_scaling_ssh_distill.sh
        "advantage.mean": "group",
        "advantage.std": "group",
        "loss.ratio": "token",
        "loss.clip_low": 0.2,
        "loss.clip_high": 0.28,
        "loss.clip_dual": 10.0,
        "loss.aggregate": "token",
        "loss.kl_coef": 0.0,
        "loss.entropy_coef": 0.0,
        "rollout.prompts": 256,
        "rollout.samples": 8,
        "rollout.max_prompt_tokens": 1024,
        "rollout.max_tokens": 15360,
        "rollout.overlong": "keep",
        "groups.equal": "keep",
        "train.minibatches": 256 // 64,
        "optim.lr": 1e-6,
        "optim.warmup_steps": 10 * 4,
        "optim.weight_decay": 0.1,
        "optim.grad_clip": 1.0,
        "eval.temperature": 0.7,
        "eval.top_p": 0.9,
    },
    "rloo:llama-7b": {  # arXiv 2402.14740, C
        "advantage.mean": "leave_one_out",
        "advantage.std": "none",
        "loss.kl_coef": 0.03,
        "loss.kl": "k1",
        "loss.kl_in": "reward",
        "rollout.samples": 2,
        "train.minibatches": 2,
        "optim.lr": 1e-6,
    },
}
ARXIV = {
    "r1zero": "2501.12948",
    "deepseekmath": "2402.03300",
    "dr_grpo": "2503.20783",
    "dapo": "2503.14476",
    "gspo": "2507.18071",
    "cispo": "2506.13585",
    "dppo": "2602.04879",
    "scalerl": "2510.13786",
    "magistral": "2506.10910",
    "justrl": "2512.16649",
    "rloo": "2402.14740",
}
# Our values for settings that a paper does not publish.
UNPUBLISHED = {
    "deepseekmath": {"loss.clip_low": 0.2, "loss.clip_high": 0.2},
    "cispo": {"loss.clip_high": 0.28, "rollout.overlong_cache": 4096},
    "magistral": {"loss.clip_low": 0.2, "rollout.overlong_cache": 4096},
    "rloo": {"loss.clip_high": 0.2},
}


def load(recipe: str, preset: str = "tiny") -> dict:
    """Returns the checked values of a preset by dotted name."""
    raw = load_config(f"{REPO}/configs/{recipe}.py:{preset}")
    check(raw)
    return flatten(raw.to_dict())


def docstring(recipe: str) -> str:
    return ast.get_docstring(ast.parse((REPO / "configs" / f"{recipe}.py").read_text()))


def test_every_config_file_is_a_recipe_with_published_values():
    files = {path.stem for path in (REPO / "configs").glob("*.py")} - {"own", "pretrain_tiny"}
    assert files == set(ARXIV) == {name.split(":")[0] for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_preset_has_the_published_values(name):
    values = load(*name.split(":"))
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("recipe", ARXIV)
def test_the_tiny_preset_has_the_settings_of_the_recipe(recipe):
    """The keys that define the recipe agree with the full preset, except for those that depend on the model's size."""
    tiny, full = load(recipe), load(*next(name for name in PUBLISHED if name.startswith(f"{recipe}:")).split(":"))
    scaled = {"loss.constant_length", "rollout.overlong_cache"}
    scaled |= {
        "r1zero": {"loss.clip_low", "loss.clip_high", "reference.every_updates"},
        "dppo": {"loss.clip_difference"},
        "magistral": {"loss.clip_high"},
    }.get(recipe, set())
    sections = ("advantage", "groups", "loss", "reference", "reward")
    keys = [key for key in tiny if key.split(".")[0] in sections or key == "rollout.overlong"]
    assert {key for key in keys if tiny[key] != full[key]} <= scaled
    assert tiny["model.path"] == "tiny"


@pytest.mark.parametrize("recipe", ARXIV)
def test_a_tiny_preset_makes_four_updates_of_each_rollout(recipe):
    """With one update, the ratio is 1 and most recipes are the same. DeepSeekMath and the default run make only one."""
    values = load(recipe)
    updates = values["train.minibatches"] * values["train.epochs"]
    assert updates == 1 if recipe in ("r1zero", "deepseekmath") else updates >= 4


@pytest.mark.parametrize("recipe", ARXIV)
def test_a_config_names_its_paper_and_what_is_not_published(recipe):
    text = docstring(recipe)
    assert f"arXiv {ARXIV[recipe]}" in " ".join(text.split())
    assert "Not published: ours are" in " ".join(text.split())


@pytest.mark.parametrize("recipe", UNPUBLISHED)
def test_docstrings_state_the_values_that_are_ours(recipe):
    """The paragraph with "ours" states the value of each setting that the paper does not publish."""
    full = next(name for name in PUBLISHED if name.startswith(f"{recipe}:"))
    values, text = load(*full.split(":")), docstring(recipe)
    assert {key: values[key] for key in UNPUBLISHED[recipe]} == UNPUBLISHED[recipe]
    ours = " ".join(paragraph for paragraph in text.split("\n\n") if "ours" in paragraph)
    assert [key for key, value in UNPUBLISHED[recipe].items() if f"{value:,}" not in ours] == []


@pytest.mark.parametrize("recipe", ARXIV)
def test_every_key_in_a_docstring_exists(recipe):
    sections = "|".join(default().to_dict())
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_0-9]+)\b", docstring(recipe)))
    assert sorted(named - flatten(default().to_dict()).keys()) == []


@pytest.mark.parametrize("recipe", ARXIV)
def test_an_unknown_preset_is_refused_with_the_list(recipe):
    with pytest.raises(
        UserError, match=rf"preset of configs/{recipe}.py must be one of tiny, .*found 'tinny'.*Did you mean tiny"
    ):
        load_config(f"{REPO}/configs/{recipe}.py:tinny")


def tables() -> list[list[list[str]]]:
    """Returns the tables of recipes in docs/algorithms.md: rows of cells, the header first, without the ruler.

    The last one has the results of the tiny presets.
    """
    blocks = re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.M)
    rows = [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()] for block in blocks
    ]
    return [[table[0], *table[2:]] for table in rows if table[0][0] == "recipe"]


def parse_cell(cell: str, default_value):
    """Returns a cell as a value of the type of the key's default."""
    if isinstance(default_value, tuple):
        return tuple(type(default_value[0])(part) for part in cell.split(", "))
    return type(default_value)(cell)


# Keys that depend on the size of the model or the length of its prompts.
OF_THE_MODEL = {"rollout.max_prompt_tokens", "train.micro_tokens", "train.chunk_tokens", "optim.b2"}


def test_the_tables_of_the_page_show_the_full_presets():
    """Each key that a recipe sets has a column, and a cell is empty exactly where a recipe has the default."""
    defaults, shown = flatten(default().to_dict()), set()
    recipes = {name.split(":")[0]: load(*name.split(":")) for name in PUBLISHED}
    for header, first, *rows in tables()[:-1]:
        keys = [cell.strip("`") for cell in header[1:]]
        shown |= set(keys)
        assert first == ["default", *first[1:]]
        assert [parse_cell(cell, defaults[key]) for key, cell in zip(keys, first[1:], strict=True)] == [
            defaults[key] for key in keys
        ]
        links = [re.fullmatch(r"\[(\w+)\]\(\.\./configs/(\w+)\.py\)", row[0]).groups() for row in rows]
        assert links == [(recipe, recipe) for recipe in recipes]
        for (recipe, _), row in zip(links, rows, strict=True):
            found = {key: parse_cell(cell, defaults[key]) for key, cell in zip(keys, row[1:], strict=True) if cell}
            expected = {key: recipes[recipe][key] for key in keys if recipes[recipe][key] != defaults[key]}
            assert (recipe, found) == (recipe, expected)
    sections = ("advantage", "groups", "loss", "reference", "reward", "rollout", "train", "optim")
    changed = {key for values in recipes.values() for key in values if values[key] != defaults[key]}
    assert {key for key in changed if key.split(".")[0] in sections} - OF_THE_MODEL == shown


def test_the_table_of_results_describes_the_tiny_presets():
    header, *rows = tables()[-1]
    assert header[1:3] == ["updates per rollout", "updates"] and [row[0] for row in rows] == list(ARXIV)
    for recipe, updates_per_rollout, updates, *_ in rows:
        values = load(recipe)
        assert values["train.minibatches"] * values["train.epochs"] == int(updates_per_rollout)
        assert values["total_steps"] == int(updates)


def test_keys_and_links_of_the_page_exist():
    keys = flatten(default().to_dict())
    named = set(re.findall(rf"`((?:{'|'.join(default().to_dict())})\.[a-z_0-9]+)(?:=\w+)?`", PAGE))
    assert len(named) > 25 and named <= keys.keys()
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in PAGE.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings
    assert [path for path in re.findall(r"\]\(([\w./]+)\)", PAGE) if not (REPO / "docs" / path).exists()] == []
    read = {"loss", "advantage", "groups", "reference"}
    assert {key for key in keys if key.split(".")[0] in read} <= named


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ARXIV)
def test_a_tiny_preset_learns(recipe, tmp_path):
    """The first 36 updates teach the task, and clip tokens if there are several for each rollout."""
    flags = [f"--workdir={tmp_path / 'run'}", "--config.total_steps=36", "--config.eval.questions=256"]
    command = [sys.executable, "-m", "grpo_jax.main", f"--config=configs/{recipe}.py", *flags]
    environ = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}  # one device, optimized
    subprocess.run(command, check=True, cwd=REPO, env=environ, timeout=900, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rows[0]["eval/accuracy"] < 0.3 and rows[-1]["eval/accuracy"] > 0.85
    assert (max(row["policy/clip_frac"] for row in rows[1:]) > 0) == (load(recipe)["train.minibatches"] > 1)
