"""Detects when something is wrong with a run and warns of it once, with what to try.

`SYMPTOMS` is the table of all symptoms, and the only place where thresholds are stated. docs/reading-a-run.md explains
each row. A warning never ends a run.
"""

import operator
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.learn.update import make_experience
from grpo_jax.parallel.mesh import gather_to_host
from grpo_jax.rewards.parts import accuracy_part
from grpo_jax.rewards.verify import accuracy
from grpo_jax.rollout.sampler import generate_rollout, place_for_rollout
from grpo_jax.run.context import RunContext
from grpo_jax.run.metrics import read_json_lines, read_metrics
from grpo_jax.run.stages import rehome_key, start_scoring
from grpo_jax.tasks.streams import draw_problems
from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import encode_prompts

HISTORY = 100  # number of updates and of rollouts that are remembered
PROBED_PROBLEMS, PROBED_PROMPTS, PROBED_TOKENS = 64, 4, 16  # what is looked at before the first update
NEARLY_GREEDY = 1e-3  # a temperature, so that the program of the rollouts can be used, which greedy decoding cannot


class History(NamedTuple):
    """The metrics and facts that symptoms are measured from."""

    cfg: Config
    is_mixture: bool  # whether the model has experts
    facts: dict[str, float]  # what is measured once, at the start of the run
    updates: deque[dict[str, Any]]  # the metrics of the last updates; a value that is not finite may be None
    rollouts: deque[dict[str, Any]]  # the metrics of those that started a rollout

    def last(self, name: str, count: int, lines: Sequence[dict] | None = None) -> list[float]:
        """Returns a metric's last `count` values over the updates, or other lines; [] if there are not as many."""
        lines = self.updates if lines is None else lines
        values = [line.get(name) for line in list(lines)[-count:]]
        return values if len(values) == count and None not in values else []

    def last_rollouts(self, name: str, count: int) -> list[float]:
        """Returns a metric's last `count` values over rollouts, or [] if there are not as many."""
        return self.last(name, count, self.rollouts)

    def later_updates(self) -> list[dict]:
        """Returns the lines of updates with a signal whose policy is no longer the one that sampled the rollout."""
        return [line for line in self.updates if not line.get("time/rollout_s") and not line.get("optim/no_signal")]

    def is_solved(self, row: "Symptom") -> bool:
        """Returns whether the last updates had nearly the highest reward, so that nothing is left to learn."""
        return min(self.last("reward/mean", row.span), default=0.0) >= row.given * self.highest_reward()

    def highest_reward(self) -> float:
        """Returns the highest total reward if every part is at most 1."""
        return sum(max(weight, 0.0) for weight in self.cfg.reward.weights)


class Symptom(NamedTuple):
    """A row of the table."""

    name: str
    span: int  # number of updates or rollouts that are looked at; 0 if it is measured once, at the start of the run
    comparison: Callable[[float, float], bool]  # of the measured value with the threshold
    threshold: float
    measure: Callable[[History, "Symptom"], float | None]  # None if the value is not known or does not matter
    text: str  # with {value} and {span}
    given: float = 0.0  # threshold of a second condition, under which the value matters


def equal_groups(history: History, row: Symptom) -> float | None:
    """Returns the smallest fraction of groups with equal rewards in a rollout, unless the task is solved."""
    return (
        None
        if history.is_solved(row)
        else min(history.last_rollouts("groups/zero_variance_frac", row.span), default=None)
    )


def best_format(history: History, row: Symptom) -> float | None:
    """Returns the largest fraction of well-formed completions in a rollout."""
    return max(history.last_rollouts("reward/format", row.span), default=None)


def truncated(history: History, row: Symptom) -> float | None:
    """Returns the fraction of completions that were cut off in the last rollout."""
    return max(history.last_rollouts("rollout/truncated_frac", row.span), default=None)


def entropy_if_failing(history: History, row: Symptom) -> float | None:
    """Returns the entropy of the policy if its reward is low; once the task is learned, a low entropy is expected."""
    if not fmean(history.last("reward/mean", row.span) or [np.inf]) < row.given * history.highest_reward():
        return None
    return median(history.last("policy/entropy", row.span) or [np.inf])


def entropy(history: History, row: Symptom) -> float | None:
    """Returns the median entropy of the policy."""
    return median(history.last("policy/entropy", row.span) or [0.0])


