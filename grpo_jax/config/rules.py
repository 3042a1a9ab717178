"""Checks a config before any device work: its keys, then their values one by one, then the rules between keys."""

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any, TypeVar

from grpo_jax.config.functions import function_label
from grpo_jax.config.keys import flatten, format_as_flag, key_specs
from grpo_jax.config.pretrain_schema import PretrainConfig
from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.foreign import name_problem

if TYPE_CHECKING:
    from ml_collections import ConfigDict

C = TypeVar("C", Config, PretrainConfig)

# Labels that reward parts must not have, because they would clash with the metrics reward/mean, reward/kl,
# reward/timeout, reward/error and eval/length_mean, or with the part that rollout.overlong=soft adds.
RESERVED_LABELS = ("mean", "length_mean", "kl", "timeout", "error", "overlong")

# Keys that users look for but that training cannot have, with the reason.
REFUSED = dict.fromkeys(
    ("rollout.top_k", "rollout.top_p", "rollout.min_p"),
    "the update scores the full distribution, so the ratio to a truncated one would be biased "
    "(eval.top_k, eval.top_p and eval.min_p may be set)",
)

# No hardware can hold a larger rollout. Published ones have up to 8,192 sequences of up to 65,536 tokens.
MAX_SEQUENCES, MAX_ROLLOUT_TOKENS = 2**20, 2**33

# Stands for any function of the user's in NO_EFFECT.
USERS_FUNCTION = "module:function"

PYTHON_TASK = "python"  # task.name of a run whose problems were passed to grpo_jax.train

TEMPLATES = ("r1zero", "chat")  # values of prompt.template that are not files

RESOLVED_PATHS = ("task.path", "task.eval_path", "prompt.template")

FILE_KEYS = ("task.path", "task.eval_path", "task.question", "task.answer", "task.choices")

# Keys that have no effect while another key has certain values: (the other key, its values, the keys without effect).
NO_EFFECT: tuple[tuple[str, tuple, tuple[str, ...]], ...] = (
    ("task.name", ("addition",), FILE_KEYS),
    ("task.name", ("file",), ("task.digits", "task.shots")),
    ("task.name", (USERS_FUNCTION, PYTHON_TASK), ("task.digits", "task.shots", *FILE_KEYS)),
    ("task.name", ("addition", USERS_FUNCTION), ("task.too_long", "task.max_unreadable")),
    ("optim.schedule", ("constant",), ("optim.decay_steps", "optim.end_lr_fraction")),
    ("optim.name", ("adafactor",), ("optim.b1", "optim.b2", "optim.eps", "optim.mu_dtype")),
    ("optim.name", ("lion",), ("optim.eps",)),
    ("eval.questions", (0,), ("eval.every_steps",)),
    ("eval.every_steps", (0,), ("checkpoint.best",)),
    ("eval.temperature", (0,), ("eval.top_k", "eval.top_p", "eval.min_p")),
    ("advantage.std", ("none",), ("advantage.ddof", "advantage.eps")),
    ("loss.ratio", ("token", "sequence", "sequence_token"), ("loss.clip_difference",)),
    ("loss.ratio", ("detached",), ("loss.clip_low", "loss.clip_dual", "loss.clip_difference")),
    ("loss.ratio", ("difference",), ("loss.clip_low", "loss.clip_high", "loss.clip_dual")),
    ("loss.aggregate", ("sequence", "token", "prompt"), ("loss.constant_length",)),
    ("loss.kl_coef", (0,), ("loss.kl", "loss.kl_corrected", "loss.kl_in")),
    ("loss.kl_coef", (0,), ("model.reference_dtype", "reference.every_updates")),
    ("loss.kl_in", ("reward",), ("loss.kl_corrected",)),
)


def require(ok: bool, message: str) -> None:
    """Raises a UserError with `message`, which says what was expected, what was found and what to do, unless `ok`."""
    if not ok:
        raise UserError(message)


