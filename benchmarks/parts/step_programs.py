"""Makes the data of the step that `step.py` measures, and compiles its programs ahead of time."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from common import Learner

from grpo_jax.config import Config
from grpo_jax.learn.update import make_experience, score_completions, take_rows
from grpo_jax.parallel.mesh import make_rollout_mesh, num_data_shards, shard_rows
from grpo_jax.rewards.parts import resolve_parts
from grpo_jax.rewards.pool import Grader
from grpo_jax.rollout.draws import NO_FILTER
from grpo_jax.rollout.memory import device_memory_bytes, plan_rollout
from grpo_jax.rollout.sampler import QueueRoom, cache_sizes, needed_room, pad_prompts, place_queue
from grpo_jax.rollout.slots import decode_tokens, init_decode, resize_cache
from grpo_jax.run.context import RunContext, resident_bytes
from grpo_jax.run.stages import (
    add_advantages,
    grade_completions,
    measure_rollout,
    pack_rows,
    plan_minibatches,
    rehome_key,
)
from grpo_jax.text.problem import Problem, Prompts
from grpo_jax.text.prompt import PromptFormat
from grpo_jax.text.stops import build_stop_table
from grpo_jax.types import Experience, PackedBatch, Rollout
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer
from parts import NotHere
from parts.shapes import QWEN_1_5B, random_learner, require_accelerator, shrink, training_config

NEEDED_GIB = 36  # policy, reference, Adam's moments, two copies of the gradient, and the activations of a row
SEED = 0


class Work(NamedTuple):
    """What a step works on."""

    cfg: Config
    context: RunContext
    learner: Learner
    problems: list[Problem]
    prompts: Prompts
    room: QueueRoom
    rows: tuple  # the sequences of the rollout on the devices, which cannot be placed while a program is traced
    slots: int  # decode slots of all data shards


class FoldedTokenizer:
    """Decodes token ids of a large vocabulary as ids of a small one."""

    def __init__(self, tokenizer):
        """Wraps the tokenizer of the small vocabulary."""
        self.tokenizer = tokenizer

    def decode(self, ids: list[int], **options) -> str:
        """Decodes token ids, each modulo the size of the small vocabulary."""
        size = len(self.tokenizer)
        return self.tokenizer.decode([token % size for token in ids], **options)


def make_work(small: bool) -> Work:
    """Builds the policy, the prompts and the context of a run.

    Raises:
        NotHere: The device is a CPU or has too little memory.
    """
    require_accelerator(jax.default_backend(), small)
    memory_gib = device_memory_bytes() / 2**30
    if not small and memory_gib < NEEDED_GIB:
        raise NotHere(f"a step needs {NEEDED_GIB} GiB of memory on one device; found {memory_gib:.1f}")
    prompts, samples, prompt_tokens, max_tokens = (4, 4, 64, 128) if small else (32, 16, 128, 1024)
    sizes = dict(prompts=prompts, samples=samples, max_prompt_tokens=prompt_tokens, max_tokens=max_tokens)
    cfg = training_config(**sizes, micro_tokens=512 if small else 4096)
    learner = random_learner(shrink(QWEN_1_5B) if small else QWEN_1_5B, cfg)
    model_cfg, mesh, source = learner.model_cfg, learner.mesh, find_model("tiny")
    tokenizer = FoldedTokenizer(load_tokenizer(source))
    plan = plan_rollout(
        cfg, model_cfg, mesh, resident_bytes(cfg, model_cfg, mesh, training=True), device_memory_bytes()
    )
    context = RunContext(
        source=source,
        model_cfg=model_cfg,
        prompt_format=PromptFormat(tokenizer.tokenizer),
        tokenizer=tokenizer,
        stop_ids=(),
        stop_table=build_stop_table(model_cfg.vocab_size, (), (), None),
        mesh=mesh,
        rollout_mesh=make_rollout_mesh(mesh, plan.tensor, plan.expert),
        rollout_plan=plan,
        grader=Grader(cfg, resolve_parts(cfg), tokenizer, ()),
    )
    tokens = np.random.default_rng(SEED).integers(model_cfg.vocab_size, size=(prompts, prompt_tokens))
    problems = [Problem(f"What is {n} + {n}?", str(2 * n)) for n in range(prompts)]
    padded, limits = pad_prompts(tokens.tolist()), np.full((prompts, samples), max_tokens)
    with jax.set_mesh(mesh):
        room = needed_room(*limits.shape, num_data_shards())
        rows, slots = place_queue(padded, limits, plan.slots, room)
    return Work(cfg, context, learner, problems, padded, room, rows, slots)


def grade(work: Work, experience: Experience, rollout: Rollout) -> Experience:
    """Decodes and grades a rollout as training does, but adds the advantages of random rewards."""
    grades, rewards = grade_completions(work.cfg, work.context, work.problems, rollout)
    noise = np.random.default_rng(SEED).standard_normal(len(rewards.total))
    rewards = rewards._replace(total=noise.astype(np.float32))
    experience = add_advantages(work.cfg, experience, rollout, rewards)
    measure_rollout(work.cfg, experience, rollout, grades, rewards, seconds=1.0)
    return experience


def pack_update(work: Work, experience: Experience) -> PackedBatch:
    """Packs the minibatch of the update, on the host."""
    (rows,) = plan_minibatches(work.cfg, experience, jax.random.key(SEED), 0)
    return pack_rows(work.cfg, work.context.mesh, take_rows(experience, rows), len(experience.mask))


def random_rollout(work: Work) -> Rollout:
    """Returns a rollout of random completions of full length, on the host."""
    shape = len(work.prompts.ids), work.cfg.rollout.samples, work.cfg.rollout.max_tokens
    vocab_size = work.context.model_cfg.vocab_size
    return Rollout(
        tokens=np.random.default_rng(SEED).integers(vocab_size, size=shape, dtype=np.int32),
        logps=np.zeros(shape, np.float32),
        lengths=np.full(shape[:2], shape[2], np.int32),
        truncated=np.ones(shape[:2], bool),
        prompt_ids=work.prompts.ids,
    )


def all_cache_sizes(work: Work) -> list[int]:
    """Returns the numbers of columns that the KV cache has during a rollout, in order."""
    width = work.prompts.tokens.shape[1]
    return cache_sizes(width, width + work.cfg.rollout.max_tokens)


def start(work: Work, placed):
    """Starts the rollout as training does: prefills the prompts and fills the decode slots."""
    model_cfg, key, max_tokens = work.context.model_cfg, rehome_key(jax.random.key(SEED)), work.cfg.rollout.max_tokens
    sizes = dict(columns=all_cache_sizes(work)[0], max_tokens=max_tokens, prefill=work.room.prefill)
    return init_decode(model_cfg, placed, *work.rows, key, slots=work.slots, **sizes)


def visit_cache_sizes(work: Work, visit: Callable, placed) -> None:
    """Starts a rollout and calls `visit(columns, placed, state, queue)` for each size of its KV cache.

    Each call has to return a state, which the next call gets with a larger cache.
    """
    state, queue = start(work, placed)
    for columns in all_cache_sizes(work):
        if columns != state.kv_cache[0].k.shape[-1]:
            layers, state = list(state.kv_cache), state.replace(kv_cache=())
            for i in range(len(layers)):  # one by one, as in a rollout, so that two whole caches never exist at once
                layers[i] = resize_cache(layers[i], columns)
            state = state.replace(kv_cache=tuple(layers))
        state = visit(columns, placed, state, queue)


def decode_arguments(work: Work, placed, state, queue, max_steps: int) -> tuple[tuple, dict]:
    """Returns the arguments with which a rollout calls `decode_tokens`, if it does not shrink its cache."""
    scale, table = np.float32(work.cfg.rollout.temperature), work.context.stop_table
    arguments = work.context.model_cfg, placed, state, queue, table, scale, np.int32(0), np.int32(max_steps)
    return arguments, dict(greedy=False, filter=NO_FILTER)


def decode(work: Work, placed, state, queue, max_steps: int):
    """Decodes up to `max_steps` tokens per slot and returns the new state. The old one is donated."""
    arguments, options = decode_arguments(work, placed, state, queue, max_steps)
    return decode_tokens(*arguments, **options)


def score_options(cfg: Config) -> dict[str, Any]:
    """Returns the options with which training calls `score_completions`."""
    return dict(temperature=cfg.rollout.temperature, chunk_tokens=cfg.train.chunk_tokens)


def compile_programs(work: Work, placed, seconds_left: Callable[[], float]) -> bool:
    """Compiles all programs of a step, several at a time. Returns False if there is not enough time.

    Only one thread can trace and lower at a time, so this one does, while others compile. Later calls with arguments of
    the same shapes and shardings find the compiled programs.

    On a GPU, autotuning the matmuls of decoding takes longest. They are the same for all sizes of the KV cache and in
    the part `rollout` with as many slots. If that part has run, the compilation cache has the results of autotuning.
    """
    learner, pool, compiling = work.learner, ThreadPoolExecutor(os.cpu_count()), []

    def start_once() -> None:
        with jax.set_mesh(work.context.mesh):
            start(work, placed)

    def trace_decode(columns: int, placed, state, queue):
        return decode(work, placed, state, queue, 0)

    def lower_decode(columns: int, placed, state, queue):
        arguments, options = decode_arguments(work, placed, state, queue, 0)
        compiling.append(pool.submit(decode_tokens.lower(*arguments, **options).compile))
        return state

    starting = pool.submit(start_once)  # lowering decoding needs the shardings of the results
    rollout = random_rollout(work)
    experience = make_experience(work.prompts, rollout)
    batch = shard_rows(work.context.mesh, pack_update(work, experience))
    compiling.append(pool.submit(learner.update.lower(learner.state, batch).compile))
    scoring = score_completions.lower(learner.model_cfg, learner.reference, batch, **score_options(work.cfg))
    compiling.append(pool.submit(scoring.compile))
    jax.eval_shape(partial(visit_cache_sizes, work, trace_decode), placed)  # the traces are reused when lowering
    starting.result()
    visit_cache_sizes(work, lower_decode, placed)
    grade(work, experience, rollout)  # compiles the small programs of grading
    ready, waiting = wait(compiling, max(0.0, seconds_left() - 1))  # leaves a second to report what is missing
    pool.shutdown(wait=False)
    for program in ready:
        program.result()
    return not waiting


def count_compilations() -> list[str]:
    """Returns a list that gets a name whenever JAX compiles a program or loads one from the compilation cache."""
    compiled = []

    def listen(event: str, seconds: float, **details) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled
