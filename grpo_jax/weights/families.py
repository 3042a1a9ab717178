"""The model families: from a Hugging Face config.json to a ModelConfig, and the names of their tensors.

One decoder serves all of them; what sets a family apart is a few fields here and a few rows of `TABLE`. Older and newer
forms of config.json, and fields left out, are made one by `transformers`' own config classes, which need no torch.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ExpertsConfig, LatentConfig, LayerConfig, ModelConfig, RopeConfig
from grpo_jax.model.layers import ACTIVATIONS
from grpo_jax.model.rope import ROPE_SCALINGS, yarn_attention_factor

FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "deepseek_v3",
)


# Fields that lists are made from; a broken file must not make them long.
BOUNDED_FIELDS = (
    "num_hidden_layers",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "head_dim",
    "qk_rope_head_dim",
)


class TensorRow(NamedTuple):
    """How one tensor of a checkpoint becomes (a layer, or an expert of a layer, of) one of our leaves."""

    ours: str  # path in the parameter tree; of a layer, the path in its run
    theirs: str  # {i} is the layer, {x} the expert
    transpose: bool = False  # torch's Linear keeps [outputs, inputs]; ours is [inputs, outputs]


LINEAR_LAYERS = (  # ours, theirs: a weight, and a bias where the family has one
    ("attention/q", "layers.{i}.self_attn.q_proj"),
    ("attention/k", "layers.{i}.self_attn.k_proj"),
    ("attention/v", "layers.{i}.self_attn.v_proj"),
    ("attention/o", "layers.{i}.self_attn.o_proj"),
    ("attention/q_a", "layers.{i}.self_attn.q_a_proj"),
    ("attention/q_b", "layers.{i}.self_attn.q_b_proj"),
    ("attention/kv_a", "layers.{i}.self_attn.kv_a_proj_with_mqa"),
    ("mlp/gate", "layers.{i}.mlp.gate_proj"),
    ("mlp/up", "layers.{i}.mlp.up_proj"),
    ("mlp/down", "layers.{i}.mlp.down_proj"),
    ("moe/shared/gate", "layers.{i}.mlp.shared_experts.gate_proj"),
    ("moe/shared/up", "layers.{i}.mlp.shared_experts.up_proj"),
    ("moe/shared/down", "layers.{i}.mlp.shared_experts.down_proj"),
)

TENSOR_TABLE = (
    TensorRow("embed/embedding", "embed_tokens.weight"),
    TensorRow("attention_norm/scale", "layers.{i}.input_layernorm.weight"),
    *(TensorRow(f"{ours}/kernel", f"{theirs}.weight", transpose=True) for ours, theirs in LINEAR_LAYERS),
    *(TensorRow(f"{ours}/bias", f"{theirs}.bias") for ours, theirs in LINEAR_LAYERS),
    TensorRow("attention/q_norm/scale", "layers.{i}.self_attn.q_norm.weight"),
    TensorRow("attention/k_norm/scale", "layers.{i}.self_attn.k_norm.weight"),
    TensorRow("attention/q_a_norm/scale", "layers.{i}.self_attn.q_a_layernorm.weight"),
    TensorRow("attention/kv_a_norm/scale", "layers.{i}.self_attn.kv_a_layernorm.weight"),
    TensorRow("attention/kv_b", "layers.{i}.self_attn.kv_b_proj.weight", transpose=True),
    TensorRow("mlp_norm/scale", "layers.{i}.post_attention_layernorm.weight"),
    TensorRow("moe/router/kernel", "layers.{i}.mlp.gate.weight", transpose=True),
    TensorRow("moe/router/correction", "layers.{i}.mlp.gate.e_score_correction_bias"),
    TensorRow("moe/experts_gate", "layers.{i}.mlp.experts.{x}.gate_proj.weight", transpose=True),
    TensorRow("moe/experts_up", "layers.{i}.mlp.experts.{x}.up_proj.weight", transpose=True),
    TensorRow("moe/experts_down", "layers.{i}.mlp.experts.{x}.down_proj.weight", transpose=True),
    TensorRow("final_norm/scale", "norm.weight"),
    TensorRow("head/kernel", "lm_head.weight", transpose=True),
)

# Where a family's names differ from the table.
GEMMA_NAMES = {
    "attention_post_norm/scale": "layers.{i}.post_attention_layernorm.weight",
    "mlp_norm/scale": "layers.{i}.pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "layers.{i}.post_feedforward_layernorm.weight",
}
FAMILY_NAMES = {
    "gemma2": GEMMA_NAMES,
    "gemma3": GEMMA_NAMES,
    "gemma3_text": GEMMA_NAMES,
    "mixtral": {
        "moe/router/kernel": "layers.{i}.block_sparse_moe.gate.weight",
        "moe/experts_gate": "layers.{i}.block_sparse_moe.experts.{x}.w1.weight",
        "moe/experts_up": "layers.{i}.block_sparse_moe.experts.{x}.w3.weight",
        "moe/experts_down": "layers.{i}.block_sparse_moe.experts.{x}.w2.weight",
    },
}

# What the names of the table begin with; a model that also sees images keeps its decoder in a part of it.
DECODER_PREFIXES = {
    "model.": "",
    "model.language_model.": "",
    "language_model.model.": "language_model.",
}  # -> that of lm_head

# Patterns of tensors that a family ships and its decoder does not need. {n} is the number of layers.
SKIPPED_TENSORS = {
    "all": (r"rotary_emb\.inv_freq$",),
    "deepseek_v3": (r"^model\.layers\.{n}\.",),  # predicts the token after the next
    "gemma3": (r"vision_tower\.", r"multi_modal_projector\."),
}


def tensor_table(family: str) -> tuple[TensorRow, ...]:
    """The rows of `TABLE` under a family's own names."""
    own = FAMILY_NAMES.get(family, {})
    known = {row.ours for row in TENSOR_TABLE}
    return (
        *(row._replace(theirs=own.get(row.ours, row.theirs)) for row in TENSOR_TABLE),
        *(TensorRow(ours, theirs) for ours, theirs in own.items() if ours not in known),
    )


