"""Recomputes a GRPO run in float64 from its own files and its base model, without any code of `grpo_jax`.

    JAX_ENABLE_X64=1 python -m tests.outside.run WORKDIR BASE

WORKDIR is a run of a Llama on additions with any settings of groups, advantages, loss and reference, with AdamW, a
checkpoint of every step and all completions in samples/. BASE is the folder of its base model. Prints one JSON object
per compared quantity: topic, step, quantity, difference and tolerance, and the two values if they are short.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from tests.outside import grpo, losses, model
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
        self.policies, self.moments, self.references = {0: model.read_base(base)}, {}, {}
        if (workdir / "checkpoints" / "reference").exists():
            self.references[0] = model.from_checkpoint(read_checkpoint(workdir / "checkpoints" / "reference"))
        for step in range(1, self.cfg["total_steps"] + 1):
            folder = workdir / "checkpoints" / str(step)
            self.policies[step] = model.from_checkpoint(read_checkpoint(folder / "policy"))
            if (folder / "reference").exists():
                self.references[step] = model.from_checkpoint(read_checkpoint(folder / "reference"))
            (adam,) = (part for part in read_checkpoint(folder / "optimizer") if part and "mu" in part)
            self.moments[step] = model.from_checkpoint(adam["mu"]), model.from_checkpoint(adam["nu"])
        train, rollout = self.cfg["train"], self.cfg["rollout"]
        self.updates_per_rollout = train["minibatches"] * train["epochs"]
        self.minibatch_size = rollout["prompts"] * rollout["samples"] // train["minibatches"]
        self.score = jax.jit(partial(grpo.score, self.model_cfg, self.tokenizer.get_vocab_size()), static_argnums=0)
        self.pull_back = jax.jit(self.pull_back_to_weights)

    def reference_step(self, step):
        """Returns the step whose policy is the reference after `step`; 0 stands for the base model."""
        return step - step % (self.cfg["reference"]["every_updates"] or step + 1)

    def pull_back_to_weights(self, weights, rows, by_logps, by_entropies):
        """Returns the gradient in the weights, given those in the log-probs and entropies of completions."""
        temperature = self.cfg["rollout"]["temperature"]
        return jax.vjp(lambda weights: self.score(temperature, weights, rows), weights)[1]((by_logps, by_entropies))[0]

    def gradient(self, weights, records, old_logps, ref_logps, advantages):
        """Returns the gradient of the loss of a minibatch, its metrics and which signs of the advantage are cut."""
        rows, count = self.arrange(records + records[:1] * (self.minibatch_size - len(records))), len(records)
        scored = self.score(self.cfg["rollout"]["temperature"], weights, rows)
        logps, entropies = (np.asarray(x)[:count] for x in scored)
        mask, cfg = rows["mask"][:count], self.cfg["loss"]
        names = ("ratio", "clip_low", "clip_high", "clip_difference", "kl", "kl_corrected", "aggregate")
        settings = {name: cfg[name] for name in names} | dict(
            clip_dual=cfg["clip_dual"] or None,
            kl_coef=cfg["kl_coef"] if cfg["kl_in"] == "loss" else 0.0,
            constant_length=cfg["constant_length"],
            groups=[record["prompt_id"] for record in records],
        )
        loss = partial(losses.loss, logps, old_logps, ref_logps, mask=mask, **settings)
        total, by_logps, metrics = loss(advantages)
        token_weights = losses.token_weights(mask, settings["aggregate"], cfg["constant_length"], settings["groups"])
        total -= cfg["entropy_coef"] * np.sum(token_weights * entropies)
        metrics |= {"loss/total": total, "policy/entropy": np.sum(token_weights * entropies) / token_weights.sum()}
        if not cfg["kl_coef"]:
            del metrics["policy/kl_ref"]
        padding = ((0, self.minibatch_size - count), (0, 0))
        slopes = (np.pad(x, padding) for x in (by_logps, -cfg["entropy_coef"] * token_weights))
        grads = {name: np.asarray(g) for name, g in self.pull_back(weights, rows, *slopes).items()}
        signs = [loss(np.maximum(advantages, 0))[2], loss(np.minimum(advantages, 0))[2]]
        return grads, metrics, [metrics["policy/clip_frac"] for metrics in signs]

    def arrange(self, records):
        """Returns the prompts and completions of records as arrays, whose width is the same for the whole run."""
        max_tokens = self.cfg["rollout"]["max_tokens"]
        longest_prompt = self.cfg["rollout"]["max_prompt_tokens"] or 80  # 0 follows the task, here sums
        tokens = np.zeros((len(records), longest_prompt + max_tokens), int)
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
    overlong = run.cfg["rollout"]["overlong"]
    for record in records:
        tokens = record["tokens"]
        text, shorter = (run.tokenizer.decode(ids, skip_special_tokens=False) for ids in (tokens, tokens[:-1]))
        is_stopped, is_ended = stop in text, tokens[-1] == run.model_cfg["eos_token_id"]
        completion = shorter if is_ended else text.partition(stop)[0] + stop if is_stopped else text
        a, b = (int(number) for number in re.search(r"What is (\d+) \+ (\d+)\?", record["prompt"]).groups())
        penalty = grpo.overlong_penalty(len(tokens), max_tokens, run.cfg["rollout"]["overlong_cache"])
        known = dict(
            accuracy=grpo.accuracy(completion, str(a + b)), format=grpo.well_formed(completion), length=penalty
        )
        rewards = {name: known[name] for name in weights}
        reward = sum(weight * rewards[name] for name, weight in weights.items())
        if overlong == "zero" and not is_stopped and not is_ended:
            reward = 0.0
        if overlong == "soft":
            rewards["overlong"] = penalty
            reward += penalty
        expected = dict(
            completion=completion,
            length=len(tokens),
            truncated=not is_stopped and not is_ended,
            expected=str(a + b),
            rewards=rewards,
            reward=reward,
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
    """Checks the completions of a rollout, their log-probs, rewards and advantages, and its metrics.

    Returns:
        (data, kept): The sampler's log-probs, those of the reference, and the advantages; and the indices of the
        completions that updates learn from.
    """
    cfg, loss = run.cfg["rollout"], run.cfg["loss"]
    check_completions(run, "rollouts", step, records)
    prompt_ids = range(index * cfg["prompts"], (index + 1) * cfg["prompts"])
    ids = [[record["prompt_id"], record["sample_id"]] for record in records]
    compare("rollouts", step, "ids", ids, [[i, sample] for i in prompt_ids for sample in range(cfg["samples"])])

    sampled_by = run.logps(step - 1, cfg["temperature"], records)
    reference = np.zeros_like(sampled_by)
    for name in ("logps", "policy_logps"):
        compare("log-probs", step, name, run.recorded(name, records), sampled_by, LOGP)
    compare("log-probs", step, "has ref_logps", "ref_logps" in records[0], loss["kl_coef"] > 0)
    if loss["kl_coef"]:
        reference = run.logps(run.reference_step(step - 1), cfg["temperature"], records)
        compare("log-probs", step, "ref_logps", run.recorded("ref_logps", records), reference, LOGP)

    correct = [record["rewards"]["accuracy"] == 1 for record in records]
    compare("rollouts", step, "why", [record["why"] == "equal" for record in records], correct)
    read = [record["parsed"] is None or record["parsed"] in record["completion"] for record in records]
    compare("rollouts", step, "parsed", read, [True] * len(records))
    shape, truncated = (cfg["prompts"], cfg["samples"]), np.array([record["truncated"] for record in records])
    means = {name: np.mean([record["rewards"][name] for record in records]) for name in records[0]["rewards"]}
    rewards = np.reshape([record["reward"] for record in records], shape)
    is_equal = np.array([len(set(group)) == 1 for group in rewards])
    kept = np.ones(len(records), bool)
    if run.cfg["groups"]["equal"] == "drop":
        kept &= ~np.repeat(is_equal, cfg["samples"])
    if cfg["overlong"] == "mask":
        kept &= ~truncated
    expected = {
        "reward/mean": rewards.mean(),
        **{f"reward/{name}": mean for name, mean in means.items()},
        **{f"reward/{kind}": sum(f"{kind} in" in record["why"] for record in records) for kind in ("timeout", "error")},
        "rollout/length_mean": np.mean([record["length"] for record in records]),
        "rollout/truncated_frac": truncated.mean(),
        "groups/zero_variance_frac": is_equal.mean(),
    }
    scores = rewards
    if loss["kl_coef"] and loss["kl_in"] == "reward":
        q = run.recorded("ref_logps", records) - run.recorded("logps", records)
        kl = losses.estimator(loss["kl"], q)[0].sum(axis=1)
        expected["reward/kl"] = kl.mean()
        scores = rewards - loss["kl_coef"] * kl.reshape(shape)
    advantages = losses.advantages(scores, **run.cfg["advantage"]).ravel()
    compare("rollouts", step, "advantages", [r["advantage"] for r in records], advantages, 1e-6)
    for update in range(step, step + run.updates_per_rollout):
        row = run.metrics[update]
        names = {name for name in row if name.split("/")[0] in ("reward", "rollout", "groups")}
        compare("rollouts", update, "names", sorted(names - {"rollout/tokens_per_s"}), sorted(expected))
        for name, value in expected.items():
            compare("rollouts", update, name, row.get(name), value, 1e-6 * max(1, value))
        for name in ("policy/logp_gap/mean", "policy/logp_gap/max"):
            compare("log-probs", update, name, row.get(name), 0, LOGP)
        compare("log-probs", update, "policy/kl_sampler", row.get("policy/kl_sampler"), 0, LOGP**2)
    return (sampled_by, reference, advantages), np.flatnonzero(kept)


def check_minibatches(run, step, records, kept):
    """Checks how a rollout is divided into updates, and returns the indices of the completions of each minibatch."""
    count, steps = run.cfg["train"]["minibatches"], range(step, step + run.updates_per_rollout)
    updates = [[n for n, record in enumerate(records) if update in record["update_steps"]] for update in steps]
    for update, rows in zip(steps, updates, strict=True):
        sizes = (len(kept) // count, -(-len(kept) // count))
        compare("minibatches", update, "number of completions", min(sizes) <= len(rows) <= max(sizes), True)
    epochs = [updates[start : start + count] for start in range(0, len(updates), count)]
    for epoch, minibatches in enumerate(epochs):
        rows = sorted(n for minibatch in minibatches for n in minibatch)
        compare("minibatches", step, f"completions of epoch {epoch}", rows, kept.tolist())
        parts = sum(len({records[n]["prompt_id"] for n in minibatch}) for minibatch in minibatches)
        groups = len({records[n]["prompt_id"] for n in kept})
        allowed = groups + count - 1  # a cut between two minibatches may split one group
        compare("minibatches", step, f"groups stay together in epoch {epoch}", parts <= allowed, True)
    return updates, epochs


def has_signal(run, step, first, rows, advantages):
    """Returns whether an update has anything to learn from the completions `rows` of the rollout of step `first`."""
    loss, reference = run.cfg["loss"], run.reference_step(first - 1)
    moved = any((x != run.policies[reference][name]).any() for name, x in run.policies[step - 1].items())
    is_penalized = loss["kl_coef"] > 0 and loss["kl_in"] == "loss" and moved
    return len(rows) > 0 and (advantages[rows].any() or loss["entropy_coef"] > 0 or is_penalized)


def check_update(run, step, rate, count, moments, minibatch):
    """Checks an update from the policy before it; returns the moments after it, and which signs of advantages are cut.

    Args:
        run: The run.
        step: The number of the update.
        rate: The learning rate.
        count: The number of gradients in the moments after the update.
        moments: Both moments before the update.
        minibatch: The arguments of `Run.gradient`, except for the weights.
    """
    optim, row = run.cfg["optim"], run.metrics[step]
    before, after = run.policies[step - 1], run.policies[step]
    grads, metrics, cut = run.gradient(before, *minibatch)
    norm = grpo.global_norm(grads)
    compare("updates", step, "has policy/kl_ref", "policy/kl_ref" in row, run.cfg["loss"]["kl_coef"] > 0)
    for name, value in metrics.items():
        compare("updates", step, name, row.get(name), value, LOGP * max(1, float(value)))
    compare("updates", step, "optim/grad_norm", row["optim/grad_norm"], norm, GRAD * norm)

    moments = grpo.adamw_moments(optim, *moments, grads)
    change = grpo.adamw_change(optim, before, *run.moments[step], count, rate)
    for name in before:
        for kind, found, expected in zip(("mu", "nu"), run.moments[step], moments, strict=True):
            scale = np.max(np.abs(expected[name]))
            compare("updates", step, f"{kind} of {name}", found[name] / scale, expected[name] / scale, GRAD)
        # The change is computed from the checkpoint's moments, because where a gradient is only rounding error, so is
        # the sign of Adam's step. The tolerance is mostly the rounding error of the new parameter.
        scale, rounding = np.max(np.abs(change[name])), 2**-24 * np.max(np.abs(after[name]))
        found = (after[name] - before[name]) / scale
        compare("updates", step, f"change of {name}", found, change[name] / scale, 3e-5 + rounding / scale)
    return moments, cut


def check_no_change(run, step):
    """Checks that an update with a non-finite gradient or without a signal changed nothing."""
    for kind, found, expected in (
        ("policy", run.policies[step], run.policies[step - 1]),
        ("mu", run.moments[step][0], run.moments[step - 1][0]),
        ("nu", run.moments[step][1], run.moments[step - 1][1]),
    ):
        for name in expected:
            compare("updates", step, f"{kind} of {name}", found[name], expected[name], 0)


def check_references(run):
    """Checks that the reference is the base model until the policy replaces it, and which checkpoints hold it."""
    steps, has_reference = range(1, run.cfg["total_steps"] + 1), run.cfg["loss"]["kl_coef"] > 0
    expected = [0] * has_reference + [step for step in steps if run.reference_step(step)]
    compare("updates", None, "steps with a reference", sorted(run.references), expected)
    for step, reference in run.references.items():
        policy = run.policies[run.reference_step(step)]
        for name, x in reference.items():
            compare("updates", step, f"reference, {name}", x, policy[name], 0)


def check_training(run):
    """Checks all rollouts and updates."""
    firsts = list(range(1, run.cfg["total_steps"] + 1, run.updates_per_rollout))
    compare("rollouts", None, "first steps", list(run.train), firsts)
    check_references(run)
    moments = tuple({name: np.zeros_like(x) for name, x in run.policies[0].items()} for _ in range(2))
    number, count, shuffles, cuts = 0, 0, [], []
    for index, (first, records) in enumerate(run.train.items()):
        data, kept = check_rollout(run, index, first, records)
        updates, epochs = check_minibatches(run, first, records, kept)
        shuffles += [str(epoch) for epoch in epochs if len(kept) > 1]
        for step, rows in enumerate(updates, first):
            row = run.metrics[step]
            rate = grpo.learning_rate(run.cfg["optim"], number + 1)
            compare("updates", step, "optim/lr", row["optim/lr"], rate, 1e-6 * rate)
            is_signal = bool(has_signal(run, step, first, rows, data[2]))
            is_skipped, is_finite = row["optim/skipped"], row["optim/grad_norm"] is not None
            compare("updates", step, "optim/skipped", is_skipped, float(not is_finite))
            compare("updates", step, "optim/no_signal", row["optim/no_signal"], float(is_finite and not is_signal))
            number += is_finite  # the schedule does not count updates whose gradient is not finite
            if not is_finite or not is_signal:
                check_no_change(run, step)
                continue
            count += 1
            minibatch = [records[n] for n in rows], *(x[rows] for x in data)
            moments, cut = check_update(run, step, rate, count, moments, minibatch)
            cuts.append(cut)
    compare("minibatches", None, "number of different shuffles", len(set(shuffles)), len(shuffles))
    compare("updates", None, "both signs of the advantage are cut", bool(np.max(cuts, axis=0).min() > 0), True)


def check_evaluations(run):
    """Checks the completions of each evaluation, their log-probs and its metrics."""
    cfg = run.cfg["eval"]
    every = cfg["every_steps"] or run.cfg["total_steps"]
    steps = [step for step in run.policies if step % every == 0 or step == run.cfg["total_steps"]]
    compare("evaluations", None, "steps", list(run.eval), steps)
    compare("evaluations", None, "steps", [r["step"] for r in run.metrics if "eval/accuracy" in r], steps)
    for step, records in run.eval.items():
        check_completions(run, "evaluations", step, records)
        ids = [[record["prompt_id"], record["sample_id"]] for record in records]
        compare("evaluations", step, "ids", ids, [[i, 0] for i in range(cfg["questions"])])
        expected = run.logps(step, cfg["temperature"], records)
        compare("evaluations", step, "logps", run.recorded("logps", records), expected, LOGP)
        parts = run.cfg["reward"]["parts"]
        parts = [*parts, "overlong"] if run.cfg["rollout"]["overlong"] == "soft" else parts
        means = {f"eval/{part}": np.mean([record["rewards"][part] for record in records]) for part in parts}
        means["eval/length_mean"] = np.mean([record["length"] for record in records])
        for name, value in means.items():
            compare("evaluations", step, name, run.metrics[step].get(name), value, 1e-6)


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
