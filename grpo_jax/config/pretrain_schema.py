"""Every config key of pretraining, declared as in `grpo_jax.config.schema`."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_jax.config.keys import key

if TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclass(frozen=True, kw_only=True)
class CorpusSection:
    """The synthetic corpus."""

    digits: int = key(3, "number of digits of both numbers in a sum", at_least=1, at_most=9)
    exercises: int = key(3, "number of worked sums after each question and its solution", at_least=1)


@dataclass(frozen=True, kw_only=True)
class BatchSection:
    """The batch of a pretraining step."""

    rows: int = key(64, "number of corpus texts per step, one per row", at_least=1)
    row_tokens: int = key(192, "number of tokens after which a text is truncated", at_least=1)


@dataclass(frozen=True, kw_only=True)
class NewModelSection:
    """The shape of the new model."""

    vocab_size: int = key(512, "rows of the embedding", at_least=300, because="it holds all bytes and some words")
    hidden_size: int = key(128, "model width", at_least=1)
    intermediate_size: int = key(384, "hidden width of the MLP", at_least=1)
    num_layers: int = key(4, "number of layers", at_least=1)
    num_heads: int = key(4, "number of query heads", at_least=1)
    num_kv_heads: int = key(2, "number of key/value heads", at_least=1)
    head_dim: int = key(32, "width of a head", at_least=1)
    max_positions: int = key(512, "longest sequence in tokens", at_least=1)
    tie_embeddings: bool = key(True, "whether the head and the embedding share their weights")


@dataclass(frozen=True, kw_only=True)
class PretrainOptimSection:
    """AdamW with a cosine schedule."""

    lr: float = key(2e-3, "peak learning rate", more_than=0)
    warmup_steps: int = key(50, "steps of linear warm-up to the peak learning rate", at_least=0)
    weight_decay: float = key(0.01, "AdamW's weight decay", at_least=0)
    grad_clip: float = key(1.0, "largest global norm of a gradient", more_than=0)


@dataclass(frozen=True, kw_only=True)
class PretrainLogSection:
    """Console lines."""

    every_steps: int = key(50, "number of steps between console lines", at_least=1)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The config of pretraining, which makes the tiny base model (configs/pretrain_tiny.py)."""

    job: str = key("pretrain", "the job that `grpo_jax.main` runs", choices=("pretrain",))
    seed: int = key(0, "seed of the corpus and of the initial weights", at_least=0)
    total_steps: int = key(800, "number of optimizer steps", at_least=1)
    corpus: CorpusSection = CorpusSection()
    batch: BatchSection = BatchSection()
    model: NewModelSection = NewModelSection()
    optim: PretrainOptimSection = PretrainOptimSection()
    log: PretrainLogSection = PretrainLogSection()


def pretrain_default() -> "ConfigDict":
    """Returns the default config of pretraining."""
    from ml_collections import ConfigDict

    return ConfigDict(dataclasses.asdict(PretrainConfig()))