def normalize_hf_config(raw: dict, where: str):
    """The decoder's config as `transformers` understands config.json, with all fields.

    Raises:
      UserError: the family is not known, or `transformers` refuses a field.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"expected model_type in {where} to be one of {', '.join(FAMILIES)}; found {family!r}; "
            "this architecture is not supported"
        )
    for part in (raw, raw.get("text_config")):
        for field in BOUNDED_FIELDS:
            count = part.get(field) if isinstance(part, dict) else None
            if isinstance(count, int) and count > 65536:
                raise UserError(f"expected {field} in {where} to be at most 65536; found {count}; this is no model's")
    from transformers import CONFIG_MAPPING

    try:
        model_cfg = CONFIG_MAPPING[family].from_dict(raw)
        return model_cfg.get_text_config() if family == "gemma3" else model_cfg
    except Exception as error:  # its checks raise many kinds
        lines = [line.strip() for line in str(error).strip().splitlines()]
        raise UserError(
            f"expected a config that transformers reads as {family} in {where}; found: {' '.join(lines)[:300]}"
        ) from None


def model_config_from_hf(raw: dict, where: str, **rest) -> ModelConfig:
    """The ModelConfig of the fields of a config.json; `rest` goes into it too.

    Raises:
      UserError: a field has a value that this decoder does not have.
    """
    c = normalize_hf_config(raw, where)
    try:
        model_cfg = translate_hf_config(c, raw["model_type"], where, **rest)
        check_architecture(model_cfg, where)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"expected numbers that make a decoder in {where}; found: {error}; this config is broken"
        ) from None
    return model_cfg


def translate_hf_config(c, family: str, where: str, **rest) -> ModelConfig:
    """The ModelConfig of a family's normalized config; the numbers in it are not checked."""
    get = lambda name, default=None: getattr(c, name, default)
    gemma = family.startswith("gemma")
    activation = c.hidden_activation if gemma else c.hidden_act
    biases = bool(get("attention_bias")) and family not in ("mistral", "mixtral", "qwen2")
    for fine, field, expected, found in (
        (activation in ACTIVATIONS, "hidden_act", " or ".join(ACTIVATIONS), activation),
        (not get("use_bidirectional_attention"), "use_bidirectional_attention", "false", True),
        (not (family == "llama" and get("layer_types")), "layer_types", "none for llama", get("layer_types")),
    ):
        if not fine:
            raise UserError(f"expected {field} {expected} in {where}; found {found!r}; this decoder has no other")
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ):
        if type(get(field)) is not int or get(field) < 1:
            raise UserError(f"expected {field} in {where} to be a whole number of 1 or more; found {get(field)!r}")
    latent = read_latent_config(c) if family == "deepseek_v3" else None
    scale = float(get("query_pre_attn_scalar", 0))
    divisor = math.sqrt(scale) if gemma else latent_score_divisor(c) if latent else 0.0
    return ModelConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        layers=read_layer_configs(c, family, where),
        num_heads=c.num_attention_heads,
        num_kv_heads=1 if latent else c.num_key_value_heads,
        head_dim=get("head_dim") or c.hidden_size // c.num_attention_heads,
        max_positions=c.max_position_embeddings,
        norm_eps=float(c.rms_norm_eps),
        unit_offset=gemma,
        activation=activation,
        qkv_bias=family == "qwen2" or biases,
        out_bias=biases,
        mlp_bias=family == "llama" and bool(get("mlp_bias")),
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3", "gemma3_text"),
        post_norms=gemma,
        embed_scale=math.sqrt(c.hidden_size) if gemma else 1.0,
        score_divisor=divisor,
        score_softcap=float(get("attn_logit_softcapping") or 0) if family == "gemma2" else 0.0,
        # The model that also sees images leaves the cap out.
        logit_softcap=float(get("final_logit_softcapping") or 0) if family in ("gemma2", "gemma3_text") else 0.0,
        tie_embeddings=bool(get("tie_word_embeddings")),
        latent=latent,
        experts=read_experts_config(c, family),
        family=family,
        **rest,
    )


