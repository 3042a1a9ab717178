"""Computes values of the tiny base model in float32 on a CPU, with which `parts/right.py` compares other devices.

    python benchmarks/cpu_values.py

writes `parts/cpu_values.npz`. Run it after changing the base model or what the package is meant to compute. For B
prompts with G completions each, N = B * G completions in all, of at most S tokens, the file holds

base               SHA-256 of the base model's weights
prompt_tokens      [B, T], with prompt_lengths [B]: prompts for sums of numbers with one to four digits
stop_table         [A, V], for "</answer>" and the EOS tokens
greedy_tokens      [B, G, S], with greedy_lengths [B, G]; all completions of a prompt are equal
greedy_margins     [B, G, S], by how much the logit of each token exceeds all others
sampled_tokens     [B, G, S], with sampled_lengths [B, G] and sampled_logps [B, G, S], at temperature 1
sampled_margins    [B, G, S], the same for the sums of logits and Gumbel noise whose largest is the sampled token
logits             [B, LOGIT_COLUMNS, V], at a few tokens of each prompt's first sampled sequence, from start to end
old_logps          [N, S], log-probs of the old policy, which differ from the policy's so that some ratios are clipped
ref_logps          [N, S], log-probs of a reference that differs from the policy
metrics            metrics of one update on the sampled completions with `ADVANTAGES`, in the order of metric_names
gradients          [leaves, SAMPLED_ENTRIES], some entries of each parameter's gradient, after clipping to a norm of 1
gradient_sizes     [leaves, SAMPLED_ENTRIES], the absolute values of these entries, from Adam's second moment
largest_gradients  [leaves], the largest absolute entry of each parameter's gradient
steps              [leaves, SAMPLED_ENTRIES], the change of the same entries of the parameters, in learning rates
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from layouts import runner_up_margin

from grpo_jax.config import Config, check, default
from grpo_jax.learn.optimizer import init_train_state, make_optimizer
from grpo_jax.learn.packing import packed_shape
from grpo_jax.learn.update import make_experience, make_update, pack_minibatch
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import forward
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.rollout.sampler import generate_rollout, place_for_rollout
from grpo_jax.tasks.addition import addition_task
from grpo_jax.text.problem import Prompts
from grpo_jax.text.prompt import PromptFormat, completion_eos_ids, encode_prompts
from grpo_jax.text.stops import build_stop_table
from grpo_jax.types import Experience, PackedBatch, Rollout
from grpo_jax.weights.reading import load
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer

FILE = Path(__file__).parent / "parts" / "cpu_values.npz"

Values = dict[str, np.ndarray]

DIGITS = (1, 2, 3, 4)  # of the numbers to add, so that prompts differ in length
PROMPTS_OF_A_LENGTH = 2
CANDIDATES = 32  # prompts per number of digits, of which those with the largest margins are chosen
SAMPLES = 2  # G
SLOTS = 12  # fewer than the 16 completions, so that slots are refilled
SEED = 0
WIDTH = 256  # columns of a row of `forward`; attention kernels need a multiple of 128
LOGIT_COLUMNS = 4
SAMPLED_ENTRIES = 256

ADVANTAGES = (np.arange(16) * 7 % 16 - 7.5).astype(np.float32) / 3  # so large that the gradient is clipped
# log(pi / pi_old) of the tokens. None is near the clip limits, log(0.8) and log(1.3), which rounding could cross.
LOG_RATIOS = np.array([-0.5, -0.02, 0.02, 0.5], np.float32)
REFERENCE_SCALE = 1.05  # the reference is the base model with all parameters multiplied by this


def base_digest() -> str:
    """Returns the SHA-256 of the weights of the tiny base model."""
    return hashlib.sha256((find_model("tiny") / "model.safetensors").read_bytes()).hexdigest()


def read_values() -> Values:
    """Reads the file.

    Raises:
        ValueError: The file was computed with another base model.
    """
    with np.load(FILE) as file:
        values = dict(file)
    if str(values["base"]) != base_digest():
        raise ValueError(
            f"{FILE.name} was computed with another base model. Run `python benchmarks/{Path(__file__).name}`."
        )
    return values


def update_config() -> Config:
    """Returns the default config with a larger KL penalty, unequal clip limits, and steps that float32 resolves."""
    raw = default()
    raw.rollout.max_prompt_tokens = 80
    raw.rollout.prompts, raw.rollout.samples = len(DIGITS) * PROMPTS_OF_A_LENGTH, SAMPLES
    raw.loss.kl_coef, raw.loss.clip_high, raw.optim.lr = 0.1, 0.3, 0.01
    return check(raw)


def prompts_of(values: Values) -> Prompts:
    """Returns the prompts of the file."""
    lengths = values["prompt_lengths"]
    return Prompts(values["prompt_tokens"], lengths, np.arange(len(lengths), dtype=np.int32))


def decode(model_cfg: ModelConfig, params, values: Values, temperature: float) -> Rollout:
    """Samples completions of the prompts, or decodes greedily at temperature 0."""
    rollout = generate_rollout(
        model_cfg,
        place_for_rollout(model_cfg, params),
        prompts_of(values),
        jax.random.key(SEED),
        samples=SAMPLES,
        max_tokens=update_config().rollout.max_tokens,
        temperature=temperature,
        stop_table=values["stop_table"],
        slots=SLOTS,
    )
    return jax.device_get(rollout)


def experience_of(values: Values, kind: str) -> Experience:
    """Returns the "greedy" or "sampled" completions, with 0 in place of their log-probs."""
    tokens, lengths, prompts = values[f"{kind}_tokens"], values[f"{kind}_lengths"], prompts_of(values)
    rollout = Rollout(tokens, np.zeros(tokens.shape, np.float32), lengths, np.zeros(lengths.shape, bool), prompts.ids)
    return make_experience(prompts, rollout)


def sequence_logits(model_cfg: ModelConfig, params, experience: Experience) -> Float[Array, "N L V"]:
    """Computes the logits at all tokens of N sequences, padded to `WIDTH` columns."""
    lengths = experience.prompt_lengths + experience.mask.sum(axis=1)
    tokens = np.pad(experience.tokens, ((0, 0), (0, WIDTH - experience.tokens.shape[1])))
    mask = np.arange(WIDTH) < lengths[:, None]
    return jax.jit(forward, static_argnums=0)(model_cfg, params, tokens, mask=mask)


def first_logits(model_cfg: ModelConfig, params, values: Values) -> Float[np.ndarray, "B _ V"]:
    """Returns the logits at `LOGIT_COLUMNS` tokens of each prompt's first sampled sequence; the last is its end."""
    experience = experience_of(values, "sampled")
    ends = (experience.prompt_lengths + experience.mask.sum(axis=1) - 1)[::SAMPLES]
    columns = np.linspace(0, ends, LOGIT_COLUMNS, axis=1).astype(int)
    logits = np.asarray(sequence_logits(model_cfg, params, experience))[::SAMPLES]
    return logits[np.arange(len(columns))[:, None], columns]


