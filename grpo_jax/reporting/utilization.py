"""Estimates the model FLOPs utilization (MFU) of a run: the fraction of the devices' peak that its matmuls reach."""

import math

from grpo_jax.errors import UserError
from grpo_jax.planning.models import read_architecture
from grpo_jax.planning.needs import attended_keys, flops_per_key, matrices
from grpo_jax.planning.topology import CHIPS, parse_topology
from grpo_jax.reporting.runs import RunFiles
from grpo_jax.reporting.summary import mean, values_of


def forward_flops(model: str, length: int) -> float:
    """Returns the FLOPs of the forward pass of a completion, without those of its prompt.

    Args:
        model: The model, as in `model.path`.
        length: Tokens of the completion.

    Raises:
        UserError: The architecture of the model is not known on this machine.
    """
    model_cfg = read_architecture(model)
    weights = matrices(model_cfg, tensor=1)
    attention = attended_keys(model_cfg, 0, length) * flops_per_key(model_cfg, tensor=1)
    return 2 * (weights.layers + weights.head) * length + attention


def utilization(run: RunFiles, seconds: dict[str, float], topology: str) -> dict[str, float]:
    """Returns the MFU of the phases that consist of matmuls, and of the whole update as `step`.

    It counts the FLOPs that the model requires for completions of the run's mean length: one forward pass each for
    sampling and scoring a completion, and three for learning from it. Prompts, padding and recomputation are not
    counted.

    Args:
        run: The run.
        seconds: Mean seconds of each phase per update, as `time_shares` returns them.
        topology: The devices that the run used, such as `h100:8`.

    Raises:
        UserError: The peak of such devices is not known.
    """
    kind, sizes = parse_topology(topology)
    if kind not in CHIPS:
        raise UserError(
            f"--topology must name devices whose peak is known, {', '.join(CHIPS)}; found {topology!r}. Leave it out."
        )
    config = run.config
    length = mean(values_of(run.updates, "rollout/length_mean")) or 0
    samples = config["rollout.prompts"] * config["rollout.samples"]
    forward = samples * forward_flops(config["model.path"], round(length))
    of_rollout = forward / (config["train.minibatches"] * config["train.epochs"])  # a rollout feeds this many updates
    flops = {"rollout": of_rollout, "update": 3 * forward / config["train.minibatches"]}
    if config["loss.kl_coef"]:
        flops["score"] = of_rollout
    flops["step"] = sum(flops.values())
    peak = CHIPS[kind].flops * math.prod(sizes)
    return {name: count / (seconds[name] * peak) for name, count in flops.items() if seconds.get(name)}
