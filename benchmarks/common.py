"""Shared parts of the rollout, learning and step benchmarks: flags, the model, random data and the JSON line."""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from limits import check_measurable

from grpo_jax.config import Config, check, default
from grpo_jax.config.flags import OneLineParser
from grpo_jax.errors import UserError
from grpo_jax.learn.optimizer import init_train_state, make_optimizer
from grpo_jax.learn.update import make_update
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import init_params
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.rollout.sampler import pad_prompts
from grpo_jax.text.problem import Prompts
from grpo_jax.types import TrainState
from grpo_jax.weights.reading import load
from grpo_jax.weights.source import find_model, read_model_config

# Integer flags: the default, the minimum and the help text.
IntegerFlags = dict[str, tuple[int, int, str]]

ROLLOUT_FLAGS: IntegerFlags = {
    "prompts": (4, 1, "number of distinct prompts"),
    "samples": (8, 1, "completions per prompt"),
    "prompt_tokens": (128, 1, "length of each prompt in tokens"),
    "new_tokens": (64, 2, "length of the longest completion in tokens"),
    "repeats": (3, 1, "rounds to time after the first one, which compiles"),
    "seed": (0, 0, "seed of prompts, lengths, random weights and draws"),
}
LEARNING_FLAGS: IntegerFlags = ROLLOUT_FLAGS | {
    "samples": (8, 2, "completions per prompt"),
    "micro_tokens": (4096, 1, "train.micro_tokens: size of a micro-batch in tokens"),
    "chunk_tokens": (512, 1, "train.chunk_tokens: tokens of a micro-batch that go through the head at once"),
}


def make_benchmark_parser(doc: str, examples: str, integers: IntegerFlags, dtype_help: str) -> OneLineParser:
    """Builds a parser with the flags that the benchmarks share."""
    parser = OneLineParser(
        description=doc,
        epilog=f"example:\n{examples}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="FOLDER", required=True, help="the model, given like model.path")
    parser.add_argument("--random", action="store_true", help="use random weights; only FOLDER/config.json is read")
    for name, (value, _, meaning) in integers.items():
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{meaning}; default: {value}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    parser.add_argument(
        "--lengths",
        choices=("fixed", "lognormal"),
        default="fixed",
        help="lengths of completions: all new_tokens, or lognormal (median 32, sigma 1) clipped to 1..new_tokens",
    )
    return parser


def check_integers(flags: Namespace, integers: IntegerFlags) -> None:
    """Raises a UserError if an integer flag is below its minimum."""
    for name, (_, minimum, _) in integers.items():
        if getattr(flags, name) < minimum:
            raise UserError(f"--{name} must be at least {minimum}; found {getattr(flags, name)}. Raise it.")


def read_learning_flags(doc: str, examples: str, argv: Sequence[str]) -> Namespace:
    """Parses the command line of a benchmark that updates the policy.

    Raises:
        UserError: A flag is unknown or has a value that no update can have.
    """
    parser = make_benchmark_parser(
        doc, examples, LEARNING_FLAGS, "dtype of activations and matmuls; weights and optimizer state are float32"
    )
    parser.add_argument(
        "--remat",
        choices=("layers", "matmuls", "none"),
        default="layers",
        help="train.remat: what is rematerialized in the backward pass; default: layers",
    )
    parser.add_argument(
        "--kl_coef",
        type=float,
        default=0.001,
        metavar="X",
        help="loss.kl_coef; with 0 there is no reference model to score; default: 0.001",
    )
    flags = parser.parse_args(argv)
    check_integers(flags, LEARNING_FLAGS)
    if not 0 <= flags.kl_coef < math.inf:
        raise UserError(f"--kl_coef must be a finite number of 0 or more; found {flags.kl_coef}. Change it.")
    return flags


def check_positions(flags: Namespace, model_cfg: ModelConfig) -> None:
    """Raises a UserError if a prompt and its completion exceed the model's positions."""
    if flags.prompt_tokens + flags.new_tokens > model_cfg.max_positions:
        raise UserError(
            f"--prompt_tokens plus --new_tokens may be at most {model_cfg.max_positions}, the model's positions; found "
            f"{flags.prompt_tokens} + {flags.new_tokens}. Lower one of them."
        )


def load_model(flags: Namespace, param_dtype: str) -> tuple[ModelConfig, dict]:
    """Loads the model with --dtype as its compute dtype, and its parameters in `param_dtype`.

    Raises:
        UserError: There is no such model, or the benchmarks cannot measure it with these flags.
    """
    model_cfg = read_model_config(flags.model if flags.random else find_model(flags.model))
    model_cfg = replace(model_cfg, compute_dtype=flags.dtype)
    check_measurable(model_cfg)
    check_positions(flags, model_cfg)
    if not flags.random:
        return model_cfg, load(flags.model, param_dtype=param_dtype)[1]

    def random_params(key):
        return jax.tree.map(lambda leaf: leaf.astype(param_dtype), init_params(model_cfg, key))

    return model_cfg, jax.block_until_ready(jax.jit(random_params)(jax.random.key(flags.seed)))


def draw_lengths(flags: Namespace) -> np.ndarray:
    """Returns the length of each completion in tokens, [B, G]."""
    shape = flags.prompts, flags.samples
    if flags.lengths == "fixed":
        return np.full(shape, flags.new_tokens)
    lengths = np.random.default_rng(flags.seed).lognormal(math.log(32), 1, shape)
    return np.clip(np.round(lengths), 1, flags.new_tokens).astype(int)


def draw_prompts(flags: Namespace, model_cfg: ModelConfig) -> Prompts:
    """Returns prompts of random tokens."""
    shape = flags.prompts, flags.prompt_tokens
    return pad_prompts(np.random.default_rng(flags.seed).integers(model_cfg.sampleable_vocab_size, size=shape).tolist())


class Learner(NamedTuple):
    """A policy and what updates it, on one device."""

    cfg: Config
    model_cfg: ModelConfig
    mesh: Mesh
    state: TrainState
    reference: Any  # parameters; None if kl_coef is 0
    update: Callable


def make_learner(flags: Namespace) -> Learner:
    """Builds a policy before its first update, as a training run does. The caller has to set the mesh.

    Raises:
        UserError: As in `load_model`.
    """
    raw = default()
    raw.update(
        {
            "model": {"path": flags.model, "compute_dtype": flags.dtype},
            "rollout": {
                "prompts": flags.prompts,
                "samples": flags.samples,
                "max_prompt_tokens": flags.prompt_tokens,
                "max_tokens": flags.new_tokens,
            },
            "train": {"micro_tokens": flags.micro_tokens, "chunk_tokens": flags.chunk_tokens, "remat": flags.remat},
            "loss": {"kl_coef": flags.kl_coef},
        }
    )
    cfg = check(raw)
    model_cfg, params = load_model(flags, cfg.model.param_dtype)
    model_cfg, mesh = replace(model_cfg, remat=flags.remat), make_mesh(devices=jax.devices()[:1])
    reference = None
    if flags.kl_coef:
        reference = jax.tree.map(lambda x: jnp.array(x, cfg.model.reference_dtype), params)
    optimizer = make_optimizer(cfg.optim)
    state = init_train_state(mesh, params, optimizer)
    return Learner(cfg, model_cfg, mesh, state, reference, make_update(model_cfg, cfg, mesh, state.params, optimizer))


def describe_setup(flags: Namespace, params) -> dict[str, Any]:
    """Returns the JSON fields that describe the model, the flags and the machine."""
    flag_values = {name: value for name, value in vars(flags).items() if name not in ("model", "compare")}
    return {
        "model": Path(flags.model).resolve().name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **flag_values,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Returns the median of each time over all rounds but the first."""
    return {name: statistics.median(times[name] for times in rounds[1:]) for name in rounds[0]}


def peak_rss_gib() -> float:
    """Returns the peak resident memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def print_progress(start: float, text: str) -> None:
    """Prints a line with the seconds since `start` to stderr."""
    print(f"{time.perf_counter() - start:7.1f} s  {text}", file=sys.stderr, flush=True)


def print_result(start: float, result: dict[str, Any]) -> None:
    """Prints the JSON line, with the seconds since `start` added and floats rounded to 4 digits."""
    result["seconds"] = time.perf_counter() - start
    print(json.dumps({key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in result.items()}))
