"""Hugging Face folders in and out: `load`, `save`, and the one table both of them read."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo_jax.mesh import path_name, shardings, to_host
from grpo_jax.model import ModelConfig, param_shapes
from grpo_jax.types import UserError

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "max_position_embeddings")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
CARRIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Tensor(NamedTuple):
    """How one tensor of a checkpoint becomes (a layer of) one of our leaves."""

    ours: str  # path in the parameter tree
    theirs: str  # {i} is the layer
    transpose: bool = False  # torch's Linear keeps [outputs, inputs]; ours is [inputs, outputs]


TABLE = (
    Tensor("embed/embedding", "model.embed_tokens.weight"),
    Tensor("layers/attention_norm/scale", "model.layers.{i}.input_layernorm.weight"),
    Tensor("layers/attention/q/kernel", "model.layers.{i}.self_attn.q_proj.weight", transpose=True),
    Tensor("layers/attention/k/kernel", "model.layers.{i}.self_attn.k_proj.weight", transpose=True),
    Tensor("layers/attention/v/kernel", "model.layers.{i}.self_attn.v_proj.weight", transpose=True),
    Tensor("layers/attention/o/kernel", "model.layers.{i}.self_attn.o_proj.weight", transpose=True),
    Tensor("layers/mlp_norm/scale", "model.layers.{i}.post_attention_layernorm.weight"),
    Tensor("layers/mlp/gate/kernel", "model.layers.{i}.mlp.gate_proj.weight", transpose=True),
    Tensor("layers/mlp/up/kernel", "model.layers.{i}.mlp.up_proj.weight", transpose=True),
    Tensor("layers/mlp/down/kernel", "model.layers.{i}.mlp.down_proj.weight", transpose=True),
    Tensor("final_norm/scale", "model.norm.weight"),
    Tensor("head/kernel", "lm_head.weight", transpose=True),
)


def find_model(path: str) -> Path:
    """The model folder of `model.path`: a path, or `tiny` for the base model that the package carries.

    Raises:
      UserError: there is no such folder, or it has no config.json or no safetensors.
    """
    folder = Path(__file__).parent / "tiny_base" if path == "tiny" else Path(path)
    for what, found in (("a model folder", folder.is_dir()), ("config.json in it", (folder / "config.json").is_file()),
                        ("*.safetensors in it", any(folder.glob("*.safetensors")))):
        if not found:
            raise UserError(f"expected {what} at {folder}; found none; set model.path to a Hugging Face folder "
                            "with config.json, tokenizer.json and *.safetensors, or to 'tiny'")
    return folder


def read_model_config(folder: str | Path) -> ModelConfig:
    """The decoder's shape from a folder's config.json.

    Raises:
      UserError: the file is not readable, lacks a field, or describes a decoder this package does not have.
    """
    folder = Path(folder)
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"expected a readable config.json in {folder}; found: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"expected a JSON object in {folder}/config.json; found {str(raw)[:40]!r}")
    known = {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
    for field, values in known.items():
        if raw.get(field, values[0]) not in values or field == "model_type" and field not in raw:
            raise UserError(f"expected {field} {' or '.join(map(str, values))} in {folder}/config.json; "
                            f"found {raw.get(field)!r}; this model family is not supported")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"expected rope_type 'default' in {folder}/config.json; found {rope}; "
                        "scaled rotary positions are not supported")
    sizes = {name: raw.get(name) for name in SIZES} | {name: raw.get(name) or 1 for name in OPTIONAL_SIZES}
    eos = read_eos(folder, raw)
    for fine, expected, found in (
        (sizes.keys() & raw.keys() >= set(SIZES), f"the fields {', '.join(SIZES)}", sorted(raw)),
        (all(type(value) is int and value > 0 for value in sizes.values()), "sizes that are whole numbers", sizes),
        (all(type(token) is int for token in eos), "eos_token_id to be ids", eos)):
        if not fine:
            raise UserError(f"expected {expected} in {folder}/config.json; found {found}")
    try:
        heads = raw["num_attention_heads"]
        config = ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_positions=raw["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            token_count=count_tokens(folder),
            eos_ids=eos,
            source=str(folder),
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"expected numbers in {folder}/config.json; found: {error}") from None
    for fine, expected, found in (
        (config.num_heads % config.num_kv_heads == 0, "num_attention_heads to be a multiple of num_key_value_heads",
         f"{config.num_heads} and {config.num_kv_heads}"),
        (config.head_dim % 2 == 0, "an even head_dim", config.head_dim),
        (config.token_count <= config.vocab_size, "a row of the embedding (vocab_size) for each id of the tokenizer",
         f"{config.vocab_size} rows and {config.token_count} ids"),
        (all(0 <= token < config.vocab_size for token in config.eos_ids), "eos_token_id below vocab_size",
         config.eos_ids)):
        if not fine:
            raise UserError(f"expected {expected} in {folder}; found {found}; this is not a whole model folder")
    return config


def read_eos(folder: Path, raw: dict) -> tuple[int, ...]:
    """All ids that end a text, of config.json and of generation_config.json, where many models list them."""
    ids = []
    path = folder / "generation_config.json"
    for source in (raw, json.loads(path.read_text()) if path.is_file() else {}):
        eos = source.get("eos_token_id")
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(dict.fromkeys(ids))


def count_tokens(folder: Path) -> int:
    """One more than the largest id that the folder's tokenizer knows; 0 without a tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return 0
    from tokenizers import Tokenizer as FastTokenizer

    try:
        tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more exact
        raise UserError(f"expected a readable tokenizer.json in {folder}; found: {error}") from None
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def checkpoint_names(config: ModelConfig) -> dict[str, list[str]]:
    """Our leaf -> the names of the tensors it is made of, one a layer for a stacked leaf."""
    leaves = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(param_shapes(config))}
    return {
        row.ours: [row.theirs.format(i=i) for i in range(config.num_layers if "{i}" in row.theirs else 1)]
        for row in TABLE
        if row.ours in leaves
    }


def open_tensors(folder: Path) -> dict:
    """Tensor name -> an open safetensors file that holds it. Only safetensors are read, never pickles."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = safe_open(path, framework="np")
        except SafetensorError as error:
            raise UserError(f"expected a whole safetensors file at {path}; found: {error}; download it again") from None
        for name in file.keys():
            if name in found:
                raise UserError(f"expected each tensor once in {folder}; found {name} in two files; remove one")
            found[name] = file
    return found


def as_matrix(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf (of one layer) with its heads merged: a projection is one matrix in the checkpoint."""
    if len(shape) < 3:
        return shape
    return (shape[0] * shape[1], shape[2]) if ours.endswith("o/kernel") else (shape[0], shape[1] * shape[2])


def check_tensors(folder: Path, config: ModelConfig) -> dict:
    """`open_tensors`, with every tensor that config.json asks for there, in its shape, and no other.

    Raises:
      UserError: names the tensor.
    """
    files = open_tensors(folder)
    leaves = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config))}
    transposed = {row.ours for row in TABLE if row.transpose}
    expected = {}
    for ours, names in checkpoint_names(config).items():
        shape = as_matrix(ours, leaves[ours][ours.startswith("layers/") :])
        expected |= dict.fromkeys(names, shape[::-1] if ours in transposed else shape)
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        ignored.add("lm_head.weight")
    for kind, odd in (("missing", expected.keys() - files.keys()), ("unknown", files.keys() - expected.keys() - ignored)):
        if odd:
            raise UserError(f"expected {len(expected)} tensors in {folder}, as its config.json says; "
                            f"found {len(odd)} {kind}, such as {sorted(odd)[0]}")
    for name, shape in expected.items():
        found = tuple(files[name].get_slice(name).get_shape())
        if found != shape:
            raise UserError(f"expected {name} in {folder} to be {shape}, as config.json says; found {found}")
    return files


def load(source: str | Path, *, mesh: Mesh | None = None, param_dtype: str = "float32") -> tuple[ModelConfig, dict]:
    """Reads a Hugging Face folder (Llama architecture, safetensors).

    Args:
      source: the folder.
      mesh: place the parameters on it by `grpo_jax.mesh.TABLE`; each process reads what its devices hold. By default
        they go to the first device.
      param_dtype: the dtype of the arrays returned.
    Returns:
      The model's config and its parameters, layers stacked.
    Raises:
      UserError: a tensor is missing, unknown, twice there or of another shape than config.json says.
    """
    folder = Path(source)
    config = read_model_config(folder)
    files = check_tensors(folder, config)
    names, shapes = checkpoint_names(config), param_shapes(config)
    transposed = {row.ours for row in TABLE if row.transpose}

    def read(path, shape, sharding):
        ours = path_name(path)
        stacked = ours.startswith("layers/")

        def tensor(name):
            value = files[name].get_tensor(name)
            return (value.T if ours in transposed else value).reshape(shape.shape[stacked:])

        def part(index):
            if not stacked:
                return np.asarray(tensor(names[ours][0])[index]).astype(param_dtype)
            layers = range(config.num_layers)[index[0]]
            return np.stack([tensor(names[ours][i])[index[1:]].astype(param_dtype) for i in layers])

        return jax.make_array_from_callback(shape.shape, sharding, part)

    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), shapes)
    else:
        places = shardings(mesh, shapes)
    return config, jax.tree_util.tree_map_with_path(read, shapes, places)


def save(folder: str | Path, config: ModelConfig, params: dict) -> None:
    """Writes a Hugging Face folder that `transformers` loads: config.json, model.safetensors, tokenizer files.

    The config and the tokenizer are carried along from `config.source`; the weights are written in `config.dtype`.
    """
    folder = Path(folder)
    names = checkpoint_names(config)
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tensors = {}
    for row in TABLE:
        if row.ours not in names:
            continue
        value = np.asarray(to_host(leaves[row.ours])).astype(jnp.dtype(config.dtype))
        for name, one in zip(names[row.ours], value if "{i}" in row.theirs else [value]):
            one = one.reshape(as_matrix(row.ours, one.shape))
            tensors[name] = np.ascontiguousarray(one.T if row.transpose else one)
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(config.source) if config.source else None
    if source and (source / "config.json").is_file():
        text = (source / "config.json").read_text()
    else:
        text = json.dumps(hf_config(config), indent=2) + "\n"
    (folder / "config.json").write_text(text)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in CARRIED:
        if source and source.resolve() != folder.resolve() and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def hf_config(config: ModelConfig) -> dict:
    """The fields of a Llama config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) != 1 else config.eos_ids[0],
        "bos_token_id": None,
        "dtype": config.dtype,
    }
