"""Derives the config keys that are not set from the model, the problems and the machine, for configs/own.py.

Every rule prints a line with its reason. A key that is set keeps its value, and the rules for other keys use that
value. docs/own.md lists the rules.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.rewards.verify import format
from grpo_jax.run.context import BaseModel
from grpo_jax.run.derivation import Derivation, Machine
from grpo_jax.run.derive_memory import choose_memory
from grpo_jax.run.prompt_limit import LIMIT_MULTIPLE
from grpo_jax.tasks.problem_list import ProblemList
from grpo_jax.tasks.streams import problems_to_check
from grpo_jax.tasks.task import Task
from grpo_jax.text.answers import judge
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import CHAT_DATE, PromptFormat, completion_eos_ids

INSTRUCTION = (
    "Think about the question first, and then give the answer. Enclose the reasoning process in <think> </think> tags "
    "and the answer in <answer> </answer> tags, that is, <think> reasoning process here </think> <answer> answer here "
    "</answer>."
)

# For files without solutions. They show the tags, not how to solve the problems.
GENERAL_EXAMPLES = (
    "What is 17 + 25?",
    "<think> 17 + 25 = 42 </think> <answer> 42 </answer>",
    "Ben has 3 boxes of 6 eggs and uses 2 eggs. How many eggs are left?",
    "<think> The boxes hold 3 * 6 = 18 eggs. 18 - 2 = 16 are left. </think> <answer> 16 </answer>",
)
NEEDS_EXAMPLES = 1e9  # smaller models seldom use the tags unless examples show them
MIN_PROBLEMS = 20  # with fewer problems that have solutions, none of them becomes an example

CORE_FLOPS = 4e10  # per second and core of a CPU, in float32
TOKEN_FLOPS = 18  # per parameter and completion token: sampling, scoring by the reference, and the update
PROMPT_FLOPS = 12  # per parameter and prompt token, which all completions of a group share
UPDATE_SECONDS = 60  # of an update on a CPU
MIN_TOKENS = 64  # of the longest completion


class Solutions(NamedTuple):
    """The lengths of the solutions in a file, in tokens."""

    count: int  # 0 if the file has none
    long: int  # the 95th percentile


def derive(
    cfg: Config, given: Collection[str], base: BaseModel, task: Task, machine: Machine
) -> tuple[dict[str, Any], list[str]]:
    """Derives the keys of a run.

    Args:
        cfg: A checked config with `derive` on.
        given: The keys that keep their values.
        base: The base model, with any prompt format.
        task: The task of the run.
        machine: The devices.

    Returns:
        (values, lines): The derived keys with their values, including `derive` off, and the lines to print.

    Raises:
        UserError: A problem cannot be encoded, or training does not fit in memory.
    """
    chosen = Derivation(cfg, given)
    train, held_out = problems_to_check(task, cfg.seed, cfg.eval.questions)
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(base.model_cfg)))
    problems = len(train) if isinstance(task, ProblemList) else 0
    choose_template(chosen, base)
    prompt_tokens = choose_examples(chosen, base, train, held_out, count)
    if isinstance(task, ProblemList):
        choose_prompt_limit(chosen, base.model_cfg, prompt_tokens)
    solutions = measure_solutions(base, train)
    choose_batch(chosen, base.model_cfg, solutions, machine, count, prompt_tokens, problems)
    choose_memory(chosen, base.model_cfg, machine)
    choose_schedule(chosen, machine, count, problems, len(held_out))
    heading = "Derived from the model, the problems and the machine (--config.KEY=VALUE sets a key):"
    return chosen.values | {"derive": False}, [heading, *chosen.lines]


def choose_template(chosen: Derivation, base: BaseModel) -> None:
    """Chooses between the chat template of the tokenizer and R1-Zero's, and what ends a completion."""
    tokenizer = base.prompt_format.tokenizer
    stop_ids = completion_eos_ids(tokenizer, base.model_cfg.eos_ids, base.model_cfg.vocab_size)
    is_chat, why = speaks_chat(tokenizer, stop_ids)
    chosen.choose(why, {"prompt.template": "chat" if is_chat else "r1zero"})
    if chosen["prompt.template"] == "chat":
        chosen.choose("a chat template does not say how to answer", {"prompt.instruction": INSTRUCTION})
        chosen.choose("an answer ends a completion, like EOS", {"rollout.stop_strings": ("</answer>",)})
    else:
        reason = "an answer ends a completion, and so does another question that the model writes"
        chosen.choose(reason, {"rollout.stop_strings": ("</answer>", "User:")})