def all_numbers(part, name: str = "") -> dict[str, int | float]:
    """Every number in a (nested) dataclass or tuple, by where it stands."""
    if dataclasses.is_dataclass(part):
        inner = [(field.name, getattr(part, field.name)) for field in dataclasses.fields(part)]
    elif isinstance(part, tuple):
        inner = [(str(i), value) for i, value in enumerate(dict.fromkeys(part))]
    else:
        return {name: part} if isinstance(part, (int, float)) else {}
    return {
        key: value for below, item in inner for key, value in all_numbers(item, f"{name}.{below}".strip(".")).items()
    }


def check_architecture(model_cfg: ModelConfig, where: str) -> None:
    """Checks what the sizes must be to one another."""
    for name, value in all_numbers(model_cfg).items():
        if not 0 <= value < 2**31 or type(value) is float and not math.isfinite(value):
            raise UserError(
                f"expected numbers from 0 to 2**31 in {where}; found {value} ({name}); this config is broken"
            )
    experts, latent = model_cfg.experts, model_cfg.latent
    width = latent.qk_rope_head_dim if latent else model_cfg.head_dim
    ropes = {layer.rope for layer in model_cfg.layers}
    rules = [
        (
            model_cfg.num_heads % model_cfg.num_kv_heads == 0,
            "num_attention_heads to be a multiple of num_key_value_heads",
            f"{model_cfg.num_heads} and {model_cfg.num_kv_heads}",
        ),
        (width > 0 and width % 2 == 0, "an even head_dim (or qk_rope_head_dim)", width),
        (
            model_cfg.tokenizer_vocab_size <= model_cfg.vocab_size,
            "a row of the embedding (vocab_size) for each id of the tokenizer",
            f"{model_cfg.vocab_size} rows and {model_cfg.tokenizer_vocab_size} ids",
        ),
        (
            all(0 <= token < model_cfg.vocab_size for token in model_cfg.eos_ids),
            "eos_token_id below vocab_size",
            model_cfg.eos_ids,
        ),
        (all(rope.theta > 1 and rope.factor > 0 for rope in ropes), "rope_theta above 1 and a factor above 0", ropes),
        (
            all(
                rope.original_max_positions > 0
                and rope.low_freq_bound > 0
                and rope.high_freq_bound > rope.low_freq_bound
                for rope in ropes
                if rope.scaling in ("llama3", "yarn")
            ),
            "positions and bounds above 0 of stretched rotary positions",
            ropes,
        ),
    ]
    if latent:
        rules.append(
            (
                latent.kv_lora_rank > 0 and latent.qk_nope_head_dim > 0 and latent.v_head_dim > 0,
                "kv_lora_rank, qk_nope_head_dim and v_head_dim of 1 or more",
                latent,
            )
        )
    if experts:
        kept = experts.num_experts // max(experts.num_groups, 1) * experts.num_top_groups
        rules += [
            (
                experts.intermediate_size > 0 and 0 < experts.num_top_groups <= experts.num_groups,
                "moe_intermediate_size and topk_group of 1 or more, and topk_group of at most n_group",
                experts,
            ),
            (
                0 < experts.num_experts_per_token <= kept,
                "num_experts_per_tok of at most the experts it chooses from",
                f"{experts.num_experts_per_token} of {kept}",
            ),
            (
                not experts.sigmoid_gate
                or experts.num_experts % experts.num_groups == 0
                and experts.num_experts >= 2 * experts.num_groups,
                "n_group equal groups of two experts or more",
                f"{experts.num_experts} experts in {experts.num_groups} groups",
            ),
        ]
    for fine, expected, found in rules:
        if not fine:
            raise UserError(f"expected {expected} in {where}; found {found}; this is not a whole model folder")


