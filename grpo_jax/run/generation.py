"""Streams one completion of a policy."""

from collections.abc import Iterator

import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.rollout.draws import TokenFilter
from grpo_jax.rollout.sampler import start_rollout
from grpo_jax.rollout.slots import decode_tokens
from grpo_jax.run.context import RunContext
from grpo_jax.text.decoding import decode_completion
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import encode_prompts

TOKENS_PER_PIECE = 4  # tokens decoded between two pieces of text


def stream_completion(cfg: Config, context: RunContext, params, question: str, key) -> Iterator[str]:
    """Yields the text of a completion piece by piece, as it is decoded.

    Args:
        cfg: The run's config; the temperature (0 is greedy) and the filters of its `eval` section apply.
        context: The run's context.
        params: The policy, placed by `place_for_rollout`.
        question: The question, which is inserted into the template.
        key: The random key.
    """
    prompts = encode_prompts(context.prompt_format, [Problem(question, "")], [0], cfg.rollout.max_prompt_tokens)
    max_tokens = cfg.rollout.max_tokens
    limits = np.full((1, 1), max_tokens)
    columns = prompts.tokens.shape[1] + max_tokens  # the cache never has to grow
    state, queue = start_rollout(
        context.model_cfg, params, prompts, key, limits, slots=0, columns=columns, max_tokens=max_tokens
    )
    yielded = ""
    while True:
        state = decode_tokens(
            context.model_cfg,
            params,
            state,
            queue,
            context.stop_table,
            np.float32(cfg.eval.temperature or 1.0),
            np.int32(0),
            np.int32(TOKENS_PER_PIECE),
            greedy=cfg.eval.temperature == 0,
            filter=TokenFilter(cfg.eval.top_k, cfg.eval.top_p, cfg.eval.min_p),
        )
        tokens = state.tokens[0, : int(state.lengths[0])]
        text = decode_completion(context.tokenizer, tokens, context.stop_ids, cfg.rollout.stop_strings)
        is_done = int(state.longest) == 0
        # A character may span several tokens: hold back an incomplete one until its last token is there.
        ready = text if is_done else text.rstrip("\N{REPLACEMENT CHARACTER}")
        yield ready[len(yielded) :]
        yielded = ready
        if is_done:
            return
