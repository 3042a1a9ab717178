"""Recomputes a GRPO run in float64 from its own files and its base model, without any code of `grpo_jax`.

    JAX_ENABLE_X64=1 python -m tests.outside.run WORKDIR BASE

WORKDIR is a run of a Llama on additions, with AdamW, a checkpoint of every step and all completions in samples/. BASE
is the folder of its base model. Prints one JSON object per compared quantity: topic, step, quantity, difference and
tolerance, and the two values if they are short.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from tests.outside import grpo, model
from tests.outside.files import read_checkpoint, read_events, read_jsonl, read_samples

# The run computes in float32. In float32, the functions of this folder are off by up to 7e-5 nats in a log-prob (of a
# rare token) and by 3e-5 of the largest entry in a gradient. Values without rounding errors must be equal.
LOGP = 3e-4  # nats; also for metrics, which are means of functions of log-probs
GRAD = 3e-4  # of the largest entry of a tensor


def compare(topic, step, quantity, found, expected, tolerance=None):
    """Prints how far a quantity is from what it should be.

    Args:
        topic: What the quantity belongs to.
        step: The step.
        quantity: Its name.
        found: The value in the files: a number or an array of numbers, or anything that JSON can hold if there is no
            tolerance.
        expected: The value that this module computes.
        tolerance: The largest allowed difference; NaN is never allowed. If it is None, the values must be equal.
    """
    line = dict(topic=topic, step=step, quantity=quantity)
    if tolerance is None:
        line |= dict(difference=float(found != expected), tolerance=0.0, found=found, expected=expected)
    else:
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        line |= dict(difference=float(np.max(np.abs(found - expected))), tolerance=float(tolerance))
        line |= dict(found=float(found), expected=float(expected)) if found.ndim == 0 else {}
    print(json.dumps(line))


class Run:
    """The files of a run, and log-probs of its completions."""

    def __init__(self, workdir, base):
        self.cfg = json.loads((workdir / "config.json").read_text())
        self.model_cfg = json.loads((base / "config.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self.metrics = read_jsonl(workdir / "metrics.jsonl")
        self.events = read_events(workdir / "tensorboard")
        self.train, self.eval = read_samples(workdir, "train"), read_samples(workdir, "eval")
        self.policies, self.moments = {0: model.read_base(base)}, {}
        self.reference = model.from_checkpoint(read_checkpoint(workdir / "checkpoints" / "reference"))
        for step in range(1, self.cfg["total_steps"] + 1):
            folder = workdir / "checkpoints" / str(step)
            self.policies[step] = model.from_checkpoint(read_checkpoint(folder / "policy"))
            (adam,) = (part for part in read_checkpoint(folder / "optimizer") if part and "mu" in part)
            self.moments[step] = model.from_checkpoint(adam["mu"]), model.from_checkpoint(adam["nu"])
        train, rollout = self.cfg["train"], self.cfg["rollout"]
        self.updates_per_rollout = train["minibatches"] * train["epochs"]
        self.minibatch_size = rollout["prompts"] * rollout["samples"] // train["minibatches"]
        self.score = jax.jit(partial(grpo.score, self.model_cfg, self.tokenizer.get_vocab_size()), static_argnums=0)
        self.gradient = jax.jit(jax.grad(self.loss, has_aux=True))

    def loss(self, weights, rows, old_logps, ref_logps, advantages):
        logps, entropies = self.score(self.cfg["rollout"]["temperature"], weights, rows)
        return grpo.loss(self.cfg["loss"], logps, entropies, old_logps, ref_logps, advantages, rows["mask"])

    def arrange(self, records):
        """Returns the prompts and completions of records as arrays, whose width is the same for the whole run."""
        max_tokens = self.cfg["rollout"]["max_tokens"]
        tokens = np.zeros((len(records), self.cfg["rollout"]["max_prompt_tokens"] + max_tokens), int)
        prompts = [self.tokenizer.encode(record["prompt"]).ids for record in records]
        for row, prompt, record in zip(tokens, prompts, records, strict=True):
            row[: len(prompt) + len(record["tokens"])] = prompt + record["tokens"]
        columns = np.array([len(prompt) for prompt in prompts])[:, None] + np.arange(max_tokens)
        mask = np.arange(max_tokens) < np.array([len(record["tokens"]) for record in records])[:, None]
        return dict(tokens=tokens, columns=np.where(mask, columns, 1), mask=mask)

    def logps(self, step, temperature, records):
        """Returns the log-probs `[N, S]` of completions under the policy after `step`."""
        found = []
        for start in range(0, len(records), self.minibatch_size):  # one shape, so that it compiles once
            chunk = records[start : start + self.minibatch_size]
            rows = self.arrange(chunk + records[:1] * (self.minibatch_size - len(chunk)))
            found.append(np.asarray(self.score(temperature, self.policies[step], rows)[0])[: len(chunk)])
        return np.concatenate(found)

    def recorded(self, name, records):
        """Returns a field that holds one number per token, as an array `[N, S]` that is 0 after the ends."""
        lists = np.zeros((len(records), self.cfg["rollout"]["max_tokens"]))
        for row, record in zip(lists, records, strict=True):
            row[: len(record[name])] = record[name]
        return lists


def check_completions(run, topic, step, records):
    """Checks the fields that follow from prompts and tokens: texts, lengths, ends, expected answers and rewards."""
    max_tokens, (stop,) = run.cfg["rollout"]["max_tokens"], run.cfg["rollout"]["stop_strings"]
    weights = dict(zip(run.cfg["reward"]["parts"], run.cfg["reward"]["weights"], strict=True))
    for record in records:
        tokens = record["tokens"]
        text, shorter = (run.tokenizer.decode(ids, skip_special_tokens=False) for ids in (tokens, tokens[:-1]))
        is_stopped, is_ended = stop in text, tokens[-1] == run.model_cfg["eos_token_id"]
        completion = shorter if is_ended else text.partition(stop)[0] + stop if is_stopped else text
        a, b = (int(number) for number in re.search(r"What is (\d+) \+ (\d+)\?", record["prompt"]).groups())
        rewards = dict(accuracy=grpo.accuracy(completion, str(a + b)), format=grpo.well_formed(completion))
        expected = dict(
            completion=completion,
            length=len(tokens),
            truncated=not is_stopped and not is_ended,
            expected=str(a + b),
            rewards=rewards,
            reward=sum(weight * rewards[name] for name, weight in weights.items()),
            metadata=dict(a=a, b=b),
            question=f"What is {a} + {b}?",
            step=step,
        )
        name = f"completion {record['sample_id']} of prompt {record['prompt_id']}"
        compare(topic, step, name, {field: record[field] for field in expected}, expected)
        ends_in_time = stop not in shorter and len(tokens) <= max_tokens
        is_full = len(tokens) == max_tokens or not record["truncated"]
        compare(topic, step, f"{name} ends where it should", ends_in_time and is_full, True)


def check_rollout(run, index, step, records):
    """Checks the completions of a rollout, their log-probs, rewards and advantages, and its metrics."""
    cfg = run.cfg["rollout"]
    check_completions(run, "rollouts", step, records)
    prompt_ids = range(index * cfg["prompts"], (index + 1) * cfg["prompts"])
    ids = [[record["prompt_id"], record["sample_id"]] for record in records]
    compare("rollouts", step, "ids", ids, [[i, sample] for i in prompt_ids for sample in range(cfg["samples"])])

    sampled_by, reference = (run.logps(policy, cfg["temperature"], records) for policy in (step - 1, 0))
    for name, expected in (("logps", sampled_by), ("policy_logps", sampled_by), ("ref_logps", reference)):
        compare("log-probs", step, name, run.recorded(name, records), expected, LOGP)

    rewards = np.reshape([record["reward"] for record in records], (cfg["prompts"], cfg["samples"]))
    advantages = grpo.advantages(rewards).ravel()
    compare("rollouts", step, "advantages", [r["advantage"] for r in records], advantages, 1e-6)

    expected = {
        "reward/mean": rewards.mean(),
        "reward/accuracy": np.mean([record["rewards"]["accuracy"] for record in records]),
        "reward/format": np.mean([record["rewards"]["format"] for record in records]),
        "rollout/length_mean": np.mean([record["length"] for record in records]),
        "rollout/truncated_frac": np.mean([record["truncated"] for record in records]),
        "groups/zero_variance_frac": np.mean([len(set(group)) == 1 for group in rewards]),
    }
    for update in range(step, step + run.updates_per_rollout):
        row = run.metrics[update]
        for name, value in expected.items():
            compare("rollouts", update, name, row.get(name), value, 1e-6 * max(1, value))
        for name in ("policy/logp_gap/mean", "policy/logp_gap/max"):
            compare("log-probs", update, name, row.get(name), 0, LOGP)
        compare("log-probs", update, "policy/kl_sampler", row.get("policy/kl_sampler"), 0, LOGP**2)
    return sampled_by, reference, advantages


def check_minibatches(run, step, records):
    """Checks how a rollout is divided into updates, and returns the indices of the completions of each minibatch."""
    count, steps = run.cfg["train"]["minibatches"], range(step, step + run.updates_per_rollout)
    updates = [[n for n, record in enumerate(records) if update in record["update_steps"]] for update in steps]
    for update, rows in zip(steps, updates, strict=True):
        compare("minibatches", update, "number of completions", len(rows), run.minibatch_size)
    epochs = [updates[start : start + count] for start in range(0, len(updates), count)]
    for epoch, minibatches in enumerate(epochs):
        rows = sorted(n for minibatch in minibatches for n in minibatch)
        compare("minibatches", step, f"completions of epoch {epoch}", rows, list(range(len(records))))
        parts = sum(len({records[n]["prompt_id"] for n in minibatch}) for minibatch in minibatches)
        allowed = run.cfg["rollout"]["prompts"] + count - 1  # a cut between two minibatches may split one group
        compare("minibatches", step, f"groups stay together in epoch {epoch}", parts <= allowed, True)
    return updates, epochs


def check_update(run, step, number, moments, minibatch):
    """Checks an update from the policy before it; returns the moments after it.

    Args:
        number: The number of updates so far that were not skipped, including this one.
        moments: Both moments before the update.
        minibatch: The arguments of `Run.loss`, except for the weights.
    """
    optim, row = run.cfg["optim"], run.metrics[step]
    before, after = run.policies[step - 1], run.policies[step]
    grads, metrics = run.gradient(before, *minibatch)
    grads = {name: np.asarray(g) for name, g in grads.items()}
    norm = grpo.global_norm(grads)
    for name in ("loss/total", "policy/kl_ref", "policy/clip_frac", "policy/ratio_max", "policy/entropy"):
        compare("updates", step, name, row.get(name), metrics[name], LOGP * max(1, float(metrics[name])))
    compare("updates", step, "optim/grad_norm", row["optim/grad_norm"], norm, GRAD * norm)
    rate = grpo.learning_rate(optim, number)
    compare("updates", step, "optim/lr", row["optim/lr"], rate, 1e-6 * rate)

    moments = grpo.adamw_moments(optim, *moments, grads)
    change = grpo.adamw_change(optim, before, *run.moments[step], number)
    for name in before:
        for kind, found, expected in zip(("mu", "nu"), run.moments[step], moments, strict=True):
            scale = np.max(np.abs(expected[name]))
            compare("updates", step, f"{kind} of {name}", found[name] / scale, expected[name] / scale, GRAD)
        # The change is computed from the checkpoint's moments, because where a gradient is only rounding error, so is
        # the sign of Adam's step. The tolerance is mostly the rounding error of the new parameter.
        scale, rounding = np.max(np.abs(change[name])), 2**-24 * np.max(np.abs(after[name]))
        found = (after[name] - before[name]) / scale
        compare("updates", step, f"change of {name}", found, change[name] / scale, 3e-5 + rounding / scale)
    return moments, metrics


def check_skipped_update(run, step):
    """Checks that an update with a non-finite gradient changed nothing."""
    compare("updates", step, "optim/grad_norm", run.metrics[step]["optim/grad_norm"], None)
    for kind, found, expected in (
        ("policy", run.policies[step], run.policies[step - 1]),
        ("mu", run.moments[step][0], run.moments[step - 1][0]),
        ("nu", run.moments[step][1], run.moments[step - 1][1]),
    ):
        for name in expected:
            compare("updates", step, f"{kind} of {name}", found[name], expected[name], 0)


def check_training(run):
    """Checks all rollouts and updates."""
    firsts = list(range(1, run.cfg["total_steps"] + 1, run.updates_per_rollout))
    compare("rollouts", None, "first steps", list(run.train), firsts)
    for name, x in run.reference.items():
        compare("updates", 0, f"reference, {name}", x, run.policies[0][name], 0)
    moments = tuple({name: np.zeros_like(x) for name, x in run.policies[0].items()} for _ in range(2))
    number, shuffles, clipped = 0, [], []
    for index, (first, records) in enumerate(run.train.items()):
        data = check_rollout(run, index, first, records)
        updates, epochs = check_minibatches(run, first, records)
        shuffles += [str(epoch) for epoch in epochs]
        for step, rows in enumerate(updates, first):
            if run.metrics[step]["optim/skipped"]:
                check_skipped_update(run, step)
                continue
            number += 1
            minibatch = run.arrange([records[n] for n in rows]), *(x[rows] for x in data)
            moments, metrics = check_update(run, step, number, moments, minibatch)
            clipped += [float(metrics["clipped_low"]), float(metrics["clipped_high"])]
    compare("minibatches", None, "number of different shuffles", len(set(shuffles)), len(shuffles))
    compare("updates", None, "both bounds clip", max(clipped[::2]) > 0 < max(clipped[1::2]), True)


def check_evaluations(run):
    """Checks the completions of each evaluation, their log-probs and its metrics."""
    cfg = run.cfg["eval"]
    steps = [s for s in run.policies if s in (0, run.cfg["total_steps"]) or s % cfg["every_steps"] == 0]
    compare("evaluations", None, "steps", list(run.eval), steps)
    compare("evaluations", None, "steps", [r["step"] for r in run.metrics if "eval/accuracy" in r], steps)
    for step, records in run.eval.items():
        check_completions(run, "evaluations", step, records)
        ids = [[record["prompt_id"], record["sample_id"]] for record in records]
        compare("evaluations", step, "ids", ids, [[i, 0] for i in range(cfg["questions"])])
        expected = run.logps(step, cfg["temperature"], records)
        compare("evaluations", step, "logps", run.recorded("logps", records), expected, LOGP)
        for name, value in {
            "eval/accuracy": np.mean([record["rewards"]["accuracy"] for record in records]),
            "eval/format": np.mean([record["rewards"]["format"] for record in records]),
            "eval/length_mean": np.mean([record["length"] for record in records]),
        }.items():
            compare("evaluations", step, name, run.metrics[step][name], value, 1e-6)


def check_draws(run):
    """Checks that completions of one prompt by one policy at one temperature are drawn with different random keys.

    These are the samples of a group, the first samples of a rollout and the evaluation of the policy that sampled it,
    and the evaluations before and after a skipped update.
    """
    samples = run.cfg["rollout"]["samples"]
    for step, records in run.train.items():
        groups = [records[n : n + samples] for n in range(0, len(records), samples)]
        copies = [group[0]["prompt_id"] for group in groups if len({str(r["tokens"]) for r in group}) == 1]
        compare("draws", step, "prompts whose samples are all equal", copies, [])
    skipped = [row["step"] for row in run.metrics if row.get("optim/skipped")]
    pairs = [(1, run.eval[0], run.train[1]), *((step, run.eval[step - 1], run.eval[step]) for step in skipped)]
    for step, records, others in pairs:
        tokens = {(r["prompt_id"], r["sample_id"], r["prompt"]): r["tokens"] for r in others}
        keys = [(r["prompt_id"], r["sample_id"], r["prompt"]) for r in records]
        equal = [r["tokens"] == tokens[key] for r, key in zip(records, keys, strict=True) if key in tokens]
        compare("draws", step, "evaluation repeats its draws", [len(equal) > 3, all(equal)], [True, False])


def check_logs(run):
    """Checks that metrics.jsonl holds each step once, and that TensorBoard shows the same values."""
    steps = [row["step"] for row in run.metrics]
    compare("logs", None, "steps of metrics.jsonl", steps, list(range(run.cfg["total_steps"] + 1)))
    compare("logs", None, "steps of events", sorted({step for _, step in run.events}), steps)
    for row in run.metrics:
        expected = {name: [float(np.float32(x))] for name, x in row.items() if name != "step" and x is not None}
        found = {tag: values for (tag, step), values in run.events.items() if step == row["step"]}
        compare("logs", row["step"], "events", found, expected)


def main():
    """Runs all checks on the run and the base model that the command line names."""
    workdir, base = map(Path, sys.argv[1:])
    run = Run(workdir, base)
    for check in (check_training, check_evaluations, check_draws, check_logs):
        check(run)


if __name__ == "__main__":
    main()