def pack(cfg: Config, experience: Experience) -> PackedBatch:
    """Packs the completions as a run with this config does, which gives two micro-batches."""
    sizes = cfg.rollout.max_prompt_tokens, cfg.rollout.max_tokens, cfg.train.micro_tokens
    shape = packed_shape(len(experience.mask), SAMPLES, *sizes, shards=1)
    return pack_minibatch(experience, cfg.loss, shape, shards=1)


def sample_entries(tree) -> Float[np.ndarray, "leaves _"]:
    """Returns `SAMPLED_ENTRIES` evenly spaced entries of each leaf."""
    leaves = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)]
    return np.stack([leaf[np.linspace(0, leaf.size - 1, SAMPLED_ENTRIES).astype(int)] for leaf in leaves])


def update(model_cfg: ModelConfig, params, mesh: Mesh, values: Values) -> Values:
    """Updates the policy once, as training does, and returns the values of the file from `metrics` on."""
    cfg = update_config()
    model_cfg = replace(model_cfg, remat=cfg.train.remat)
    known = {name: values[name] for name in ("old_logps", "ref_logps")}
    experience = experience_of(values, "sampled").replace(
        sampler_logps=known["old_logps"], ref_logps=known["ref_logps"], advantages=ADVANTAGES
    )
    optimizer = make_optimizer(cfg.optim)
    before = jax.device_get(params)
    state = init_train_state(mesh, before, optimizer)
    step = make_update(model_cfg, cfg, mesh, state.params, optimizer)
    state, metrics = jax.device_get(step(state, pack(cfg, experience)))
    # After the first update, Adam's moments are 1 - b1 times the gradient and 1 - b2 times its square.
    gradients = jax.tree.map(lambda x: x / (1 - cfg.optim.b1), optax.tree.get(state.opt_state, "mu"))
    sizes = jax.tree.map(lambda x: np.sqrt(x / (1 - cfg.optim.b2)), optax.tree.get(state.opt_state, "nu"))
    steps = jax.tree.map(lambda new, old: (new - old) / cfg.optim.lr, state.params, before)
    return {
        "metric_names": np.array(sorted(metrics)),
        "metrics": np.array([metrics[name] for name in sorted(metrics)], np.float32),
        "gradients": sample_entries(gradients),
        "gradient_sizes": sample_entries(sizes),
        "largest_gradients": np.array([np.abs(leaf).max() for leaf in jax.tree.leaves(gradients)]),
        "steps": sample_entries(steps),
    }


def completion_logits(model_cfg: ModelConfig, params, experience: Experience) -> Float[np.ndarray, "N S V"]:
    """Returns the logits that each token of N completions is sampled from; undefined after the end of a completion."""
    columns = experience.prompt_lengths[:, None] - 1 + np.arange(experience.mask.shape[1])
    logits = np.asarray(sequence_logits(model_cfg, params, experience))[np.arange(len(columns))[:, None], columns]
    return np.where(np.arange(logits.shape[-1]) < model_cfg.sampleable_vocab_size, logits, -np.inf)


