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
from grpo_jax.config.schema import LossSection
from grpo_jax.types import PackedBatch
from tests.tiny import experience, packed

REPO = Path(__file__).parent.parent
GUIDE = (REPO / "docs" / "changing.md").read_text(encoding="utf-8")
NAMES = ["maxrl", "mask", "penalty", "trainer_logps", "brevity", "multiplication", "capitals", "gemma", "nadam"]
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


def import_module(path: Path):
    """Imports a file of a copy under a unique module name."""
    name = "copied_" + re.sub(r"\W", "_", str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
        batch = experience(rows=8, sampled=9)
        self.batch = batch.replace(advantages=batch.advantages * np.tile([1, -1], 4).astype(np.float32))
        rows = packed(self.batch, micro_tokens=40)
        self.rows = rows.replace(weights=rows.weights / 2)  # so that they do not sum to 1, as with a constant length
        assert len(self.rows.tokens) > 2  # several micro-batches
        self.index = np.asarray(self.rows.flat_index)
        # `ref_logps` of the random experience are off-policy log-probs; here they play the policy.
        self.logps = jnp.where(self.rows.flat_index >= 0, self.rows.ref_logps, jnp.nan)
        self.log_ratio = np.where(self.batch.mask, self.batch.ref_logps - self.batch.sampler_logps, 0.0)
        self.lengths = self.batch.mask.sum(axis=1)
        self.weights = self.batch.mask / self.lengths[:, None] / len(self.lengths) / 2

    def gradients(self, grpo, loss):
        """Returns the loss, its gradient [N, S] and the metrics, added up over rows as over micro-batches."""

        def loss_and_sums(logps, row: PackedBatch):
            tokens = grpo.SampledTokens(
                row.sampler_logps,
                row.sampler_logps + 0.1,
                row.advantages,
                row.weights,
                row.sequence,
                row.group,
                self.rows.num_sequences,
            )
            return grpo.weighted_loss(logps, None, tokens, loss)

        total, gradient, sums = 0.0, np.zeros(self.batch.mask.size), []
        for n in range(len(self.index)):
            row = jax.tree.map(lambda x, n=n: x[n : n + 1], self.rows.replace(num_micro_batches=jnp.zeros(1)))
            (value, row_sums), d_row = jax.value_and_grad(loss_and_sums, has_aux=True)(self.logps[n : n + 1], row)
            total += value
            sums.append(row_sums)
            assert (np.asarray(d_row)[0, self.index[n] < 0] == 0).all()
            gradient[self.index[n][self.index[n] >= 0]] = np.asarray(d_row)[0, self.index[n] >= 0]
        metrics = grpo.finish_metrics(jax.tree.map(lambda *x: sum(x), *sums))
        return total, gradient.reshape(self.batch.mask.shape), metrics


def test_a_mask_takes_the_objective_but_not_the_kl_term_from_off_policy_completions(tmp_path):
    """Masked completions keep only the gradient of the KL term, 0.5 (1 - e^q) with q = log pi_ref - log pi."""
    rows, folder = OffPolicyRows(), copy_with(tmp_path / "copy", "mask")
    grpo, schema = (import_module(folder / "grpo_jax" / name) for name in ("learn/grpo.py", "config/schema.py"))
    settings = dict(kl_coef=0.5, clip_low=9.0, clip_high=9.0)  # wide enough never to clip
    distances = -rows.log_ratio.sum(axis=1) / rows.lengths
    is_masked = (rows.batch.advantages < 0) & (distances > 0.02)
    # Some completions are within the limit and some beyond it, with advantages of both signs.
    assert 0 < is_masked.sum() < (rows.batch.advantages < 0).sum() and is_masked.sum() < (distances > 0.02).sum()
    loss = schema.LossSection(**settings, off_policy_limit=0.02)
    total, gradient, metrics = rows.gradients(grpo, loss)
    objective = np.where(is_masked, 0.0, rows.batch.advantages)[:, None] * np.exp(rows.log_ratio)
    q = 0.1 - rows.log_ratio  # the reference is 0.1 above the old policy
    expected = rows.weights * (-objective + 0.5 * (1 - np.exp(q)))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(total, np.sum(rows.weights * (-objective + 0.5 * (np.exp(q) - q - 1))), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/off_policy_frac"], is_masked.mean(), rtol=1e-5)
    without_limit, _, metrics = rows.gradients(grpo, schema.LossSection(**settings))
    np.testing.assert_allclose(without_limit, rows.gradients(grpo_jax.learn.grpo, LossSection(**settings))[0])
    assert metrics["policy/off_policy_frac"] == 0


def test_the_penalty_pulls_every_token_back_to_the_old_policy(tmp_path):
    rows = OffPolicyRows()
    grpo = import_module(copy_with(tmp_path / "copy", "penalty") / "grpo_jax/learn/grpo.py")
    loss = LossSection(kl_coef=0.0, clip_low=0.05, clip_high=0.1)
    total, gradient, _ = rows.gradients(grpo, loss)
    plain_total, plain_gradient, metrics = rows.gradients(grpo_jax.learn.grpo, loss)
    assert metrics["policy/clip_frac"] > 0
    np.testing.assert_allclose(total - plain_total, np.sum(rows.weights * 1e-3 * rows.log_ratio**2), rtol=1e-3)
    np.testing.assert_allclose(gradient - plain_gradient, rows.weights * 2e-3 * rows.log_ratio, rtol=1e-3, atol=1e-8)


@pytest.fixture(scope="module")
def changed_run(tmp_path_factory):
    """Runs training with the flags of all commands in the guide, and with the diffs of the loss and of new files."""
    changes = ("maxrl", "mask", "penalty", "trainer_logps", "brevity", "multiplication")
    folder = copy_with(tmp_path_factory.mktemp("changed") / "copy", *changes)
    words = [word for command in COMMANDS for word in shlex.split(command)]
    flags = {word.split("=")[0]: word for word in words if word.startswith("--config.")}  # the last one of each key
    assert len(flags) == 6
    settings = [flag.removeprefix("--config.") for flag in flags.values()]
    # With this many completions, there is drift: some log-probs of the sampler and the trainer differ.
    settings += ["rollout.prompts=4", "rollout.samples=4", "model.compute_dtype=bfloat16"]
    metrics = train_copy(folder, *settings, "loss.kl_coef=0", "train.minibatches=1")
    return folder, metrics


def test_the_commands_of_the_guide_train_with_a_part_and_a_task_from_files(changed_run):
    folder, metrics = changed_run
    parts = ("accuracy", "format", "brevity")
    assert {f"reward/{part}" for part in parts} <= metrics[1].keys() and "eval/brevity" in metrics[0]
    for record in [*read_records(folder, "train-000001"), *read_records(folder, "eval-000000")]:
        a, b = record["metadata"]["a"], record["metadata"]["b"]
        assert (record["question"], record["expected"]) == (f"What is {a} * {b}?", str(a * b))
        assert record["reward"] == pytest.approx(np.dot([record["rewards"][part] for part in parts], [1, 1, 0.1]))


def test_ratios_to_the_log_probs_of_the_trainer_are_1(changed_run):
    """The sampler's log-probs differ from them by rounding, as the records show."""
    folder, metrics = changed_run
    records = read_records(folder, "train-000001")
    gaps = [np.abs(np.subtract(record["logps"], record["policy_logps"])).max() for record in records]
    print(max(gaps), metrics[1]["policy/logp_gap/max"], metrics[1]["policy/ratio_max"])
    assert metrics[1]["policy/logp_gap/max"] < max(gaps) / 4


def test_brevity_prefers_the_shorter_of_two_correct_completions(tmp_path):
    from grpo_jax.tasks import Problem

    brevity = import_module(copy_with(tmp_path / "copy", "brevity") / "length.py").brevity
    texts = ["<answer>4</answer>"] * 3 + ["<answer>5</answer>"]
    rewards = brevity([Problem("2 + 2?", "4")] * 4, texts, np.asarray([16, 32, 70, 16]))
    np.testing.assert_allclose(rewards, [0.75, 0.5, 0, 0])


def test_the_splits_of_the_tasks_share_no_problem(tmp_path):
    from grpo_jax.tasks.streams import draw_problems

    for name, held_out_count in (("multiplication", 64), ("capitals", 2)):
        task = getattr(import_module(copy_with(tmp_path / name, name) / f"{name}.py"), name)
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


def test_maxrl_divides_by_the_mean_reward_of_the_group(tmp_path):
    """One of four correct: (1 - 1/4) / (1/4) = 3 and -1. Three of four: 1/3 and -1. None or all: 0."""
    folder = copy_with(tmp_path / "copy", "maxrl")
    code = """
import numpy as np
from grpo_jax import advantages

rewards = np.asarray([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
np.save("advantages.npy", advantages(rewards, std="mean"))
"""
    run_copy(folder, "-c", code)
    expected = [[3, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(np.load(folder / "advantages.npy"), expected, rtol=1e-6)


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
    expected = (1 + 0.9 / 1.9) * np.asarray([[1, -1, 1]])  # before the learning rate
    np.testing.assert_allclose(np.load(folder / "updates.npy"), expected, rtol=1e-4)