def kl_from_reference(history: History, row: Symptom) -> float | None:
    """Returns the median KL divergence: a single token that the reference finds impossible makes a spike."""
    return median(history.last("policy/kl_ref", row.span) or [0.0])


def dense_drift(history: History, row: Symptom) -> float | None:
    """Returns the divergence between sampler and trainer of a dense model."""
    return None if history.is_mixture else max(history.last("policy/kl_sampler", row.span), default=None)


def mixture_drift(history: History, row: Symptom) -> float | None:
    """Returns the divergence between sampler and trainer of a mixture of experts, which may choose other experts."""
    return max(history.last("policy/kl_sampler", row.span), default=None) if history.is_mixture else None


def largest_clip_frac(history: History, row: Symptom) -> float | None:
    """Returns the largest clip fraction of all later updates of rollouts, unless the bounds hardly restrict."""
    if history.cfg.loss.clip_high >= row.given or len(history.rollouts) < row.span:
        return None
    lines = history.later_updates()
    return max(history.last("policy/clip_frac", len(lines), lines), default=None) if len(lines) >= row.span else None


def token_clip_frac(history: History, row: Symptom) -> float | None:
    """Returns the median clip fraction of later updates of rollouts, unless whole completions are clipped."""
    if history.cfg.loss.ratio.startswith("sequence"):
        return None
    return median(history.last("policy/clip_frac", row.span, history.later_updates()) or [0.0])


def largest_gradient(history: History, row: Symptom) -> float | None:
    """Returns the largest gradient norm, 0 for an update without a signal; None if the task is solved."""
    if history.is_solved(row):
        return None
    norms, idle = (history.last(f"optim/{name}", row.span) for name in ("grad_norm", "no_signal"))
    return max((norm * (not none) for norm, none in zip(norms, idle, strict=False)), default=None)


def changed_parameters(history: History, row: Symptom) -> float | None:
    """Returns the largest fraction of parameters that an update changed, of those that had a finite gradient."""
    idle = ("optim/no_signal", "optim/skipped")
    lines = [line for line in history.updates if line.get("optim/grad_norm") and not any(map(line.get, idle))]
    return max(history.last("optim/changed_frac", row.span, lines), default=None)


