"""The diffs of docs/changing.md apply to the package, are short, and have the effects that the guide describes."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import grpo_jax.learn.grpo
from grpo_jax.types import PackedBatch
from tests.tiny import experience, packed

REPO = Path(__file__).parent.parent
GUIDE = (REPO / "docs" / "changing.md").read_text(encoding="utf-8")
NAMES = ["dr_grpo", "gspo", "entropy_bonus", "kl_in_reward", "brevity", "multiplication", "capitals", "gemma", "nadam"]
DIFFS = re.findall(r"```diff\n(.*?)```", GUIDE, flags=re.S)
COMMANDS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.S)]
MAX_DIFF_LINES = 30
# All runs have these shapes, with which the tiny base model's completions differ in length and reward.
SMALL = """rollout.prompts=2 rollout.samples=2 rollout.max_tokens=24 eval.questions=1 total_steps=1 log.every_steps=1
log.samples=-1""".split()


def changed_lines(diff: str, sign: str) -> int:
    return len([line for line in diff.splitlines() if line.startswith(sign) and not line.startswith(sign * 3)])


def copy_with(folder: Path, *names: str) -> Path:
    """Copies the files that diffs may change to a new folder, and applies the named diffs there."""
    for source in ("grpo_jax", "configs"):
        shutil.copytree(REPO / source, folder / source)
    for name in names:
        # Without this, git would apply the diff in a repository that contains the folder.
        environ = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        diff = DIFFS[NAMES.index(name)]
        done = subprocess.run(["git", "apply"], input=diff, cwd=folder, env=environ, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    return folder


def run_copy(folder: Path, *arguments: str) -> None:
    """Runs Python with the package of a folder, on one device."""
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": ""}  # -c and -m find the package here
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | flags, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def train_copy(folder: Path, *settings: str) -> list[dict]:
    """Trains with the package of a folder and returns the lines of metrics.jsonl."""
    flags = [f"--config.{setting}" for setting in (*SMALL, *settings)]
    run_copy(folder, "-m", "grpo_jax.main", "--config=configs/r1zero.py", "--workdir=run", *flags)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def read_records(folder: Path, name: str) -> list[dict]:
    lines = (folder / "run" / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def changed_grpo_module(folder: Path, name: str):
    """Imports `grpo_jax.learn.grpo` with a diff applied, under a name of its own."""
    path = copy_with(folder, name) / "grpo_jax" / "learn" / "grpo.py"
    spec = importlib.util.spec_from_file_location(f"grpo_with_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_function(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def test_every_diff_is_short_and_has_a_name():
    assert len(DIFFS) == len(NAMES)
    assert [name for name, diff in zip(NAMES, DIFFS, strict=True) if len(diff.splitlines()) >= MAX_DIFF_LINES] == []


def test_the_table_counts_the_files_and_lines_of_every_diff():
    rows = [line.strip("| ").split(" | ") for line in GUIDE.splitlines() if line.startswith("| [")]
    assert len(rows) == len(DIFFS)
    for (_, files, lines, inside), diff in zip(rows, DIFFS, strict=True):
        changed = re.findall(r"^\+\+\+ b/(.*)$", diff, flags=re.M)
        assert (files, lines) == (str(len(changed)), f"+{changed_lines(diff, '+')} -{changed_lines(diff, '-')}")
        package_files = [path.removeprefix("grpo_jax/") for path in changed if path.startswith("grpo_jax/")]
        assert inside == (", ".join(f"`{path}`" for path in package_files) or "none")


@pytest.mark.parametrize("name", NAMES)
def test_a_diff_applies_to_the_repository(tmp_path, name):
    """Each diff is applied by itself: `git apply` refuses a diff whose context is missing."""
    copy_with(tmp_path / "copy", name)


def test_links_and_keys_of_the_guide_exist():
    headings = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in GUIDE.splitlines()}
    assert set(re.findall(r"\]\(#([\w-]+)\)", GUIDE)) <= headings
    assert [path for path in re.findall(r"\]\(([\w./]+)[#)]", GUIDE) if not (REPO / "docs" / path).exists()] == []
    assert [path for path in re.findall(r"`((?:grpo_jax|tests)/[\w./]+)`", GUIDE) if not (REPO / path).exists()] == []


class OffPolicyRows:
    """A minibatch whose policy and old policy differ, as arrays [N, S] and in packed rows with NaN in between."""

    def __init__(self):
        self.batch = experience(rows=8, sampled=9)
        rows = packed(self.batch, micro_tokens=40)
        assert len(rows.tokens) > 2  # several micro-batches
        self.index = np.asarray(rows.flat_index)
        # `ref_logps` of the random experience are off-policy log-probs; here they play the policy.
        self.logps = jnp.where(rows.flat_index >= 0, rows.ref_logps, jnp.nan)
        self.entropies = jnp.where(rows.flat_index >= 0, jnp.exp(rows.ref_logps), jnp.nan)
        self.rows = rows

    def gradients(self, grpo, argument: int):
        """Returns the loss and its gradient [N, S], added up over rows as over micro-batches."""

        def loss(logps, entropies, row: PackedBatch):
            tokens = grpo.SampledTokens(
                row.sampler_logps, None, row.advantages, row.weights, row.sequence, row.group, self.rows.num_sequences
            )
            return grpo.weighted_loss(logps, entropies, tokens, clip_low=0.05, clip_high=0.1, kl_coef=0.0)[0]

        total, gradient = 0.0, np.zeros(self.batch.mask.size)
        for n in range(len(self.index)):
            row = jax.tree.map(lambda x, n=n: x[n : n + 1], self.rows.replace(num_micro_batches=jnp.zeros(1)))
            at_row = self.logps[n : n + 1], self.entropies[n : n + 1]
            value, d_row = jax.value_and_grad(loss, argument)(*at_row, row)
            total += value
            assert (np.asarray(d_row)[0, self.index[n] < 0] == 0).all()
            gradient[self.index[n][self.index[n] >= 0]] = np.asarray(d_row)[0, self.index[n] >= 0]
        return total, gradient.reshape(self.batch.mask.shape)


def test_gspo_clips_one_ratio_for_each_completion(tmp_path):
    """Packed rows, each shared by several completions, agree with the paper's formula for one completion at a time."""
    rows = OffPolicyRows()
    total, gradient = rows.gradients(changed_grpo_module(tmp_path / "copy", "gspo"), argument=0)
    expected, expected_gradient, clipped = 0.0, np.zeros_like(gradient), 0
    for n, mask in enumerate(rows.batch.mask):
        length, A = mask.sum(), float(rows.batch.advantages[n])
        ratio = np.exp(np.mean((rows.batch.ref_logps[n] - rows.batch.sampler_logps[n])[mask]))
        clipped_ratio = np.clip(ratio, 0.95, 1.1)
        expected -= min(ratio * A, clipped_ratio * A) / len(gradient)
        if ratio * A <= clipped_ratio * A:
            expected_gradient[n, mask] = -ratio * A / length / len(gradient)
        else:
            clipped += 1
    assert 0 < clipped < len(gradient)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-8)


