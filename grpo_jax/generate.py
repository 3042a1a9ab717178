"""Prints a completion of a run's policy, as it comes."""

import os
from collections.abc import Sequence

import jax
import numpy as np

from grpo_jax.draws import Filter
from grpo_jax.processes import several_processes
from grpo_jax.prompt import completion_text, encode_prompts
from grpo_jax.sampler import begin, place_for_rollout
from grpo_jax.setting import GENERATION, load_policy, prepare
from grpo_jax.slots import decode
from grpo_jax.types import Problem, UserError

TOKENS_A_CALL = 4  # tokens between two prints


def stream(config, setting, params, question: str, temperature: float, key):
    """Yields the text of a completion piece by piece.

    Args:
      params: placed for rollout.
    """
    prompts = encode_prompts(setting.tokenizer, [Problem(question, "", {})], [0], config.rollout.max_prompt_tokens)
    width, limit = prompts.tokens.shape[1], config.rollout.max_tokens
    scale, nothing = np.float32(temperature or 1.0), np.int32(0)
    how = dict(greedy=temperature == 0, filter=Filter(config.eval.top_k, config.eval.top_p, config.eval.min_p))
    state, work = begin(
        setting.model, params, prompts, key, np.full((1, 1), limit), slots=0, columns=width + limit,
        sampled=limit)
    shown = ""
    while True:
        state = decode(
            setting.model, params, state, work, setting.stop_table, scale, nothing, np.int32(TOKENS_A_CALL), **how)
        drawn = state.tokens[0, : int(state.lengths[0])]
        text = completion_text(setting.tokenizer, drawn, setting.stop_ids, config.rollout.stop_strings)
        ended = int(state.longest) == 0
        # A character may span several tokens: hold back what does not decode yet.
        ready = text if ended else text.rstrip("\N{REPLACEMENT CHARACTER}")
        yield ready[len(shown):]
        shown = ready
        if ended:
            return


def main(argv: Sequence[str]) -> None:
    from grpo_jax import config as configs
    from grpo_jax import flags

    parser = flags.make_parser(
        __doc__ + " The same prompt gives the same completion; --config.seed=1 gives another.",
        'python -m grpo_jax.generate --workdir=runs/r1zero --prompt="What is 347 + 589?"', of_a_run=True)
    parser.add_argument("--prompt", metavar="TEXT", help="the question; it is put into the template")
    parser.add_argument("--temperature", type=float,
                        help="0 is greedy; default: rollout.temperature (eval.top_k and the like apply)")
    options, raw, workdir = flags.parse(parser, argv)
    if not options.prompt:
        raise UserError('expected a question; found none; pass --prompt="What is 347 + 589?"')
    config = configs.check(raw)
    temperature = config.rollout.temperature if options.temperature is None else options.temperature
    if not 0 <= temperature < float("inf"):
        raise UserError(f"expected --temperature of 0 or more; found {temperature}")
    if several_processes(os.environ):
        raise UserError("expected one process to print a completion; found an environment of several; start it alone")
    setting = prepare(config)
    configs.check_model(config, setting.model)
    encode_prompts(setting.tokenizer, [Problem(options.prompt, "", {})], [0], config.rollout.max_prompt_tokens)
    with jax.set_mesh(setting.mesh):
        _, params = load_policy(config, setting, workdir, options.base)
        placed = place_for_rollout(setting.model, params, setting.mesh)
        key = jax.random.fold_in(jax.random.key(config.seed), GENERATION)
        for piece in stream(config, setting, placed, options.prompt, temperature, key):
            print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    from grpo_jax.flags import run

    run(main)
