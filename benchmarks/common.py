"""What the benchmarks of rollouts, learning and whole steps share: flags, the model, random work, the JSON line."""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from limits import check_measurable

from grpo_jax.config import check, default
from grpo_jax.errors import UserError
from grpo_jax.config.flags import OneLineParser
from grpo_jax.learn.optimizer import init_train_state, make_optimizer
from grpo_jax.learn.update import make_update
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import init_params
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.rollout.sampler import pad_prompts
from grpo_jax.text.problem import Prompts
from grpo_jax.types import TrainState
from grpo_jax.weights.model_io import load
from grpo_jax.weights.source import find_model, read_model_config

NUMBERS = {  # flag: its default, the least that it may be, and what it is
    "prompts": (4, 1, "distinct prompts"),
    "samples": (8, 1, "completions of each"),
    "prompt_tokens": (128, 1, "tokens of every prompt"),
    "new_tokens": (64, 2, "tokens of the longest completion"),
    "repeats": (3, 1, "rounds after the one that compiles"),
    "seed": (0, 0, "of prompts, lengths, random weights and draws"),
}
LEARNING = NUMBERS | {
    "samples": (8, 2, "completions of each"),
    "micro_tokens": (4096, 1, "train.micro_tokens: what is computed on at a time"),
    "chunk_tokens": (512, 1, "train.chunk_tokens: of those, how many have logits at a time"),
}


def make_parser(doc: str, examples: str, numbers: dict[str, tuple], of_dtype: str) -> OneLineParser:
    """The flags that all share, and whole numbers as in NUMBERS."""
    parser = OneLineParser(
        description=doc,
        epilog=f"example:\n{examples}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="FOLDER", required=True, help="what model.path may be")
    parser.add_argument("--random", action="store_true", help="random weights; of FOLDER only config.json is read")
    for name, (value, _, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{what}; default: {value}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=of_dtype)
    parser.add_argument(
        "--lengths",
        choices=("fixed", "lognormal"),
        default="fixed",
        help="all new_tokens long, or drawn: median 32, sigma 1, cut to 1..new_tokens",
    )
    return parser


def check_numbers(flags, numbers: dict[str, tuple]) -> None:
    """Refuses what is less than the least.

    Raises:
      UserError: one of them is.
    """
    for name, (_, least, _) in numbers.items():
        if getattr(flags, name) < least:
            raise UserError(f"expected --{name} of {least} or more; found {getattr(flags, name)}")


def read_learning_flags(doc: str, examples: str, argv: Sequence[str]):
    """The command line of a benchmark that learns.

    Raises:
      UserError: a value that no update can have.
    """
    parser = make_parser(
        doc, examples, LEARNING, "of products and activations; master weights and the optimizer's state are float32"
    )
    parser.add_argument(
        "--remat",
        choices=("layers", "matmuls", "none"),
        default="layers",
        help="train.remat: what is computed again backwards; default: layers",
    )
    parser.add_argument(
        "--kl_coef",
        type=float,
        default=0.001,
        metavar="X",
        help="loss.kl_coef; 0: no reference is scored; default: 0.001",
    )
    flags = parser.parse_args(argv)
    check_numbers(flags, LEARNING)
    if not 0 <= flags.kl_coef < math.inf:
        raise UserError(f"expected --kl_coef of 0 or more; found {flags.kl_coef}")
    return flags


def load_model(flags, param_dtype: str) -> tuple[ModelConfig, dict]:
    """The model, which computes in --dtype, and its parameters in another.

    Raises:
      UserError: there is none, or none that the benchmarks can measure with these flags.
    """
    model_cfg = read_model_config(flags.model if flags.random else find_model(flags.model))
    model_cfg = replace(model_cfg, compute_dtype=flags.dtype)
    check_measurable(model_cfg)
    if flags.prompt_tokens + flags.new_tokens > model_cfg.max_positions:
        raise UserError(
            f"expected prompt_tokens + new_tokens of at most {model_cfg.max_positions} positions; "
            f"found {flags.prompt_tokens} + {flags.new_tokens}"
        )
    if not flags.random:
        return model_cfg, load(flags.model, param_dtype=param_dtype)[1]
    cast = lambda key: jax.tree.map(lambda leaf: leaf.astype(param_dtype), init_params(model_cfg, key))
    return model_cfg, jax.block_until_ready(jax.jit(cast)(jax.random.key(flags.seed)))


def draw_lengths(flags) -> np.ndarray:
    """The tokens of every sequence, [B, G]."""
    shape = flags.prompts, flags.samples
    if flags.lengths == "fixed":
        return np.full(shape, flags.new_tokens)
    drawn = np.random.default_rng(flags.seed).lognormal(math.log(32), 1, shape)
    return np.clip(np.round(drawn), 1, flags.new_tokens).astype(int)


def draw_prompts(flags, model_cfg: ModelConfig) -> Prompts:
    """Prompts of random tokens."""
    shape = flags.prompts, flags.prompt_tokens
    return pad_prompts(np.random.default_rng(flags.seed).integers(model_cfg.sampleable_vocab_size, size=shape).tolist())


class Learner(NamedTuple):
    """What learns, on one device."""

    model_cfg: Any  # as training checks and freezes it
    model: ModelConfig
    mesh: Mesh
    state: TrainState
    reference: Any  # parameters; None where kl_coef is 0
    update: Callable


def make_learner(flags) -> Learner:
    """A policy before its first update, made as training makes it; the mesh is to be set by the caller.

    Raises:
      UserError: as load_model.
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
    model, params = load_model(flags, cfg.model.param_dtype)
    model, mesh = replace(model, remat=flags.remat), make_mesh(devices=jax.devices()[:1])
    reference = None
    if flags.kl_coef:
        reference = jax.tree.map(lambda x: jnp.array(x, cfg.model.reference_dtype), params)
    optimizer = make_optimizer(cfg.optim)
    state = init_train_state(mesh, params, optimizer)
    return Learner(cfg, model, mesh, state, reference, make_update(model, cfg, mesh, state.params, optimizer))


def about(flags, params) -> dict:
    """The fields that say what ran on what."""
    given = {name: value for name, value in vars(flags).items() if name not in ("model", "compare")}
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "model": Path(flags.model).resolve().name,
        "parameters": count,
        **given,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of every time over the rounds after the first."""
    return {name: statistics.median(times[name] for times in rounds[1:]) for name in rounds[0]}


def peak_rss_gib() -> float:
    """The most main memory that the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def say(began: float, what: str) -> None:
    """A line of progress, on stderr."""
    print(f"{time.perf_counter() - began:7.1f} s  {what}", file=sys.stderr, flush=True)


def report(began: float, result: dict) -> None:
    """The JSON line, with the seconds since the beginning."""
    result["seconds"] = time.perf_counter() - began
    print(json.dumps({key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in result.items()}))