def test_the_entropy_bonus_raises_the_entropy_of_every_token(tmp_path):
    rows = OffPolicyRows()
    total, gradient = rows.gradients(changed_grpo_module(tmp_path / "copy", "entropy_bonus"), argument=1)
    weights = rows.batch.mask / rows.batch.mask.sum(axis=1, keepdims=True) / len(gradient)
    bonus = 0.01 * np.sum(weights * np.exp(rows.batch.ref_logps))
    np.testing.assert_allclose(total, rows.gradients(grpo_jax.learn.grpo, argument=1)[0] - bonus, rtol=1e-5)
    np.testing.assert_allclose(gradient, -0.01 * weights, rtol=1e-5)


def test_dr_grpo_trains_without_standard_deviations_and_lengths(tmp_path):
    """On-policy the ratio is 1, so the loss is minus the sum of all tokens' advantages, divided by N * 24."""
    metrics = train_copy(copy_with(tmp_path / "copy", "dr_grpo"))[-1]
    records = read_records(tmp_path / "copy", "train-000001")
    rewards = np.asarray([record["reward"] for record in records]).reshape(2, 2)
    assert np.unique(rewards - rewards.mean(axis=1, keepdims=True)).tolist() == [-0.5, 0.5]  # the std is 0.5, too
    advantages = np.asarray([record["advantage"] for record in records])
    np.testing.assert_array_equal(advantages, (rewards - rewards.mean(axis=1, keepdims=True)).ravel())
    lengths = np.asarray([record["length"] for record in records])
    np.testing.assert_allclose(metrics["loss/total"], -np.mean(advantages * lengths) / 24, rtol=1e-4)