def growth_without_reward(history: History, row: Symptom) -> float | None:
    """Returns the factor by which completions have become longer, if the reward has not risen."""
    rewards, lengths = history.last("reward/mean", row.span), history.last("rollout/length_mean", row.span)
    tenth = max(1, row.span // 10)
    if not rewards or fmean(rewards[-tenth:]) - fmean(rewards[:tenth]) > row.given * history.highest_reward():
        return None
    return fmean(lengths[-tenth:]) / fmean(lengths[:tenth]) if lengths else None


def relative_speed(history: History, row: Symptom) -> float | None:
    """Returns the highest speed of sampling in the last rollouts, relative to the median of the rollouts before them.

    The highest, because other programs may slow down most rollouts of a small model for a while.
    """
    speeds = [speed for line in history.rollouts if (speed := line.get("rollout/tokens_per_s"))]
    if len(speeds) < 2 * row.span:
        return None
    return max(speeds[-row.span :]) / median(speeds[: -row.span])


def fact(name: str) -> Callable[[History, Symptom], float | None]:
    """Returns a measure that looks up a fact from the start of the run."""
    return lambda history, row: history.facts.get(name)


SYMPTOMS = (
    Symptom(
        "refused_answers",
        *(0, operator.gt, 0.0, fact("refused_answers")),
        "The accuracy reward refuses {value:.0%} of the expected answers themselves, so no completion of these "
        "problems can be right: make the task return answers as docs/problems.md describes them, or grade with your "
        "own function.",
    ),
    Symptom(
        "greedy_perplexity",
        *(0, operator.gt, 4.0, fact("greedy_perplexity")),
        "Before the first update, the model finds its most likely text improbable (perplexity {value:.1f}), so the "
        "weights, the tokenizer or prompt.template are probably wrong: read samples/eval-000000.jsonl, and compare it "
        "with the output of another tool for this model.",
    ),
    Symptom(
        "improbable_samples",
        *(0, operator.gt, 4.5, fact("sample_surprise")),
        "At the first update, the policy finds its own samples improbable ({value:.1f} nats per token), so the "
        "weights, the tokenizer or prompt.template are probably wrong: read samples/train-000001.jsonl, and try a "
        "lower rollout.temperature if the text is nearly right.",
    ),
    Symptom(
        "equal_groups",
        *(3, operator.ge, 1.0, equal_groups),
        "In {span} rollouts in a row, all completions of each group had the same reward, so there was nothing to "
        "learn: try easier or harder problems, more rollout.samples, or another prompt.template.",
        given=0.99,
    ),
    Symptom(
        "format_never_met",
        *(3, operator.le, 0.0, best_format),
        "No completion of {span} rollouts in a row had the required format: read some in samples/, and try solved "
        "examples (prompt.examples), a larger rollout.max_tokens, or reward.parts without format.",
    ),
    Symptom(
        "truncated",
        *(1, operator.gt, 0.1, truncated),
        "{value:.0%} of the completions were cut off before they ended: raise rollout.max_tokens, or make sure that "
        "rollout.stop_strings and the model's EOS end them.",
    ),
    Symptom(
        "low_entropy",
        *(3, operator.lt, 0.05, entropy_if_failing),
        "The policy's entropy is only {value:.2g} nats although the reward is low, so the completions of a group "
        "hardly differ: raise rollout.temperature if it was so from the start; otherwise start again from an earlier "
        "checkpoint with a lower optim.lr, a higher loss.clip_high, or an entropy bonus (loss.entropy_coef).",
        given=0.5,
    ),
    Symptom(
        "high_entropy",
        *(3, operator.gt, 4.5, entropy),
        "The policy's entropy is {value:.1f} nats, so it writes almost at random: lower loss.entropy_coef, optim.lr or "
        "rollout.temperature, or check the weights if the entropy was high from the start.",
    ),
    Symptom(
        "high_kl",
        *(5, operator.gt, 1.0, kl_from_reference),
        "The KL divergence from the reference is {value:.1f} nats per token, so the policy is far from the base model: "
        "read its completions in samples/, and lower optim.lr or raise loss.kl_coef.",
    ),
    Symptom(
        "sampler_drift",
        *(1, operator.gt, 1e-3, dense_drift),
        "Sampler and trainer disagree about the same tokens (KL {value:.2g} nats per token): set "
        "model.compute_dtype=float32 or model.logit_dtype=float32, or report a bug if they already are.",
    ),
    Symptom(
        "sampler_drift_mixture",
        *(1, operator.gt, 1e-1, mixture_drift),
        "Sampler and trainer disagree about the same tokens (KL {value:.2g} nats per token), more than different "
        "choices of experts explain: set model.compute_dtype=float32, or report a bug if it already is.",
    ),
    Symptom(
        "never_clipped",
        *(3, operator.le, 0.0, largest_clip_frac),
        "No token was clipped although each rollout feeds several updates, so the policy hardly changes between them: "
        "raise optim.lr, or use fewer train.minibatches and train.epochs.",
        given=1.0,
    ),
    Symptom(
        "clipped",
        *(3, operator.gt, 0.3, token_clip_frac),
        "{value:.0%} of the tokens are clipped in later updates of a rollout, so much of the signal is lost: lower "
        "optim.lr, or use fewer train.minibatches and train.epochs.",
    ),
    Symptom(
        "zero_gradient",
        *(5, operator.le, 0.0, largest_gradient),
        "The gradient of {span} updates in a row was exactly 0, so the policy does not change: try easier or harder "
        "problems or more rollout.samples, and check whether groups.equal or rollout.overlong leaves out everything.",
        given=0.99,
    ),
    Symptom(
        "unchanged_parameters",
        *(3, operator.lt, 0.1, changed_parameters),
        "{span} updates in a row changed at most {value:.2%} of the parameters, because the changes are smaller than "
        "the rounding of the parameters: set model.param_dtype=float32, or raise optim.lr.",
    ),
    Symptom(
        "longer_not_better",
        *(50, operator.ge, 1.5, growth_without_reward),
        "Over {span} updates, completions became {value:.1f} times as long, but the reward did not rise: read the "
        "longest ones in samples/, and try rollout.overlong=soft, loss.aggregate=token or a lower optim.lr.",
        given=0.02,
    ),
    Symptom(
        "slower",
        *(20, operator.lt, 0.5, relative_speed),
        "Each of the last {span} rollouts sampled at {value:.0%} of the earlier speed or less: check whether another "
        "program uses the devices, and whether a few long completions hold up each rollout (rollout/length_mean).",
    ),
)


class Diagnosis:
    """Compares a run with the table of symptoms while it trains, on process 0 only."""

    def __init__(self, cfg: Config, context: RunContext, workdir: Path):
        """Reads metrics.jsonl and warnings.jsonl of the run so far, which must not go beyond its checkpoint."""
        self.said = set()
        is_mixture = context.model_cfg.experts is not None
        self.history = History(cfg, is_mixture, {}, deque(maxlen=HISTORY), deque(maxlen=HISTORY))
        if jax.process_index() == 0:
            self.said |= {warning.get("name") for warning in read_json_lines(workdir / "warnings.jsonl")}
            for line in read_metrics(workdir):
                self.remember(line)

    def remember(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics of an update to the history; other lines are of evaluations."""
        if "optim/lr" not in metrics:
            return
        self.history.updates.append(metrics)
        if metrics.get("time/rollout_s"):
            self.history.rollouts.append(metrics)

    def observe(self, step: int, metrics: dict[str, float]) -> list[dict[str, Any]]:
        """Takes the metrics of an update, or facts of the start of the run, and returns new lines of warnings.jsonl."""
        if jax.process_index() != 0:
            return []
        self.remember(metrics)
        self.history.facts.update({} if "optim/lr" in metrics else metrics)
        warnings = []
        for row in SYMPTOMS:
            value = None if row.name in self.said else row.measure(self.history, row)
            if value is None or not row.comparison(value, row.threshold):
                continue
            self.said.add(row.name)
            text = row.text.format(value=value, span=row.span)
            warnings.append({"step": step, "name": row.name, "text": text})
        return warnings


def initial_facts(cfg: Config, context: RunContext, task: Task, params, reference, key) -> dict[str, float]:
    """Measures facts about a run that its metrics do not show, before the first update.

    Args:
        cfg: The run's config.
        context: The run's context.
        task: The run's task, whose first problems are used.
        params: The policy, which is still the base model.
        reference: The reference; None if none is kept.
        key: A random key; it hardly matters at a temperature this low.

    Returns:
        `refused_answers`, the fraction of expected answers that the part `accuracy` refuses as answers of a completion,
        if it is a part of the reward; and `greedy_perplexity`, the perplexity of the first tokens of nearly greedy
        completions.
    """
    problems = draw_problems(task, range(PROBED_PROBLEMS), seed=cfg.seed, split="train")
    facts = {"greedy_perplexity": greedy_perplexity(cfg, context, params, reference, problems, key)}
    if accuracy_part in context.grader.parts.values():
        answers = [problem.answer for problem in problems]
        texts = [f"<answer>{answer}</answer>" for answer in answers]
        facts["refused_answers"] = 1 - float(accuracy(texts, answers).mean())
    return facts


def greedy_perplexity(cfg: Config, context: RunContext, params, reference, problems: Sequence[Problem], key) -> float:
    """Returns the perplexity of nearly greedy completions, with the programs of rollouts, to compile no others.

    See `initial_facts` for the arguments.
    """
    count = min(PROBED_PROMPTS, cfg.rollout.prompts)
    prompts = encode_prompts(context.prompt_format, problems[:count], range(count), cfg.rollout.max_prompt_tokens)
    limits = np.full((count, 1), min(PROBED_TOKENS, cfg.rollout.max_tokens))
    sampling = dict(max_tokens=cfg.rollout.max_tokens, temperature=NEARLY_GREEDY, stop_table=context.stop_table)
    sampling |= dict(slots=context.rollout_plan.slots, room=context.room, limits=limits)
    placed = place_for_rollout(context.model_cfg, params, context.rollout_mesh)
    with jax.set_mesh(context.rollout_mesh):
        rollout = generate_rollout(context.model_cfg, placed, prompts, rehome_key(key), samples=1, **sampling)
    experience = make_experience(prompts, gather_to_host(rollout))
    scorer = (
        params if reference is None else reference
    )  # the same model, which has been or will be compiled for scoring
    logps = start_scoring(cfg, context, scorer, experience)()[experience.mask]
    return float(np.exp(-logps.mean()))


def sample_surprise(records: Sequence[dict]) -> dict[str, float]:
    """Returns the mean of -log pi over the tokens of recorded completions, as the trainer computes it, in nats."""
    return {"sample_surprise": -fmean(logp for record in records for logp in record["policy_logps"])}