def greedy_margins(model_cfg: ModelConfig, params, values: Values) -> Float[np.ndarray, "B G S"]:
    """Returns by how much the logit of each greedy token exceeds all others; 0 after the end of a completion."""
    experience = experience_of(values, "greedy")
    ordered = np.sort(completion_logits(model_cfg, params, experience))
    margins = (ordered[..., -1] - ordered[..., -2]) * experience.mask
    return margins.reshape(-1, SAMPLES, margins.shape[-1])


def draw_margins(model_cfg: ModelConfig, params, values: Values) -> Float[np.ndarray, "B G S"]:
    """Returns the margins of the sampled tokens, with Gumbel noise added to the logits; 0 after a completion's end."""
    experience = experience_of(values, "sampled")
    shape = len(values["prompt_lengths"]), SAMPLES, experience.mask.shape[1]

    def margin(counters, logits):  # one token: its prompt, sample and index, and logits [V]
        key = jax.random.key(SEED)
        for counter in counters:
            key = jax.random.fold_in(key, counter)
        return runner_up_margin(key[None], logits[None])[0]

    logits = completion_logits(model_cfg, params, experience)
    margins = jax.jit(jax.vmap(margin))(np.indices(shape).reshape(3, -1).T, logits.reshape(-1, logits.shape[-1]))
    return np.asarray(margins).reshape(shape) * experience.mask.reshape(shape)


def completion_logps(model_cfg: ModelConfig, params, experience: Experience) -> Float[np.ndarray, "N S"]:
    """Returns the log-probs of N completions; 0 after their end."""
    logits = completion_logits(model_cfg, params, experience)
    columns = experience.prompt_lengths[:, None] + np.arange(experience.mask.shape[1])
    tokens = np.take_along_axis(experience.tokens, columns, axis=1)
    chosen = np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    logps = chosen - np.logaddexp.reduce(logits, axis=-1, dtype=np.float64)
    return logps.astype(np.float32) * experience.mask


def choose_prompts(model_cfg: ModelConfig, params) -> Values:
    """Returns the stop table and the prompts whose greedy tokens are the farthest from near-ties."""
    tokenizer, rollout = load_tokenizer(find_model("tiny")), update_config().rollout
    task = [addition_task(digits) for digits in DIGITS]
    problems = [task(index, seed=SEED, split="eval") for task in task for index in range(CANDIDATES)]
    prompts = encode_prompts(PromptFormat(tokenizer), problems, range(len(problems)), rollout.max_prompt_tokens)
    stop_ids = completion_eos_ids(tokenizer, model_cfg.eos_ids)
    values = {
        "prompt_tokens": prompts.tokens,
        "prompt_lengths": prompts.lengths,
        "stop_table": build_stop_table(model_cfg.vocab_size, stop_ids, rollout.stop_strings, tokenizer),
    }
    greedy = decode(model_cfg, params, values, temperature=0)
    values |= {"greedy_tokens": greedy.tokens, "greedy_lengths": greedy.lengths}
    margins = greedy_margins(model_cfg, params, values)
    smallest = margins[:, 0].min(axis=-1, initial=np.inf, where=margins[:, 0] > 0).reshape(len(DIGITS), CANDIDATES)
    best = np.argsort(-smallest, axis=1)[:, :PROMPTS_OF_A_LENGTH] + np.arange(len(DIGITS))[:, None] * CANDIDATES
    return values | {name: values[name][best.ravel()] for name in ("prompt_tokens", "prompt_lengths")}


def compute_values(mesh: Mesh, model_cfg: ModelConfig, params, inputs: Values) -> Values:
    """Computes the values of the file, given its prompts and its stop table."""
    values = {name: inputs[name] for name in ("prompt_tokens", "prompt_lengths", "stop_table")}
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        rollout = decode(model_cfg, params, values, temperature)
        values |= {f"{kind}_tokens": rollout.tokens, f"{kind}_lengths": rollout.lengths}
    values["sampled_logps"] = rollout.logps
    values["greedy_margins"] = greedy_margins(model_cfg, params, values)
    values["sampled_margins"] = draw_margins(model_cfg, params, values)
    values["logits"] = first_logits(model_cfg, params, values)
    experience = experience_of(values, "sampled")
    offsets = LOG_RATIOS[np.indices(experience.mask.shape).sum(axis=0) % len(LOG_RATIOS)]
    values["old_logps"] = completion_logps(model_cfg, params, experience) - offsets * experience.mask
    reference = jax.tree.map(lambda x: REFERENCE_SCALE * x, jax.device_get(params))
    values["ref_logps"] = completion_logps(model_cfg, reference, experience)
    return values | update(model_cfg, params, mesh, values)


def main() -> None:
    """Writes the file."""
    jax.config.update("jax_platforms", "cpu")
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        model_cfg, params = load("tiny", mesh=mesh)
        values = compute_values(mesh, model_cfg, params, choose_prompts(model_cfg, params))
    np.savez_compressed(FILE, base=base_digest(), **values)


if __name__ == "__main__":
    main()