@pytest.mark.slow
def test_the_kl_term_in_the_reward_lowers_it(tmp_path):
    """In step 2 the policy differs from the reference. The loss itself has no KL term."""
    folder = copy_with(tmp_path / "copy", "kl_in_reward")
    metrics = train_copy(folder, "total_steps=2", "loss.kl_coef=0.5", "optim.lr=0.001")[-1]
    records = read_records(folder, "train-000002")
    kl = np.asarray([np.sum(np.subtract(record["logps"], record["ref_logps"])) for record in records])
    assert np.abs(kl).max() > 0.1
    np.testing.assert_allclose([record["rewards"]["kl"] for record in records], -kl, rtol=1e-4, atol=1e-5)
    rewards = [record["rewards"]["accuracy"] + record["rewards"]["format"] for record in records] - 0.5 * kl
    np.testing.assert_allclose([record["reward"] for record in records], rewards, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["reward/mean"], rewards.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward/kl"], -kl.mean(), rtol=1e-4)
    assert metrics["policy/kl_ref"] > 1e-3 and abs(metrics["loss/total"]) < 1e-4


def test_the_commands_of_the_guide_train_with_a_part_and_a_task_from_files(tmp_path):
    """A single run uses the flags of both commands."""
    folder = copy_with(tmp_path / "copy", "brevity", "multiplication")
    words = [word for command in COMMANDS if ".py:" in command.split("r1zero.py")[1] for word in shlex.split(command)]
    flags = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
    assert len(flags) == 3
    metrics = train_copy(folder, *flags, "loss.kl_coef=0")
    parts = ("accuracy", "format", "brevity")
    assert {f"reward/{part}" for part in parts} <= metrics[1].keys() and "eval/brevity" in metrics[0]
    for record in [*read_records(folder, "train-000001"), *read_records(folder, "eval-000000")]:
        a, b = record["metadata"]["a"], record["metadata"]["b"]
        assert (record["question"], record["expected"]) == (f"What is {a} * {b}?", str(a * b))
        assert record["reward"] == pytest.approx(np.dot([record["rewards"][part] for part in parts], [1, 1, 0.1]))


@pytest.mark.slow
def test_gspo_clips_whole_completions_with_the_command_of_the_guide(tmp_path):
    """Each of the four minibatches of a rollout is one completion, so all of its tokens are clipped or none is."""
    (command,) = (command for command in COMMANDS if "gspo" in command)
    flags = [word.removeprefix("--config.") for word in shlex.split(command) if word.startswith("--config.")]
    rows = train_copy(copy_with(tmp_path / "copy", "gspo"), *flags, "optim.lr=0.001", "total_steps=4")[1:]
    assert {round(row["policy/clip_frac"], 5) for row in rows} == {0, 1}
    assert rows[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-4) and rows[-1]["policy/ratio_max"] != 1


def test_brevity_prefers_the_shorter_of_two_correct_completions(tmp_path):
    from grpo_jax.tasks import Problem

    brevity = import_function(copy_with(tmp_path / "copy", "brevity") / "length.py", "brevity")
    texts = ["<answer>4</answer>"] * 3 + ["<answer>5</answer>"]
    rewards = brevity([Problem("2 + 2?", "4")] * 4, texts, np.asarray([16, 32, 70, 16]))
    np.testing.assert_allclose(rewards, [0.75, 0.5, 0, 0])


def test_the_splits_of_the_tasks_share_no_problem(tmp_path):
    from grpo_jax.tasks.streams import draw_problems

    for name, held_out_count in (("multiplication", 64), ("capitals", 2)):
        task = import_function(copy_with(tmp_path / name, name) / f"{name}.py", name)
        problems = {split: draw_problems(task, range(64), seed=3, split=split) for split in ("train", "eval")}
        assert problems["train"] == draw_problems(task, range(64), seed=3, split="train")
        assert [len(problems["train"]), len(problems["eval"])] == [64, held_out_count]
        answers = {split: {problem.answer for problem in drawn} for split, drawn in problems.items()}
        assert len(answers["train"]) > 2 and not answers["train"] & answers["eval"]


def make_gemma(folder: Path) -> tuple[dict, dict]:
    """Writes a random Gemma 1 model in the published format; returns its config and its tensors."""
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2, head_dim=12)
    config = {"model_type": "gemma", "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_act": "gelu"} | sizes
    draw = np.random.default_rng(0)
    shapes = {"embed_tokens.weight": (96, 32), "norm.weight": (32,)}
    for i in range(2):
        shapes |= {f"layers.{i}.{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        shapes |= {f"layers.{i}.self_attn.{name}_proj.weight": (48 if name == "q" else 12, 32) for name in "qkv"}
        shapes |= {f"layers.{i}.self_attn.o_proj.weight": (32, 48), f"layers.{i}.mlp.down_proj.weight": (32, 40)}
        shapes |= {f"layers.{i}.mlp.{name}_proj.weight": (40, 32) for name in ("gate", "up")}
    tensors = {name: 0.2 * draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}))
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return config, {name: tensor.astype(np.float64) for name, tensor in tensors.items()}


