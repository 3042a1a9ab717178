"""Draws a recorded completion again, from its ids and the policy that drew it, and compares it with its record.

A token's key is folded from (seed, purpose, rollout or step, prompt id, sample id, index), so a completion can be drawn
by itself. It has the recorded tokens, unless rounding decides a near-tie between two tokens differently.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config.schema import Config, EvalSection
from grpo_jax.config.workdir import check_trained_config, with_tuples
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import head_matmul, hidden_states, temperature_logits
from grpo_jax.model.mask import single_sequence
from grpo_jax.rollout.draws import NO_FILTER, TokenFilter, draw_margin
from grpo_jax.rollout.sampler import generate_rollout, place_for_rollout
from grpo_jax.run.checkpoint import checkpoints_folder, read_meta, saved_steps
from grpo_jax.run.context import EVALUATION_KEY, SAMPLING_KEY, BaseModel, RunContext, build_context, read_base_model
from grpo_jax.run.metrics import read_samples
from grpo_jax.run.policy import load_policy, refusing_damage
from grpo_jax.run.progress import phase
from grpo_jax.run.prompt_limit import fit_prompts
from grpo_jax.run.stages import fold_in_all, rehome_key
from grpo_jax.tasks.problem_list import ProblemList
from grpo_jax.tasks.streams import draw_problems, make_task
from grpo_jax.text.decoding import decode_pieces
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import encode_prompts

NEEDED_FIELDS = ("question", "prompt", "expected", "tokens", "logps")  # of a record

# The largest difference between two log-probs of the same policy, in nats, that rounding explains, by dtype.
ROUNDING = {"float32": 1e-3, "bfloat16": 0.2}


class SampleName(NamedTuple):
    """Names a record in samples/KIND-STEP.jsonl."""

    kind: str  # "train" or "eval"
    step: int
    prompt_id: int
    sample_id: int

    @property
    def policy_step(self) -> int:
        """The number of updates behind the policy that drew the sample; 0 stands for the base model."""
        return self.step - (self.kind == "train")


class Redrawn(NamedTuple):
    """A completion that was drawn again, with its record."""

    tokens: list[int]
    logps: list[float]  # by the sampler
    pieces: list[str]  # the text of each token
    record: dict
    recorded_pieces: list[str]
    first_difference: int | None  # index of the first token that differs from the record; None if none does
    margin: float  # by how many nats the draw of that token was decided; 0 without a difference
    recorded_logp: float  # new log-prob of the token that is recorded there; 0 without a difference

    def largest_gap(self) -> float:
        """Returns the largest difference between new and recorded log-probs, over the tokens before any difference."""
        pairs = zip(self.logps[: self.first_difference], self.record["logps"], strict=False)
        return max((abs(now - then) for now, then in pairs), default=0.0)


def parse_sample_name(text: str) -> SampleName:
    """Parses STEP/PROMPT_ID/SAMPLE_ID, or eval-STEP/PROMPT_ID/SAMPLE_ID for a completion of an evaluation.

    Raises:
        UserError: The text is something else.
    """
    match = re.fullmatch(r"(?:(train|eval)-)?(\d{1,9})/(\d{1,9})/(\d{1,9})", text, flags=re.ASCII)
    if match is None:
        raise UserError(
            f"--sample must be STEP/PROMPT_ID/SAMPLE_ID, or eval-STEP/PROMPT_ID/SAMPLE_ID for a sample of an "
            f"evaluation; found {text!r}. Take the ids from a record in samples/, such as --sample=1/0/0."
        )
    return SampleName(match[1] or "train", *map(int, match.groups()[1:]))


def read_record(workdir: Path, name: SampleName) -> dict:
    """Returns the record of a sample.

    Raises:
        UserError: There is no such record, or its file cannot be read.
    """
    file = f"samples/{name.kind}-{name.step:06d}.jsonl"
    found = read_samples(workdir, name.kind, name.step)
    records = [record for record in found if None not in (record.get("prompt_id"), record.get("sample_id"))]
    if not records:
        files = (workdir / "samples").glob(f"{name.kind}-*.jsonl")
        steps = sorted(int(match[0]) for file in files if (match := re.search(r"(?<=-)\d+$", file.stem)))
        raise UserError(
            f"--sample must name a recorded sample, but {workdir} has no {file}; found files of the steps "
            f"{shorten(steps)}. Choose one of these; log.samples and log.every_steps say what a run records."
        )
    for record in records:
        if (record["prompt_id"], record["sample_id"]) == (name.prompt_id, name.sample_id):
            missing = [field for field in NEEDED_FIELDS if record.get(field) is None]
            if missing:
                raise UserError(
                    f"The record of --sample must be as the run wrote it; {file} lacks its {', '.join(missing)}. "
                    "Choose another."
                )
            return record
    samples = shorten(sorted({record["sample_id"] for record in records}))
    raise UserError(
        f"--sample must name a record in {file}, which has {len(records)} of the prompts "
        f"{shorten(sorted({record['prompt_id'] for record in records}))} with sample ids {samples}; found prompt "
        f"{name.prompt_id}, sample {name.sample_id}. Choose one of these; log.samples says how many a run records."
    )


def shorten(numbers: list[int]) -> str:
    """Formats numbers as a list, without the middle of a long one."""
    return ", ".join(map(str, numbers if len(numbers) <= 12 else [*numbers[:6], "...", *numbers[-3:]])) or "none"


def config_of_sample(cfg: Config, workdir: Path, name: SampleName) -> Config:
    """Returns the config with which a sample was drawn, after checking that its policy is still there.

    Raises:
        UserError: No checkpoint of the policy is kept, it is damaged, or its config differs.
    """
    step, saved = name.policy_step, saved_steps(workdir)
    if step == 0:
        return cfg
    if step not in saved:
        paths = (workdir / "samples").glob("train-*.jsonl")
        steps = sorted(int(path.stem.removeprefix("train-")) for path in paths)
        can = [number for number in steps if number - 1 in (0, *saved)]
        raise UserError(
            f"The sample was drawn by the policy after step {step}, of which {checkpoints_folder(workdir)} must hold a "
            f"checkpoint; found those of the steps {shorten(saved)}. Samples of the training steps {shorten(can)} can "
            f"be drawn again; checkpoint.every_steps={cfg.checkpoint.every_steps} and checkpoint.keep="
            f"{cfg.checkpoint.keep} say what a run keeps."
        )
    with refusing_damage(workdir, step):
        trained = read_meta(workdir, step)["config"]
    check_trained_config(workdir, cfg, step, trained)
    of_eval = {key.removeprefix("eval."): value for key, value in trained.items() if key.startswith("eval.")}
    return replace(cfg, eval=EvalSection(**with_tuples(of_eval)))


def find_problem(cfg: Config, base: BaseModel, name: SampleName, record: dict) -> tuple[Config, Problem, str]:
    """Returns the problem of a sample, from the run's task if that still has it, and otherwise from the record.

    Returns:
        (cfg, problem, note): The config with the prompt limit, the problem, and a line about what has changed, which
        is empty if nothing has.

    Raises:
        UserError: The prompt of the recorded question is not the recorded prompt.
    """
    recorded = Problem(record["question"], record["expected"], id="the recorded question")
    if base.prompt_format.text(recorded) != record["prompt"]:
        raise UserError(
            "The recorded question must give the recorded prompt, but the template or the tokenizer has changed since. "
            "Restore it, or choose another --sample."
        )
    seed = cfg.seed if name.kind == "train" else 0
    try:
        fitted, task, _ = fit_prompts(cfg, base, make_task(None, cfg, graded="accuracy" in cfg.reward.parts))
        (problem,) = draw_problems(task, [name.prompt_id], seed=seed, split=name.kind)
        if base.prompt_format.text(problem) == record["prompt"]:
            return fitted, problem, ""
        note = f"The task has another problem {name.prompt_id} now, so the question is taken from the record."
    except (UserError, ValueError) as error:
        note = f"The question is taken from the record, because the task does not give it: {error}"
    fitted, _, _ = fit_prompts(cfg, base, ProblemList([], [recorded]))
    return fitted, recorded, note


def sampling_of(cfg: Config, name: SampleName) -> tuple[float, TokenFilter, int, tuple[int, int]]:
    """Returns the temperature, filter, samples per prompt and key counters with which a sample was drawn."""
    if name.kind == "eval":
        filter = TokenFilter(cfg.eval.top_k, cfg.eval.top_p, cfg.eval.min_p)
        return cfg.eval.temperature, filter, 1, (EVALUATION_KEY, name.step)
    rollout_index = (name.step - 1) // (cfg.train.minibatches * cfg.train.epochs)
    return cfg.rollout.temperature, NO_FILTER, cfg.rollout.samples, (SAMPLING_KEY, rollout_index)


def draw_again(cfg: Config, context: RunContext, params, name: SampleName, problem: Problem, record: dict) -> Redrawn:
    """Draws a sample again and compares it with its record.

    Args:
        cfg: The config from `config_of_sample`, with the prompt limit.
        context: The run's context.
        params: The policy that drew the sample, placed by `place_for_rollout`.
        name: The sample.
        problem: Its problem.
        record: Its record.
    """
    temperature, filter, samples, counters = sampling_of(cfg, name)
    prompts = encode_prompts(context.prompt_format, [problem], [name.prompt_id], cfg.rollout.max_prompt_tokens)
    # The other samples of the group are needed for the sample ids to be right. They end after one token.
    limits = np.where(np.arange(samples) == name.sample_id, cfg.rollout.max_tokens, 1)[None]
    with jax.set_mesh(context.rollout_mesh):
        key = rehome_key(fold_in_all(jax.random.key(cfg.seed), *counters))
        rollout = generate_rollout(
            context.model_cfg,
            params,
            prompts,
            key,
            samples=samples,
            max_tokens=cfg.rollout.max_tokens,
            temperature=temperature,
            stop_table=context.stop_table,
            slots=1,
            limits=limits,
            filter=filter,
        )
        length = int(rollout.lengths[0, name.sample_id])
        tokens, logps = (np.asarray(x[0, name.sample_id])[:length].tolist() for x in (rollout.tokens, rollout.logps))
        pieces, recorded_pieces = decode_pieces(context.tokenizer, [tokens, record["tokens"]])
        drawn = Redrawn(tokens, logps, pieces, record, recorded_pieces, None, 0.0, 0.0)
        if tokens == record["tokens"]:
            return drawn
        both = min(length, len(record["tokens"]))
        index = next((n for n in range(both) if tokens[n] != record["tokens"][n]), both)
        if index == both:
            return drawn._replace(first_difference=index)
        prefix = [*prompts.tokens[0, : prompts.lengths[0]].tolist(), *tokens[:index]]
        logits = next_logits(context.model_cfg, params, jnp.asarray([prefix]), temperature or 1.0)
        token_key = fold_in_all(key, name.prompt_id, name.sample_id, index)
        pair = tokens[index], record["tokens"][index]
        margin = abs(float(draw_margin(token_key, logits, *pair, temperature == 0, filter)))
        recorded_logp = float(jax.nn.log_softmax(logits)[pair[1]])
    return drawn._replace(first_difference=index, margin=margin, recorded_logp=recorded_logp)


@partial(jax.jit, static_argnames="model_cfg")
def next_logits(model_cfg, params, tokens, temperature):
    """Returns the logits [V] of the token after `tokens` [1, L], for parameters placed by `place_for_rollout`."""
    segments = single_sequence(jnp.arange(tokens.shape[1])[None])
    hidden, _ = hidden_states(model_cfg, params, tokens, segments, layout="rollout", causal=True)
    return temperature_logits(model_cfg, head_matmul(model_cfg, params, hidden[:, -1]), temperature)[0]


@phase("Drawing the sample again")
def redraw_sample(cfg: Config, workdir: Path, name: SampleName) -> tuple[Redrawn, str]:
    """Draws a recorded sample again.

    Args:
        cfg: The run's config.
        workdir: The run.
        name: The sample.

    Returns:
        (drawn, note): The sample beside its record, and a line about what has changed since; empty if nothing has.

    Raises:
        UserError: There is no such record, its policy is not kept, or the config or the prompt has changed.
    """
    record = read_record(workdir, name)
    cfg = config_of_sample(cfg, workdir, name)
    base = read_base_model(cfg)
    tokens, ids = record["tokens"], range(base.model_cfg.vocab_size)
    if len(tokens) > cfg.rollout.max_tokens or not all(token in ids for token in tokens):
        raise UserError(
            f"The record must have at most rollout.max_tokens={cfg.rollout.max_tokens} tokens of the model's "
            f"vocabulary; found {len(tokens)} tokens {str(tokens[:20])[:80]}. Choose another --sample."
        )
    cfg, problem, note = find_problem(cfg, base, name, record)
    context = build_context(cfg, base)
    with jax.set_mesh(context.mesh):
        _, params = load_policy(cfg, context, workdir, base=name.policy_step == 0, step=name.policy_step)
        placed = place_for_rollout(context.model_cfg, params, context.rollout_mesh)
    return draw_again(cfg, context, placed, name, problem, record), note


def describe_redrawn(cfg: Config, drawn: Redrawn) -> str:
    """Formats a sample that was drawn again as a table with a row per token, and says whether it equals the record.

    The table ends at the first difference, because the following tokens are drawn from other contexts.
    """
    end, then = drawn.first_difference, drawn.record
    rows = [f"{'':>6}  {'log-prob':>9}  {'recorded':>9}  token"]
    shown = list(zip(drawn.logps, then["logps"], drawn.pieces, strict=False))[:end]
    rows += [f"{n:>6}  {now:>9.4f}  {before:>9.4f}  {piece!r}" for n, (now, before, piece) in enumerate(shown)]
    gap = f"their log-probs differ by at most {drawn.largest_gap():.1g}"
    if end is None:
        return "\n".join([*rows, f"All {len(drawn.tokens)} tokens are the recorded ones; {gap}."])
    if end == min(len(drawn.tokens), len(then["tokens"])):
        ends = f"it ends after {len(drawn.tokens)} tokens and the record after {len(then['tokens'])}"
        return "\n".join([*rows, f"The first {end} tokens are the recorded ones, but {ends}. {NOT_THE_SAME}"])
    rows.append(f"{end:>6}  {drawn.logps[end]:>9.4f}  {'':>9}  {drawn.pieces[end]!r}")
    rows.append(
        f"{'':>6}  {drawn.recorded_logp:>9.4f}  {then['logps'][end]:>9.4f}  {drawn.recorded_pieces[end]!r} (recorded)"
    )
    bound = ROUNDING["bfloat16" if "bfloat16" in (cfg.model.compute_dtype, cfg.model.logit_dtype) else "float32"]
    gaps = (drawn.largest_gap(), abs(drawn.recorded_logp - then["logps"][end]), drawn.margin)
    cause = "Rounding decided this near-tie." if max(gaps) <= bound else NOT_THE_SAME
    return "\n".join(
        [
            *rows,
            f"Token {end} is the first that is not the recorded one. Of the {end} tokens before it, {gap}. The draw "
            f"between the two tokens was decided by {drawn.margin:.1g} nats. {cause}",
        ]
    )


NOT_THE_SAME = "Rounding does not explain this: the model's files, the config or the code must have changed since."
