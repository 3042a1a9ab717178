"""Every config key of training with its meaning, default and allowed values: one frozen dataclass per section.

`default()`, the check, `--help` and docs/config.md are all made from these classes, so nothing about a key is written
anywhere else. A class's docstring is the section's line in `--help`. `Config`, at the end, names the sections.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_jax.config.keys import Resumable, key

if TYPE_CHECKING:
    from ml_collections import ConfigDict

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
SCHEDULES = ("constant", "linear", "cosine")
OVERLONG = ("keep", "zero", "mask", "soft")
EQUAL_GROUPS = ("keep", "drop")
MEANS = ("group", "batch", "leave_one_out")
STDS = ("group", "batch", "none")
RATIOS = ("token", "sequence", "sequence_token", "detached", "difference")
AGGREGATES = ("sequence", "token", "prompt", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")
TRACKERS = ("wandb", "trackio")
SINKS = ("jsonl", "tensorboard", *TRACKERS)
LANGUAGES = ("ar", "de", "el", "en", "es", "fr", "he", "hi", "it", "ja", "ko", "pt", "ru", "th", "vi", "zh")


def is_axis_size(size: int) -> bool:
    """Returns whether a mesh axis may have this size; -1 stands for the devices that the other axes leave."""
    return size == -1 or size >= 1


def are_stop_strings(strings: tuple) -> bool:
    """Returns whether all elements are non-empty strings that are short enough for the stop table."""
    return all(isinstance(text, str) and text for text in strings) and sum(map(len, strings)) <= 4000


def are_names(names: tuple) -> bool:
    """Returns whether there is at least one element and all are non-empty strings."""
    return bool(names) and all(isinstance(name, str) and name for name in names)


def are_sinks(names: tuple) -> bool:
    """Returns whether all elements are different names of sinks, and jsonl is one of them."""
    return "jsonl" in names and all(name in SINKS and names.count(name) == 1 for name in names)


def are_examples(texts: tuple) -> bool:
    """Returns whether the elements are pairs of non-empty strings."""
    return len(texts) % 2 == 0 and all(isinstance(text, str) and text for text in texts)


def are_finite(numbers: tuple) -> bool:
    """Returns whether all elements are finite floats."""
    return all(type(number) is float and math.isfinite(number) for number in numbers)


DUAL_CLIP = (lambda ratio: ratio == 0 or ratio > 1, "0 or more than 1")
AXIS_SIZE = (is_axis_size, "at least 1, or -1 for the devices that the other axes leave")
GROUP_OF_TWO = "a completion's advantage is relative to the rest of its group"
NOT_GREEDY = "greedy completions of a prompt are identical and teach nothing (eval.temperature may be 0)"
STOP_STRINGS = (are_stop_strings, "non-empty strings of at most 4000 characters in total")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The base model, its attention kernel, and the dtypes of training."""

    path: str = key("tiny", "base model: folder, hub id, GGUF file, `tiny`, `smollm2` or `gemma3-270m`", path=True)
    param_dtype: str = key("float32", "dtype of the master weights; bfloat16 loses small updates", choices=DTYPES)
    reference_dtype: str = key("float32", "dtype of the frozen reference model", choices=DTYPES)
    compute_dtype: str = key("float32", "dtype of activations and of weights in use", choices=DTYPES)
    logit_dtype: str = key("float32", "dtype of logits; probabilities are always float32", choices=DTYPES)
    attention: str = key(
        "auto",
        "attention kernel: `plain` (the definition), `blocks` (any device), `splash` (TPU), `cudnn` (NVIDIA), or "
        "`auto` for the fastest one available; all compute the same function",
        choices=("auto", "plain", "blocks", "splash", "cudnn"),
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class TaskSection:
    """The problems to learn from."""

    name: str = key(
        "addition",
        "`addition` generates sums, `file` reads task.path; module:function or path/file.py:function is your own task",
    )
    digits: int = key(3, "number of digits of both numbers in a sum", at_least=1, at_most=9)
    shots: int = key(
        0, "solved sums before each question, for a model that does not know the tags", at_least=0, at_most=1000
    )
    path: str = key(
        "",
        "problems: a JSONL, JSON, CSV or parquet file, plain or gzipped, or a Hugging Face dataset (folder or hub id)",
        path=True,
    )
    eval_path: str = key(
        "", "held-out problems, in the same formats; if empty, a tenth of task.path is held out", path=True
    )
    question: str = key(
        "", "field of the question, with dots if nested; if empty, found by the names that common data sets use"
    )
    answer: str = key("", "field of the expected answer, like task.question")
    choices: str = key("", "field of the choices of a multiple-choice question, like task.question")
    max_unreadable: float = key(
        0.01,
        "largest fraction of rows that may be left out as unreadable: no question, or no answer that could be matched",
        at_least=0,
        at_most=1,
        resumable=True,
    )
    too_long: str = key(
        "refuse",
        "problems whose prompts exceed rollout.max_prompt_tokens: `refuse` stops the run, `drop` leaves them out",
        choices=("refuse", "drop"),
    )


@dataclass(frozen=True, kw_only=True)
class PromptSection:
    """How a question becomes a prompt."""

    template: str = key(
        "r1zero",
        "`r1zero` is the paper's template, `chat` the model's chat template; or a text file that contains `{question}`",
        path=True,
    )
    instruction: str = key(
        "", "text before the first question (with `chat`) or before the template (otherwise), such as how to answer"
    )
    examples: tuple[str, ...] = key(
        (),
        "solved problems before each question, for a model that does not use the tags by itself: alternating questions "
        "and completions; problems with these questions are not trained on",
        check=(are_examples, "pairs of a question and a completion, neither of them empty"),
    )


@dataclass(frozen=True, kw_only=True)
class RewardSection:
    """The reward parts and their weights."""

    parts: tuple[str, ...] = key(
        ("accuracy", "format"),
        "reward parts; each is `accuracy`, `format`, `language`, `length`, module:function or path/file.py:function",
        check=(are_names, "at least one name"),
    )
    weights: tuple[float, ...] = key((1.0, 1.0), "weight of each part in the sum", check=(are_finite, "finite numbers"))
    language: str = key("en", "language that the part `language` rewards, by its script", choices=LANGUAGES)
    format_empty: bool = key(
        False, "whether the part `format` rewards an empty think or answer, or the template's placeholders"
    )
    deadline: float = key(
        10.0,
        "seconds that a reward function of your own may take for one completion, which otherwise gets 0",
        more_than=0,
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class RolloutMeshSection(Resumable):
    """The mesh of rollouts, over the devices of `mesh`; axes that are not set here split rows."""

    tensor: int = key(0, "like mesh.tensor; 0 for the smallest size that fits, at least mesh.tensor", at_least=0)
    expert: int = key(0, "like mesh.expert; 0 for the smallest size that fits, at least mesh.expert", at_least=0)


@dataclass(frozen=True, kw_only=True)
class RolloutSection:
    """The completions that are sampled from the policy."""

    prompts: int = key(16, "B, number of prompts per rollout", at_least=1)
    samples: int = key(8, "G, number of completions per prompt", at_least=2, because=GROUP_OF_TWO)
    max_prompt_tokens: int = key(
        0, "T, longest prompt in tokens (see task.too_long); 0 derives it from the problems", at_least=0
    )
    max_tokens: int = key(56, "S, number of tokens after which a completion is truncated", at_least=1)
    temperature: float = key(1.0, "sampling temperature, used for log-probs too", at_least=0.01, because=NOT_GREEDY)
    stop_strings: tuple[str, ...] = key(("</answer>",), "strings that end a completion, like EOS", check=STOP_STRINGS)
    overlong: str = key(
        "keep",
        "truncated completions: `keep` them, set their reward to `zero`, or `mask` them; `soft` penalizes long ones",
        choices=OVERLONG,
    )
    overlong_cache: int = key(0, "tokens before the limit, over which `soft` and `length` fall to -1", at_least=0)
    slots: int = key(0, "number of decode slots; 0 for as many as fit in memory", at_least=0, resumable=True)
    mesh: RolloutMeshSection = RolloutMeshSection()


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How a rollout is divided into updates and micro-batches."""

    minibatches: int = key(
        1,
        "minibatches per rollout, one update each; each epoch shuffles the groups, and a cut may split one",
        at_least=1,
    )
    epochs: int = key(1, "number of passes over a rollout", at_least=1)
    micro_tokens: int = key(1024, "tokens per micro-batch and data shard, or one sequence", at_least=1, resumable=True)
    chunk_tokens: int = key(512, "tokens whose logits are computed at a time", at_least=1, resumable=True)
    remat: str = key(
        "layers",
        "what the backward pass recomputes: `layers` (each layer except its attention), `matmuls` (everything except "
        "matrix products) or `none`",
        choices=("layers", "matmuls", "none"),
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class GroupsSection:
    """Which groups of completions the updates learn from."""

    equal: str = key("keep", "whether updates `keep` or `drop` groups of equal rewards", choices=EQUAL_GROUPS)


@dataclass(frozen=True, kw_only=True)
class AdvantageSection:
    """The advantage, (reward - mean) / (std + eps); see docs/algorithms.md for the equations."""

    mean: str = key("group", "mean of the `group`, the rollout (`batch`), or the rest of the group", choices=MEANS)
    std: str = key("group", "standard deviation of the `group` or of the rollout (`batch`), or `none`", choices=STDS)
    ddof: int = key(0, "the variance divides by the number of rewards minus ddof", at_least=0, at_most=1)
    eps: float = key(0.0, "added to the standard deviation", at_least=0)


@dataclass(frozen=True, kw_only=True)
class LossSection:
    """The policy loss, the KL penalty and the entropy bonus; see docs/algorithms.md for the equations."""

    ratio: str = key(
        "token", "ratio: GRPO's `token`, GSPO's `sequence*`, CISPO's `detached`, DPPO's `difference`", choices=RATIOS
    )
    clip_low: float = key(0.2, "offset: the ratio is clipped to at least 1 - clip_low", at_least=0)
    clip_high: float = key(0.2, "offset: the ratio is clipped to at most 1 + clip_high", at_least=0)
    clip_dual: float = key(0.0, "ratio: bounds the objective of negative advantages; 0 for no bound", check=DUAL_CLIP)
    clip_difference: float = key(0.2, "probability: the bound on pi - pi_old of `difference`", at_least=0, at_most=1)
    aggregate: str = key(
        "sequence", "mean over each `sequence`, each `prompt` or all (`token`), or sum / `constant`", choices=AGGREGATES
    )
    constant_length: int = key(0, "number of tokens by which `constant` divides the sum over a completion", at_least=0)
    kl_coef: float = key(0.001, "beta, the weight of the KL penalty; at 0 no reference model is kept", at_least=0)
    kl: str = key("k3", "estimator of the KL divergence from the reference", choices=KL_ESTIMATORS)
    kl_corrected: bool = key(False, "whether to multiply the estimator by the ratio of each token")
    kl_in: str = key("loss", "whether the penalty is part of the `loss` or the `reward`", choices=("loss", "reward"))
    entropy_coef: float = key(0.0, "weight of the entropy bonus; if not 0, policy/entropy is logged", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ReferenceSection:
    """The reference model of the KL penalty."""

    every_updates: int = key(0, "updates between replacements of the reference by the policy; 0 for never", at_least=0)


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """The optimizer, the learning-rate schedule and gradient clipping."""

    name: str = key("adamw", "update rule; `muon` leaves all but the layers' matrices to AdamW", choices=OPTIMIZERS)
    lr: float = key(1.5e-4, "peak learning rate; multiplies steps with an RMS of about 1 (Muon: 0.2)", more_than=0)
    schedule: str = key("constant", "shape of the learning rate after the warm-up", choices=SCHEDULES)
    warmup_steps: int = key(0, "updates of linear warm-up to the peak learning rate", at_least=0)
    decay_steps: int = key(0, "updates until the decay of the learning rate ends, warm-up included", at_least=0)
    end_lr_fraction: float = key(0.0, "fraction of optim.lr that is left after the decay", at_least=0, at_most=1)
    b1: float = key(0.9, "decay of the first moment; in Lion, its weight in the step", at_least=0, below=1)
    b2: float = key(0.999, "decay of the second moment; in Lion, of the only moment", at_least=0, below=1)
    eps: float = key(1e-8, "Adam's epsilon, added to the square root of the second moment", more_than=0)
    mu_dtype: str = key("float32", "dtype of the moment that averages gradients", choices=DTYPES)
    weight_decay: float = key(0.0, "an update subtracts lr * weight_decay times the parameter", at_least=0)
    grad_clip: float = key(1.0, "largest global norm of a gradient; larger ones are scaled down to it", more_than=0)
    max_skips: int = key(5, "skipped updates in a row that end the run", at_least=1, resumable=True)


@dataclass(frozen=True, kw_only=True)
class MeshSection(Resumable):
    """Sizes of the mesh axes; their product is the number of devices, and one of them may be -1."""

    data: int = key(-1, "data parallelism: splits rows and replicates parameters", check=AXIS_SIZE)
    fsdp: int = key(1, "splits rows, and parameters, which are gathered layer by layer", check=AXIS_SIZE)
    expert: int = key(1, "splits rows, and the experts of a mixture", check=AXIS_SIZE)
    tensor: int = key(1, "splits attention heads, MLP and vocabulary", check=AXIS_SIZE)


@dataclass(frozen=True, kw_only=True)
class CheckpointSection(Resumable):
    """When checkpoints are written and how many are kept."""

    every_steps: int = key(20, "updates between checkpoints; the last update is always saved", at_least=1)
    keep: int = key(2, "number of checkpoints to keep: the newest sound ones", at_least=1)
    best: str = key(
        "", "evaluation metric, such as eval/accuracy, whose best checkpoint is kept as well; empty for none"
    )
    retry_s: int = key(
        0,
        "seconds after which a run of one process retries a failed save, as on a full disk; 0 ends the run instead",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class RunSection(Resumable):
    """When a run stops before its last update."""

    time_limit: float = key(
        0.0,
        "seconds after which a run saves and stops at its next safe point, with exit code 75; 0 for no limit",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class EvalSection(Resumable):
    """The evaluation on held-out problems."""

    every_steps: int = key(0, "updates between evaluations; 0 for only before the first and after the last", at_least=0)
    questions: int = key(256, "number of held-out problems; 0 for no evaluation", at_least=0, at_most=1_000_000)
    temperature: float = key(1.0, "sampling temperature; 0 decodes greedily", at_least=0)
    top_k: int = key(0, "samples from the k most likely tokens; 0 for all", at_least=0)
    top_p: float = key(1.0, "samples from the fewest tokens with this total probability", more_than=0, at_most=1)
    min_p: float = key(0.0, "samples from tokens with this fraction of the top probability", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class LogSection(Resumable):
    """Console lines, sample files and metrics."""

    every_steps: int = key(
        5, "updates between console lines and between files in samples/ (which also follow checkpoints)", at_least=1
    )
    samples: int = key(16, "number of completions per file in samples/; -1 for all", at_least=-1)
    sinks: tuple[str, ...] = key(
        ("jsonl", "tensorboard"),
        "where metrics and completions go: `jsonl` (metrics.jsonl and samples/; required), `tensorboard`, "
        "`wandb`, `trackio` (see docs/trackers.md)",
        check=(are_sinks, f"`jsonl` and any of {', '.join(f'`{name}`' for name in SINKS[1:])}, each once"),
        because="resumed runs and reports read the files of `jsonl`",
    )
    entropy: bool = key(True, "whether to log policy/entropy, which takes a pass over the logits")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The config of a training run."""

    job: str = key("grpo", "the job that `grpo_jax.main` runs", choices=("grpo",))
    derive: bool = key(
        False,
        "whether a new run derives the keys that you do not set (see docs/own.md); config.json holds their values",
    )
    seed: int = key(0, "seed of all random draws of the run", at_least=0, below=2**32)
    total_steps: int = key(80, "number of updates", at_least=1, resumable=True)
    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    prompt: PromptSection = PromptSection()
    reward: RewardSection = RewardSection()
    rollout: RolloutSection = RolloutSection()
    groups: GroupsSection = GroupsSection()
    advantage: AdvantageSection = AdvantageSection()
    train: TrainSection = TrainSection()
    loss: LossSection = LossSection()
    reference: ReferenceSection = ReferenceSection()
    optim: OptimSection = OptimSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()
    run: RunSection = RunSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()


def default() -> "ConfigDict":
    """Returns the default training config, which trains the tiny base model on a CPU. Config files start from it."""
    from ml_collections import ConfigDict  # imported here, because a checked config does not need it

    return ConfigDict(dataclasses.asdict(Config()))
