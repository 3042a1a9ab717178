"""Pretrains the tiny base model that ships with the package, with next-token loss on the synthetic corpus.

Reinforcement learning starts from its result and takes no supervised step itself.
"""

import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.config.pretrain_schema import PretrainConfig
from grpo_jax.errors import UserError
from grpo_jax.learn.logprobs import logprobs_from_hidden
from grpo_jax.model.architecture import LayerConfig, ModelConfig
from grpo_jax.model.decoder import hidden_states, init_params
from grpo_jax.model.mask import single_sequence
from grpo_jax.run.progress import announce, close_bar, phase, set_detail, step_bar
from grpo_jax.tiny.corpus import EOS_TOKEN, corpus_text, train_tokenizer
from grpo_jax.weights.writing import save

TOKENIZER_TEXTS = 2000  # corpus texts that the tokenizer is trained on


def next_token_loss(
    model_cfg: ModelConfig, params: dict, tokens: Int[Array, "N L"], mask: Bool[Array, "N L"]
) -> Float[Array, ""]:
    """Returns the mean of -log p(token | previous tokens), in nats, over all real tokens but the first of each row."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = hidden_states(model_cfg, params, tokens, single_sequence(positions))
    logps, _ = logprobs_from_hidden(model_cfg, params, hidden[:, :-1], tokens[:, 1:], temperature=1.0)
    return -jnp.sum(logps * mask[:, 1:]) / jnp.sum(mask[:, 1:])


def corpus_batch(tokenizer, cfg: PretrainConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the batch of a step, truncated to L tokens: int32 tokens and bool mask, [N, L], True on real tokens."""
    tokens = np.zeros((cfg.batch.rows, cfg.batch.row_tokens), np.int32)
    mask = np.zeros(tokens.shape, bool)
    first = step * cfg.batch.rows
    texts = [corpus_text(cfg.seed, first + i, cfg.corpus.exercises, cfg.corpus.digits) for i in range(cfg.batch.rows)]
    for row, encoded in enumerate(tokenizer.encode_batch(texts)):
        ids = encoded.ids[: cfg.batch.row_tokens]
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return tokens, mask


@phase("Pretraining")
def pretrain(cfg: PretrainConfig, workdir: Path) -> Path:
    """Trains a tokenizer and a model from scratch and writes them to the model folder `workdir/model`.

    Returns:
        The model folder.

    Raises:
        UserError: The workdir already has a model, or belongs to a run.
    """
    folder = Path(workdir) / "model"
    for path in (folder, Path(workdir) / "config.json"):
        if path.exists():
            raise UserError(
                f"Pretraining needs a workdir that holds neither a model nor a run; found {path}. Choose another "
                "--workdir."
            )
    start = time.monotonic()
    texts = [corpus_text(cfg.seed + 1, i, cfg.corpus.exercises, cfg.corpus.digits) for i in range(TOKENIZER_TEXTS)]
    tokenizer = train_tokenizer(texts, cfg.model.vocab_size)
    shape = {name: value for name, value in vars(cfg.model).items() if name != "num_layers"}
    layers, eos_ids = (LayerConfig(),) * cfg.model.num_layers, (tokenizer.token_to_id(EOS_TOKEN),)
    model_cfg = ModelConfig(**shape, layers=layers, tokenizer_vocab_size=tokenizer.get_vocab_size(), eos_ids=eos_ids)
    optim = cfg.optim
    schedule = optax.warmup_cosine_decay_schedule(0.0, optim.lr, optim.warmup_steps, cfg.total_steps, optim.lr * 0.01)
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=optim.weight_decay)
    optimizer = optax.chain(optax.clip_by_global_norm(optim.grad_clip), adamw)
    params = init_params(model_cfg, jax.random.key(cfg.seed))
    opt_state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, tokens, mask):
        loss, grads = jax.value_and_grad(lambda p: next_token_loss(model_cfg, p, tokens, mask))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    announce(
        f"{num_params:,} parameters, {tokenizer.get_vocab_size()} token ids, {cfg.total_steps} steps of "
        f"{cfg.batch.rows} x {cfg.batch.row_tokens} tokens"
    )
    losses, bar = [], step_bar(cfg.total_steps, 0)
    for step in range(cfg.total_steps):
        set_detail(f"step {step + 1}/{cfg.total_steps}")
        params, opt_state, loss = update(params, opt_state, *corpus_batch(tokenizer, cfg, step))
        losses.append(loss)
        bar.update()
        if (step + 1) % cfg.log.every_steps == 0:
            announce(f"step {step + 1}: loss {np.mean(losses[-cfg.log.every_steps :]):.4f}")
    close_bar()
    write_model_folder(folder, model_cfg, params, tokenizer)
    announce(f"loss {np.mean(losses[-50:]):.4f} (last 50 steps), {time.monotonic() - start:.0f} s; wrote {folder}")
    return folder


def write_model_folder(folder: Path, model_cfg: ModelConfig, params: dict, tokenizer) -> None:
    """Writes a Hugging Face folder with weights, config and tokenizer."""
    save(folder, model_cfg, params)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS_TOKEN}
    tokenizer_config |= {"clean_up_tokenization_spaces": False, "model_max_length": model_cfg.max_positions}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
