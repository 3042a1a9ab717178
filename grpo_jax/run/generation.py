"""Streams one completion of a policy."""

import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.rollout.draws import TokenFilter
from grpo_jax.rollout.sampler import start_rollout
from grpo_jax.rollout.slots import decode_tokens
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import decode_completion, encode_prompts

TOKENS_PER_PRINT = 4  # tokens between two prints


def stream_completion(cfg: Config, context, params, question: str, temperature: float, key):
    """Yields the text of a completion piece by piece.

    Args:
      params: placed for rollout.
    """
    prompts = encode_prompts(context.tokenizer, [Problem(question, "", {})], [0], cfg.rollout.max_prompt_tokens)
    width, limit = prompts.tokens.shape[1], cfg.rollout.max_tokens
    scale, nothing = np.float32(temperature or 1.0), np.int32(0)
    how = dict(greedy=temperature == 0, filter=TokenFilter(cfg.eval.top_k, cfg.eval.top_p, cfg.eval.min_p))
    state, work = start_rollout(
        context.model_cfg,
        params,
        prompts,
        key,
        np.full((1, 1), limit),
        slots=0,
        columns=width + limit,
        max_tokens=limit,
    )
    shown = ""
    while True:
        state = decode_tokens(
            context.model_cfg,
            params,
            state,
            work,
            context.stop_table,
            scale,
            nothing,
            np.int32(TOKENS_PER_PRINT),
            **how,
        )
        drawn = state.tokens[0, : int(state.lengths[0])]
        text = decode_completion(context.tokenizer, drawn, context.stop_ids, cfg.rollout.stop_strings)
        ended = int(state.longest) == 0
        # A character may span several tokens: hold back what does not decode yet.
        ready = text if ended else text.rstrip("\N{REPLACEMENT CHARACTER}")
        yield ready[len(shown) :]
        shown = ready
        if ended:
            return