def speaks_chat(tokenizer: Any, stop_ids: Sequence[int]) -> tuple[bool, str]:
    """Returns whether a model was trained on the chat template of its tokenizer, and the reason.

    Base models often come with the template of the corresponding chat models, but they do not end their turns.
    """
    if not tokenizer.chat_template:
        return False, "the tokenizer has no chat template: probably a base model"
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "two"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, date_string=CHAT_DATE)
        opening = PromptFormat(tokenizer, "chat").text(Problem("1 + 1?", "")).rpartition("1 + 1?")[2]
    except Exception:  # a template may raise anything
        return False, "the tokenizer's chat template does not accept a conversation"
    ending = tokenizer(text.rpartition("two")[2], add_special_tokens=False)["input_ids"]
    if not set(ending) & set(stop_ids):
        return False, "the turns of the chat template do not end with an EOS of the model: probably a base model"
    if "<think>" in opening:
        return False, "the chat template writes <think> itself, which the format reward expects from the model"
    return True, "the tokenizer has a chat template, whose turns end with an EOS of the model"


def choose_examples(
    chosen: Derivation, base: BaseModel, train: Sequence[Problem], held_out: Sequence[Problem], count: int
) -> int:
    """Chooses solved examples for small models, and returns the length of the longest prompt in tokens."""
    options = dict(
        instruction=chosen["prompt.instruction"],
        examples=chosen["prompt.examples"],
        vocab_size=base.model_cfg.vocab_size,
    )
    texts: Sequence[str] = ()
    if count < NEEDS_EXAMPLES and "prompt.examples" not in chosen.given:
        texts, reason = solved_examples(train), "solved problems from the file show the tags"
        if not texts:
            texts, reason = GENERAL_EXAMPLES, "the file has no solutions to show, so simple problems show the tags"
        options["examples"] = texts

    def longest() -> int:
        prompt_format = PromptFormat(base.prompt_format.tokenizer, chosen["prompt.template"], **options)
        problems = [*train, *held_out]
        names = [problem.id or f"problem {i}" for i, problem in enumerate(problems)]
        return int(prompt_format.lengths(problems, names, most=base.model_cfg.max_positions).max())

    tokens = longest()
    if texts and 2 * tokens > base.model_cfg.max_positions:
        texts, options["examples"] = (), ()
        tokens = longest()
    if texts:
        size = f"models with less than {NEEDS_EXAMPLES / 1e9:.0f}B parameters seldom use the tags by themselves"
        chosen.choose(f"{size}; {len(texts) // 2} {reason}", {"prompt.examples": tuple(texts)})
    return tokens