def check_keys(raw: "ConfigDict", config_class: type[C]) -> C:
    """Checks keys, types and allowed values one by one, and builds the frozen config.

    Whole numbers become floats where the key is a float, and `~` is expanded in paths.
    """
    specs, values = key_specs(config_class), flatten(raw.to_dict())
    job, raw_job = specs["job"].default, values.get("job")
    require(raw_job == job, f"job must be {job!r} here; found {raw_job!r}. Pass a --config of that job.")
    for name in REFUSED.keys() & values.keys():
        raise UserError(f"{name} must not be set, because {REFUSED[name]}; found {values[name]!r}. Remove it.")
    for name in sorted(specs.keys() ^ values.keys()):
        problem = "is missing" if name in specs else "is unknown"
        start = "config.default()" if config_class is Config else "config.pretrain_default()"
        raise UserError(f"A config with job={job!r} must have the keys of {start}; {name} {problem}. Start from it.")
    for name, spec in specs.items():
        value, kind = values[name], type(spec.default)
        value = with_floats(value, spec.default)
        topic = name if config_class is Config else "pretrain"
        check_size(name, value, bounded=spec.at_most is not None or spec.below is not None)
        ending = f"; found {value!r}. Set --config.{name}=VALUE; --help={topic} explains it."
        require(type(value) is kind, f"{name} must be of type {kind.__name__}{ending}")
        because = f", because {spec.because}" if spec.because else ""
        require(spec.accepts(value), f"{name} must be {spec.allowed}{because}{ending}")
        require(not isinstance(value, float) or math.isfinite(value), f"{name} must be finite{ending}")
        values[name] = path = os.path.expanduser(value) if spec.path else value
        problem = name_problem(path) if spec.path else ""
        require(not problem, f"{name} must be a path{ending.replace('.', f' ({problem}).', 1)}")
        # So that a run can be resumed from another folder. With one slash, it may be the id of a dataset.
        if name in RESOLVED_PATHS and path not in ("", *TEMPLATES) and (os.path.exists(path) or path.count("/") != 1):
            values[name] = os.path.abspath(path)
    return build(config_class, values)


def check_size(name: str, value: Any, *, bounded: bool) -> None:
    """Raises a UserError if an integer in a value is too large to print or compute with.

    Args:
        name: The key.
        value: The value.
        bounded: Whether the key has an upper bound of its own.
    """
    for number in value if isinstance(value, tuple) else (value,):
        require(
            not isinstance(number, int) or abs(number) < 2**31 or (bounded and abs(number) < 2**63),
            f"{name} must be less than 2**31; found a larger number. Set --config.{name}=VALUE.",
        )


def with_floats(value: Any, default: Any) -> Any:
    """Converts integers to floats where the default is a float or a tuple of floats."""
    if type(value) is tuple and type(default) is tuple and default:
        return tuple(with_floats(element, default[0]) for element in value)
    return float(value) if type(value) is int and type(default) is float else value


