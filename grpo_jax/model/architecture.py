"""What a decoder is made of: ModelConfig. Hashable, so that it is a static argument of jitted functions."""

import dataclasses
import itertools
import math


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864) and how they are stretched beyond the length they were trained at."""

    theta: float = 10000.0
    scaling: str = "default"  # one of grpo_jax.model.rope.SCALINGS
    factor: float = 1.0
    original_positions: int = 0  # llama3, yarn: the length before stretching
    slow: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow
    fast: float = 1.0  # llama3: high_freq_factor; yarn: beta_fast
    whole: bool = True  # yarn: the ramp's ends are whole numbers
    magnitude: float = 1.0  # factor on cos and sin


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer."""

    window: int = 0  # a token sees itself and the window - 1 tokens before it; 0: all before it
    rope: RopeConfig = RopeConfig()
    experts: bool = False  # a mixture of experts instead of one MLP


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of an MLP."""

    count: int  # X
    per_token: int
    width: int  # F of each
    shared_width: int = 0  # of an MLP that every token takes besides
    sigmoid: bool = False  # DeepSeek-V3's gate (arXiv 2412.19437, eq. 12-16); else a softmax over all experts
    normalize: bool = True  # the chosen experts' weights sum to 1 (before `scale`)
    scale: float = 1.0
    groups: int = 1  # sigmoid gate: experts come in groups,
    groups_kept: int = 1  # and are chosen from the best of them


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are made from one small vector."""

    q_rank: int  # 0: queries are made from the hidden state itself
    kv_rank: int
    plain_width: int  # of a head's query and key, the part without position
    rope_width: int  # the part with it, whose key all heads share
    value_width: int
    interleaved: bool = True  # rotary pairs are neighbours, not halves


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, where it came from, and the precision it computes in."""

    vocab_size: int  # V, rows of the embedding
    hidden_size: int  # D
    intermediate_size: int  # F
    layers: tuple[LayerConfig, ...]
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # E
    max_positions: int  # the longest row the model is made for, in tokens
    norm_eps: float = 1e-5
    unit_offset: bool = False  # norms multiply by 1 + scale
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # of every head's query and key
    post_norms: bool = False  # attention's and MLP's outputs are normed too
    embed_scale: float = 1.0
    score_divisor: float = 0.0  # of attention scores; 0: sqrt(E)
    score_cap: float = 0.0  # scores become cap * tanh(score / cap); 0: no cap
    logit_cap: float = 0.0  # the same of logits
    tie_embeddings: bool = False  # the head is the embedding, transposed
    latent: LatentConfig | None = None
    experts: ExpertsConfig | None = None
    family: str = "llama"  # model_type of config.json
    token_count: int = 0  # ids the tokenizer knows; rows beyond are never drawn. 0: all rows are ids
    eos_ids: tuple[int, ...] = ()
    source: str = ""  # the folder or GGUF file it was loaded from
    dtype: str = "float32"  # of the weights there
    compute_dtype: str = "float32"  # of activations, and of weights where they are used
    logit_dtype: str = "float32"  # that the head's product comes in; probabilities are float32
    attention: str = "auto"  # how it is computed: "plain", "blocks", "splash", "cudnn", or what suits the platform
    remat: str = (
        "none"  # what a backward pass computes again: "none", "matmuls" (all but them), "layers" (but attention)
    )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def drawable(self) -> int:
        """How many of the V columns of the logits stand for a token."""
        return self.token_count or self.vocab_size

    @property
    def divisor(self) -> float:
        """What attention scores are divided by."""
        return self.score_divisor or math.sqrt(self.head_dim)

    @property
    def runs(self) -> tuple[tuple[LayerConfig, ...], ...]:
        """The layers cut where their parameters change shape: each run is one stack of parameters."""
        return tuple(tuple(run) for _, run in itertools.groupby(self.layers, key=lambda layer: layer.experts))