def gemma_logits(config: dict, tensors: dict, tokens: np.ndarray) -> np.ndarray:
    """Returns the logits of Gemma 1 for one row of tokens, as transformers' modeling_gemma.py defines them."""
    heads, width, length = config["num_attention_heads"], config["head_dim"], len(tokens)

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * (1 + tensors[f"{name}.weight"])

    def rotate(x):  # [L, H, E]
        angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
        cos, sin = (np.tile(f(angles), 2)[:, None] for f in (np.cos, np.sin))
        first, second = np.split(x, 2, axis=-1)
        return x * cos + np.concatenate([-second, first], axis=-1) * sin

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = tensors["embed_tokens.weight"][tokens] * np.sqrt(config["hidden_size"])
    for i in range(config["num_hidden_layers"]):

        def linear(x, name, i=i):
            return x @ tensors[f"layers.{i}.{name}_proj.weight"].T

        h = norm(x, f"layers.{i}.input_layernorm")
        q, k, v = (linear(h, f"self_attn.{name}").reshape(length, -1, width) for name in "qkv")
        scores = np.einsum("qhe,ke->hqk", rotate(q), rotate(k)[:, 0]) / np.sqrt(width)
        scores = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf))
        mixed = np.einsum("hqk,ke->qhe", scores / scores.sum(axis=-1, keepdims=True), v[:, 0])
        x = x + linear(mixed.reshape(length, heads * width), "self_attn.o")
        h = norm(x, f"layers.{i}.post_attention_layernorm")
        x = x + linear(gelu(linear(h, "mlp.gate")) * linear(h, "mlp.up"), "mlp.down")
    return norm(x, "norm") @ tensors["embed_tokens.weight"].T


def test_the_model_family_agrees_with_its_definition(tmp_path):
    folder = copy_with(tmp_path / "copy", "gemma")
    config, tensors = make_gemma(folder / "model")
    tokens = np.random.default_rng(1).integers(0, 96, 20)
    code = f"""
import numpy as np
from grpo_jax import forward, load, save

model_cfg, params = load("model")
np.save("logits.npy", forward(model_cfg, params, np.asarray([{tokens.tolist()}])))
save("saved", model_cfg, params)
"""
    run_copy(folder, "-c", code)
    logits, expected = np.load(folder / "logits.npy")[0], gemma_logits(config, tensors, tokens)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    saved, original = (load_file(folder / name / "model.safetensors") for name in ("saved", "model"))
    assert saved.keys() == original.keys()
    assert all((saved[name] == original[name]).all() for name in original)


def test_the_optimizer_is_accepted_and_takes_the_first_step_of_nadam(tmp_path):
    """After the first gradient g, Adam's step is sign(g); Nesterov momentum makes it (1 + b1 / (1 + b1)) sign(g)."""
    folder = copy_with(tmp_path / "copy", "nadam")
    code = """
import jax.numpy as jnp
import numpy as np
from grpo_jax import config
from grpo_jax.learn.optimizer import make_optimizer

raw = config.default()
raw.optim.name = "nadam"
optimizer = make_optimizer(config.check(raw).optim)
params = {"head": {"kernel": jnp.ones((1, 3))}}
grads = {"head": {"kernel": jnp.asarray([[0.1, -0.2, 0.3]])}}
updates, _ = optimizer.update(grads, optimizer.init(params), params)
np.save("updates.npy", updates["head"]["kernel"])
"""
    run_copy(folder, "-c", code)
    expected = 1.5e-4 * (1 + 0.9 / 1.9) * np.asarray([[-1, 1, -1]])
    np.testing.assert_allclose(np.load(folder / "updates.npy"), expected, rtol=1e-4)
