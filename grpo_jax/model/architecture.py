"""Decoder architectures.

`ModelConfig` describes every supported model family. It is frozen and hashable, so that jitted functions can take it as
a static argument. Axis letters are those of the legend in `grpo_jax.types`.
"""

import dataclasses
import itertools
import math

NO_WINDOW = 2**30  # a sliding window that excludes no key


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embeddings (arXiv 2104.09864) and their scaling to contexts longer than in pretraining."""

    theta: float = 10000.0
    scaling: str = "default"  # one of grpo_jax.model.rope.ROPE_SCALINGS
    factor: float = 1.0  # context length divided by that of pretraining
    original_max_positions: int = 0  # llama3 and yarn: context length of pretraining
    low_freq_bound: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow
    high_freq_bound: float = 1.0  # llama3: high_freq_factor; yarn: beta_fast
    truncate: bool = True  # yarn: round the ends of the interpolation ramp to whole pairs
    attention_factor: float = 1.0  # yarn and longrope: multiplies cos and sin
    divisors: tuple[float, ...] = ()  # longrope: one for each frequency
    query_growth: float = 0.0  # growth of the queries with log(1 + position // original_max_positions)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """The settings that may differ between the layers of a model."""

    window: int = 0  # sliding window in tokens, including the query's own; 0: full attention
    rope: RopeConfig | None = RopeConfig()  # None: positions are not encoded
    use_experts: bool = False  # mixture of experts instead of a dense MLP


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The mixture of experts that replaces the MLP in layers with `use_experts`."""

    num_experts: int  # X
    num_experts_per_token: int  # k
    intermediate_size: int  # F of each expert
    shared_intermediate_size: int = 0  # F of the shared expert that every token passes through; 0: none
    sigmoid_gate: bool = False  # DeepSeek-V3's gate (arXiv 2412.19437, eq. 12-16) instead of a softmax over all experts
    normalize_weights: bool = True  # divide the weights of a token's experts by their sum, before `routed_scale`
    routed_scale: float = 1.0  # multiplies the weights
    num_groups: int = 1  # sigmoid gate: equal groups that the experts are divided into
    num_top_groups: int = 1  # sigmoid gate: best-scoring groups that a token's experts are chosen from


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), which caches one compressed vector per token."""

    q_lora_rank: int  # size of the compressed query; 0: queries are projected from the hidden state
    kv_lora_rank: int  # size of the compressed vector that keys and values are projected from
    qk_nope_head_dim: int  # part of a query and key head without rotary embedding
    qk_rope_head_dim: int  # part of a query and key head with rotary embedding; all heads share this part of the key
    v_head_dim: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder, where its weights came from, and how it is computed."""

    vocab_size: int  # V, rows of the embedding table
    hidden_size: int  # D
    intermediate_size: int  # F
    layers: tuple[LayerConfig, ...]
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # E
    max_positions: int  # longest supported sequence, in tokens
    norm_eps: float = 1e-5
    unit_offset: bool = False  # norms multiply by 1 + scale instead of scale
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # apply an RMS norm to every query and key head
    qk_norm_all_heads: bool = False  # that norm spans all query heads, and all key heads, instead of each head alone
    pre_norms: bool = True  # normalize the inputs of attention and MLP
    post_norms: bool = False  # normalize the outputs of attention and MLP, before the residual addition
    residual_scale: float = 1.0  # multiplies the outputs of attention and MLP, before the residual addition
    rotary_dim: int = 0  # leading dimensions of each head that the rotary embedding covers; 0: all
    rope_interleave: bool = False  # rotary pairs are adjacent, (2i, 2i + 1), instead of (i, i + rotary_dim / 2)
    embed_scale: float = 1.0  # multiplies the token embeddings
    score_divisor: float = 0.0  # divides the attention scores; 0: sqrt(E)
    score_softcap: float = 0.0  # replaces attention scores by cap * tanh(score / cap); 0: no cap
    logit_divisor: float = 1.0  # divides the logits
    logit_softcap: float = 0.0  # the same for logits, after the division
    tie_embeddings: bool = False  # the head is the transposed embedding table
    latent: LatentConfig | None = None
    experts: ExpertsConfig | None = None
    family: str = "llama"  # model_type in config.json
    tokenizer_vocab_size: int = 0  # ids that the tokenizer uses; higher ids are never sampled; 0: vocab_size
    eos_ids: tuple[int, ...] = ()
    source: str = ""  # folder or GGUF file that the weights were loaded from
    dtype: str = "float32"  # of the weights in `source`
    compute_dtype: str = "float32"  # of activations, and of weights when they are multiplied
    logit_dtype: str = "float32"  # of the product with the head; logits are converted to float32 afterwards
    attention: str = "auto"  # "plain", "blocks", "splash", "cudnn", or "auto": the best for the platform
    # Recomputed in the backward pass: "none", "matmuls" (all but matmuls and attention), "layers" (all but attention).
    remat: str = "none"

    @property
    def num_layers(self) -> int:
        """Returns the number of decoder layers."""
        return len(self.layers)

    @property
    def sampleable_vocab_size(self) -> int:
        """Returns the number of ids, from 0 on, that stand for a token; higher ids only pad the embedding table."""
        return self.tokenizer_vocab_size or self.vocab_size

    @property
    def effective_score_divisor(self) -> float:
        """Returns `score_divisor`, or its default."""
        return self.score_divisor or math.sqrt(self.head_dim)

    @property
    def layer_stacks(self) -> tuple[tuple[LayerConfig, ...], ...]:
        """Returns the layers, divided into stacks of consecutive layers whose parameters have the same shapes."""
        return tuple(tuple(stack) for _, stack in itertools.groupby(self.layers, key=lambda layer: layer.use_experts))