def solved_examples(problems: Sequence[Problem]) -> list[str]:
    """Returns two solved problems as alternating questions and completions; empty if too few problems have solutions.

    One has about the lower quartile of the lengths and the other about the median. Their answers differ, and their
    completions would get the full reward.
    """
    solved = [problem for problem in problems if problem.solution and isinstance(problem.question, str)]
    solved.sort(key=lambda problem: (len(problem.question) + len(problem.solution), problem.question))
    texts: list[str] = []
    answers: set[str] = set()
    for start in (len(solved) // 4, len(solved) // 2) if len(solved) >= MIN_PROBLEMS else ():
        for problem in solved[start:]:
            text = f"<think> {problem.solution} </think> <answer> {problem.answer} </answer>"
            if problem.answer not in answers and format([text])[0] and judge(text, problem.answer).correct:
                texts += [problem.question, text]
                answers.add(problem.answer)
                break
    return texts


def choose_prompt_limit(chosen: Derivation, model_cfg: ModelConfig, longest: int) -> None:
    """Chooses the prompt limit. If it would leave no room for completions, `fit_prompts` raises an error later."""
    limit = round_up(longest)
    if limit + MIN_TOKENS <= model_cfg.max_positions:
        chosen.choose(f"longest prompt {longest:,} tokens", {"rollout.max_prompt_tokens": limit})


def round_up(tokens: float) -> int:
    """Returns the next multiple of `LIMIT_MULTIPLE`."""
    return -int(-tokens // LIMIT_MULTIPLE) * LIMIT_MULTIPLE


def measure_solutions(base: BaseModel, problems: Sequence[Problem]) -> Solutions:
    """Measures up to 500 solutions."""
    texts = [problem.solution for problem in problems if problem.solution][:500]
    if not texts:
        return Solutions(0, 0)
    lengths = [
        len(ids) for ids in base.prompt_format.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    return Solutions(len(texts), int(np.quantile(lengths, 0.95)))


def choose_batch(
    chosen: Derivation,
    model_cfg: ModelConfig,
    solutions: Solutions,
    machine: Machine,
    count: int,
    prompt_tokens: int,
    problems: int,
) -> None:
    """Chooses the completion limit, and the numbers of prompts and completions of a rollout.

    On a CPU, an update should take about `UPDATE_SECONDS` if completions are half as long as the limit. On
    accelerators, the sizes are those of the presets for models of this size, which leave room for longer reasoning.
    """
    is_cpu, room = machine.platform == "cpu", model_cfg.max_positions - round_up(prompt_tokens)
    said = f"95% of the solutions have at most {solutions.long:,} tokens"
    said = said if solutions.count else "the problems have no solutions to measure"
    samples = chosen["rollout.samples"] if "rollout.samples" in chosen.given else 8 if is_cpu else 16
    if is_cpu:
        work = UPDATE_SECONDS * machine.cores * CORE_FLOPS / count
        wanted = 2 * solutions.long + 64 if solutions.count else 256
        fewest = chosen["rollout.prompts"] if "rollout.prompts" in chosen.given else 2
        affordable = 2 * (work / fewest - PROMPT_FLOPS * prompt_tokens) / (TOKEN_FLOPS * samples)
        if wanted > affordable:
            said += f", longer completions would take too long on {machine.cores} cores"
        tokens = min(round_up(wanted), int(affordable) // LIMIT_MULTIPLE * LIMIT_MULTIPLE)
    else:
        tokens = 1024 if count < 2e9 else 2048 if count < 5e9 else 4096
        tokens = max(tokens, round_up(4 * solutions.long))
    # Prompts that leave no room are refused or left out later, and must not decide this.
    tokens = min(max(tokens, MIN_TOKENS), room if room >= MIN_TOKENS else model_cfg.max_positions // 2)
    said += f", and the model has {model_cfg.max_positions:,} positions"
    chosen.choose(said, {"rollout.max_tokens": tokens})

    if is_cpu:
        cost = count * (samples * TOKEN_FLOPS * chosen["rollout.max_tokens"] / 2 + PROMPT_FLOPS * prompt_tokens)
        speed = machine.cores * CORE_FLOPS
        prompts = min(16, max(2, int(UPDATE_SECONDS * speed / cost)))
    else:
        prompts = max(32, machine.devices)
    prompts = min(prompts, problems or prompts)
    used = chosen["rollout.prompts"] if "rollout.prompts" in chosen.given else prompts
    reason = f"for {count:,} parameters on {machine.devices} {machine.name} device{'s' * (machine.devices > 1)}"
    if is_cpu:
        seconds = max(1, round(used * cost / speed))
        reason += f" with {machine.cores} cores, an update should take about {seconds:,} s"
    chosen.choose(reason, {"rollout.prompts": prompts, "rollout.samples": samples})


def choose_schedule(chosen: Derivation, machine: Machine, count: int, problems: int, held_out: int) -> None:
    """Chooses the learning rate, the number of updates, and how often a run evaluates, saves and reports."""
    rates = ((1e7, 1.5e-4), (4e8, 1e-5), (float("inf"), 1e-6))
    rate = next(rate for size, rate in rates if count < size)
    chosen.choose(f"smaller models need larger learning rates; this one has {count:,} parameters", {"optim.lr": rate})
    is_cpu, is_slow = machine.platform == "cpu", count >= 1e7
    most = 100 if is_cpu else 1000
    passes, prompts = 3 if is_cpu else 10, chosen["rollout.prompts"]
    steps = min(most, max(20, -(-passes * problems // prompts))) if problems else most
    seen = f", which use each of {problems:,} problems {steps * prompts / problems:.1f} times" if problems else ""
    chosen.choose(f"a first run of {steps} updates{seen}; raise it to train longer", {"total_steps": steps})
    every = 5 if is_cpu and is_slow else 20 if is_cpu else 50
    if problems and chosen["eval.questions"]:
        questions = min(held_out, 64 if is_cpu and is_slow else 256)
        chosen.choose(f"{held_out:,} problems are held out", {"eval.questions": questions})
    if chosen["eval.questions"]:
        chosen.choose("to show progress early", {"eval.every_steps": max(10, steps // 5)})
    reason = "an interruption should cost only minutes, and slow updates get a line each"
    chosen.choose(reason, {"checkpoint.every_steps": every, "log.every_steps": 1 if is_slow else 5})