def build(config_class: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Builds a config dataclass and its sections from values by dotted name."""
    fields = {}
    for field in dataclasses.fields(config_class):
        name = prefix + field.name
        fields[field.name] = values[name] if name in values else build(type(field.default), values, f"{name}.")
    return config_class(**fields)


def check(raw: "ConfigDict") -> Config:
    """Checks everything about a training config that needs neither the model nor the devices.

    Args:
        raw: The config, as made by `default()`, a config file and flags.

    Returns:
        The same values as a frozen, hashable `Config`.

    Raises:
        UserError: A key is missing, unknown, of the wrong type or outside its allowed values, has no effect, or does
            not fit another key.
    """
    cfg = check_keys(raw, Config)
    needs_file = cfg.task.name == "file" and not cfg.task.path
    require(
        bool(cfg.model.path),
        "model.path must name the base model, a Hugging Face folder, a GGUF file or a hub id; found none. Pass "
        f"--config.model.path=MODEL{' and --config.task.path=FILE, your problems' * needs_file}.",
    )
    check_effects(cfg)
    require(
        not needs_file,
        "task.path must name a file of problems while task.name='file'; found none. Set --config.task.path=FILE.",
    )
    check_reward(cfg)
    require(
        cfg.loss.constant_length > 0 or cfg.loss.aggregate != "constant",
        "loss.constant_length must be at least 1 with loss.aggregate=constant; found 0. Set it, for example to "
        "rollout.max_tokens.",
    )
    check_optimizer(cfg)
    sequences, minibatches = cfg.rollout.prompts * cfg.rollout.samples, cfg.train.minibatches
    require(
        sequences <= MAX_SEQUENCES and sequences * cfg.rollout.max_tokens <= MAX_ROLLOUT_TOKENS,
        f"A rollout may have at most {MAX_SEQUENCES:,} sequences (rollout.prompts * rollout.samples) and "
        f"{MAX_ROLLOUT_TOKENS:,} tokens; found {sequences:,} sequences of rollout.max_tokens={cfg.rollout.max_tokens}. "
        "Lower one of the three.",
    )
    require(
        sequences % minibatches == 0,
        f"train.minibatches must be a divisor of the {sequences} sequences of a rollout (rollout.prompts * "
        f"rollout.samples); found {minibatches}. Change one of the three.",
    )
    return cfg


def check_effects(cfg: Config) -> None:
    """Raises a UserError if keys are set away from their defaults although other keys switch them off (`NO_EFFECT`)."""
    specs, values = key_specs(Config), flatten(dataclasses.asdict(cfg))
    idle = {
        name: switch
        for switch, offs, names in NO_EFFECT
        for name in names
        if as_switch(values[switch]) in offs and values[name] != specs[name].default
    }
    causes = [f"{name}={values[name]!r} has no effect while {idle[name]}={values[idle[name]]!r}" for name in idle]
    resets = [format_as_flag(name, specs[name].default) for name in idle]
    switches = " and ".join(dict.fromkeys(idle.values()))
    require(not idle, f"{'; '.join(causes)}. Pass {' '.join(resets)} to restore the default, or change {switches}.")


def as_switch(value: Any) -> Any:
    """Returns the value of a key in the form that `NO_EFFECT` uses."""
    return USERS_FUNCTION if isinstance(value, str) and ":" in value else value


def check_reward(cfg: Config) -> None:
    """Checks that each reward part has a weight, a label of its own and the settings that it reads."""
    parts, weights = cfg.reward.parts, cfg.reward.weights
    require(
        len(parts) == len(weights),
        f"reward.weights must have one number for each of the {len(parts)} reward.parts; found {len(weights)}. Set "
        f"{format_as_flag('reward.weights', (1.0,) * len(parts))} or other weights.",
    )
    labels = [function_label(name) for name in parts]
    functions = [label for name, label in zip(parts, labels, strict=True) if ":" in name]
    require(
        len(set(labels)) == len(labels)
        and not set(labels) & set(RESERVED_LABELS)
        and all(label.isidentifier() for label in functions),
        "reward.parts must have names that metrics can use: distinct Python identifiers other than "
        f"{', '.join(RESERVED_LABELS)}; found {', '.join(map(repr, labels))}. Rename the function.",
    )
    scores, best = [f"eval/{label}" for label in labels], cfg.checkpoint.best
    require(
        best in ("", *scores),
        f"checkpoint.best must be one of {', '.join(scores)}, or '' for none; found {best!r}. Set one of them.",
    )
    require(
        not best or cfg.eval.every_steps % cfg.checkpoint.every_steps == 0,
        "eval.every_steps must be a multiple of checkpoint.every_steps if checkpoint.best is set, so that every "
        f"evaluated policy is saved; found {cfg.eval.every_steps} and {cfg.checkpoint.every_steps}. Change one.",
    )

    reads_cache = cfg.rollout.overlong == "soft" or "length" in parts
    cache, longest = cfg.rollout.overlong_cache, cfg.rollout.max_tokens
    require(
        0 < cache <= longest if reads_cache else cache == 0,
        f"rollout.overlong_cache must be 1 to rollout.max_tokens={longest} with rollout.overlong=soft or the reward "
        f"part 'length', and 0 otherwise; found {cache}. Change one of them.",
    )
    idle = {
        "reward.language": ("language" in parts, "the part 'language'"),
        "reward.format_empty": ("format" in parts, "the part 'format'"),
        "reward.deadline": (bool(functions), "a function (module:function or path/file.py:function)"),
    }
    specs, values = key_specs(Config), flatten(dataclasses.asdict(cfg))
    for name, (used, user) in idle.items():
        default = format_as_flag(name, specs[name].default)
        require(
            used or values[name] == specs[name].default,
            f"{name}={values[name]!r} has no effect without {user} in reward.parts. Add it, or pass {default} to "
            "restore the default.",
        )


def check_optimizer(cfg: Config) -> None:
    """Checks the learning-rate schedule against the length of the run, and the decay of a bfloat16 moment."""
    optim, steps = cfg.optim, cfg.optim.decay_steps
    if optim.schedule != "constant":
        # The schedule has a length of its own: total_steps may change on a resume, and learning rates must not.
        require(
            steps > optim.warmup_steps,
            f"optim.decay_steps must be more than optim.warmup_steps={optim.warmup_steps} while optim.schedule="
            f"{optim.schedule!r}; found {steps}. Set --config.optim.decay_steps to total_steps or more.",
        )
        require(
            optim.end_lr_fraction > 0 or cfg.total_steps <= steps,
            f"total_steps must be at most optim.decay_steps={steps}, after which the learning rate is 0; found "
            f"{cfg.total_steps}. Lower it, or start a run with a larger optim.decay_steps or optim.end_lr_fraction.",
        )
    name = "b2" if optim.name == "lion" else "b1"
    decay = getattr(optim, name)
    require(
        optim.mu_dtype == "float32" or decay <= 0.99,
        f"optim.{name} must be at most 0.99 with optim.mu_dtype='bfloat16', whose 8 bits cannot hold smaller changes "
        f"of the moment; found {decay}. Lower --config.optim.{name}, or use optim.mu_dtype=float32.",
    )


def check_model(cfg: Config, model_cfg: Any) -> None:
    """Checks that prompt and completion fit into the model's positions.

    Raises:
        UserError: They do not.
    """
    prompt, completion, positions = cfg.rollout.max_prompt_tokens, cfg.rollout.max_tokens, model_cfg.max_positions
    require(
        prompt + completion <= positions,
        f"rollout.max_prompt_tokens + rollout.max_tokens must be at most the model's {positions} positions "
        f"(max_position_embeddings); found {prompt} + {completion}. Lower one of them.",
    )


def check_pretrain(raw: "ConfigDict") -> PretrainConfig:
    """Checks a pretraining config, as `check` does a training config.

    Raises:
        UserError: See `check`.
    """
    cfg = check_keys(raw, PretrainConfig)
    model, warmup = cfg.model, cfg.optim.warmup_steps
    require(
        cfg.total_steps > warmup,
        f"total_steps must be more than optim.warmup_steps={warmup}; found {cfg.total_steps}. Raise total_steps.",
    )
    require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads must be a multiple of model.num_kv_heads={model.num_kv_heads}; found {model.num_heads}. "
        "Change one of them.",
    )
    require(model.head_dim % 2 == 0, f"model.head_dim must be even; found {model.head_dim}. Set another one.")
    require(
        cfg.batch.row_tokens <= model.max_positions,
        f"batch.row_tokens must be at most model.max_positions={model.max_positions}; found {cfg.batch.row_tokens}. "
        "Lower it.",
    )
    return cfg