def read_rope_config(c, fields: dict[str, Any], where: str) -> RopeConfig:
    """A rope_parameters of transformers."""
    kind = fields.get("rope_type", "default")
    if kind not in ROPE_SCALINGS or fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"expected rope_type {', '.join(ROPE_SCALINGS)} over whole heads in {where}; found {fields}; "
            "other rotary positions are not supported"
        )
    rope = RopeConfig(theta=float(fields["rope_theta"]))
    if kind == "default":
        return rope
    names = {"factor": "factor", "original_max_positions": "original_max_position_embeddings"}
    if kind == "llama3":
        names |= {"low_freq_bound": "low_freq_factor", "high_freq_bound": "high_freq_factor"}
    values = {ours: fields.get(theirs) for ours, theirs in names.items()}
    if kind == "yarn":
        original = values["original_max_positions"]
        factor = values["factor"] = values["factor"] or c.max_position_embeddings / original
        mscale, all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
        grown = (
            yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all_dim)
            if mscale and all_dim
            else None
        )
        attention_factor = fields.get("attention_factor")
        values |= {
            "low_freq_bound": fields.get("beta_slow") or 1,
            "high_freq_bound": fields.get("beta_fast") or 32,
            "truncate": fields.get("truncate", True),
            "attention_factor": attention_factor
            if attention_factor is not None
            else grown or yarn_attention_factor(factor, 1.0),
        }
    return RopeConfig(
        theta=rope.theta, scaling=kind, **{name: value for name, value in values.items() if value is not None}
    )


def read_layer_configs(c, family: str, where: str) -> tuple[LayerConfig, ...]:
    """Window, rotary positions and kind of MLP of each layer."""
    count, window = c.num_hidden_layers, getattr(c, "sliding_window", None) or 0
    if family in ("llama", "deepseek_v3"):
        window = 0
    # Mixtral and Qwen3-MoE have one kind of layer, with a window if there is one; so has Mistral, if it does not say.
    types = getattr(c, "layer_types", None) if family not in ("llama", "mixtral", "qwen3_moe", "deepseek_v3") else None
    types = types or ["sliding_attention" if window else "full_attention"] * count
    odd = set(types) - {"sliding_attention", "full_attention"}
    if odd or len(types) != count:
        raise UserError(
            f"expected layer_types in {where} to be {count} of sliding_attention, full_attention; found {types}"
        )
    ropes = {}
    for kind in set(types):
        nested = c.rope_parameters.get(kind) if getattr(c, "layer_types", None) else None
        ropes[kind] = read_rope_config(c, nested or c.rope_parameters, where)

    def has_experts(i: int) -> bool:
        if family == "deepseek_v3":
            return i >= c.first_k_dense_replace
        if family == "qwen3_moe":
            return i not in c.mlp_only_layers and c.num_experts > 0 and (i + 1) % c.decoder_sparse_step == 0
        return family == "mixtral"

    return tuple(
        LayerConfig(window if kind == "sliding_attention" else 0, ropes[kind], has_experts(i))
        for i, kind in enumerate(types)
    )


def read_experts_config(c, family: str) -> ExpertsConfig | None:
    """The mixture of experts of a family that has one."""
    if family == "mixtral":
        return ExpertsConfig(c.num_local_experts, c.num_experts_per_tok, c.intermediate_size)
    if family == "qwen3_moe":
        return ExpertsConfig(
            c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, normalize_weights=bool(c.norm_topk_prob)
        )
    if family == "deepseek_v3":
        return ExpertsConfig(
            c.n_routed_experts,
            c.num_experts_per_tok,
            c.moe_intermediate_size,
            shared_intermediate_size=c.moe_intermediate_size * c.n_shared_experts,
            sigmoid_gate=True,
            normalize_weights=bool(c.norm_topk_prob),
            routed_scale=float(c.routed_scaling_factor),
            num_groups=c.n_group,
            num_top_groups=c.topk_group,
        )
    return None


def read_latent_config(c) -> LatentConfig:
    """The latent attention of a DeepSeek-V3 config."""
    widths = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    return LatentConfig(c.q_lora_rank or 0, c.kv_lora_rank, *widths, rope_interleave=bool(c.rope_interleave))


def latent_score_divisor(c) -> float:
    """What DeepSeek-V3 divides scores by: under YaRN they grow with the length."""
    rope = c.rope_parameters
    growth = 1.0
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim"):
        growth = yarn_attention_factor(rope["factor"], rope["mscale_all_dim"])
    return math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim) / growth**2
