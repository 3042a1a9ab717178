"""Models in and out: `load`, `save`."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from safetensors.numpy import save_file

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import LayerConfig, ModelConfig, RopeConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import gather_to_host, path_name, tree_shardings
from grpo_jax.weights.families import DECODER_PREFIXES, SKIPPED_TENSORS, TensorRow, tensor_table
from grpo_jax.weights.source import find_model, fp8_block_shape, read_hf_config, read_model_config
from grpo_jax.weights.tensors import StoredTensor, open_gguf_tensors, open_safetensors_folder

CARRIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
MAX_SHARD_BYTES = 5_000_000_000  # a larger model is written as several files

log = logging.getLogger(__name__)
_told: set[str] = set()


class ParameterTensors(NamedTuple):
    """One of our leaves and the tensors of a checkpoint that it is made of."""

    path: str
    row: TensorRow
    names: np.ndarray  # of the tensors: [], [layers] or [layers, experts]
    shape: tuple[int, ...]  # without those axes

    @property
    def merged(self) -> tuple[tuple[int, ...], ...]:
        """Which axes of `shape` are one axis of the tensor: heads and their width are, in a checkpoint."""
        axes = tuple(range(len(self.shape)))
        if len(axes) == 3:
            return (axes[:2], axes[2:]) if self.row.ours.endswith("/o/kernel") else (axes[:1], axes[1:])
        return (axes,) if self.row.ours.endswith("bias") else tuple((axis,) for axis in axes)

    @property
    def theirs(self) -> tuple[int, ...]:
        """The shape of one tensor."""
        sizes = tuple(int(np.prod([self.shape[axis] for axis in axes])) for axes in self.merged)
        return sizes[::-1] if self.row.transpose else sizes

    def cut(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """`index`, a cut of `shape`, as a cut of one tensor."""

        def merge(axes):
            first, *rest = axes
            if any(index[axis].indices(self.shape[axis])[:2] != (0, self.shape[axis]) for axis in rest):
                raise ValueError(f"{self.path}: only the first of merged axes may be split")
            inner = int(np.prod([self.shape[axis] for axis in rest]))
            start, stop, _ = index[first].indices(self.shape[first])
            return slice(start * inner, stop * inner)

        cuts = tuple(merge(axes) for axes in self.merged)
        return cuts[::-1] if self.row.transpose else cuts


def parameter_tensors(model_cfg: ModelConfig, prefix: str) -> dict[str, ParameterTensors]:
    """Every leaf of a model by its path; `prefix` begins the names of the decoder's tensors."""
    rows = {row.ours: row for row in tensor_table(model_cfg.family)}
    starts = np.cumsum([0, *(len(run) for run in model_cfg.layer_stacks)])
    found = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(model_cfg)):
        path = path_name(key)
        _, _, ours = path.split("/", 2) if path.startswith("layers/") else (None, None, path)
        row = rows[ours]
        counts = leaf.shape[: "{i}" in row.theirs and 1 + ("{x}" in row.theirs)]
        first = starts[int(path.split("/")[1])] if counts else 0
        begin = DECODER_PREFIXES[prefix] if ours == "head/kernel" else prefix
        names = np.empty(counts, object)
        for at in np.ndindex(*counts):
            layer_and_expert = dict(zip("ix", (at[0] + first, *at[1:]))) if at else {}
            names[at] = begin + row.theirs.format(**layer_and_expert)
        found[path] = ParameterTensors(path, row, names, leaf.shape[len(counts) :])
    return found


def open_model_tensors(
    source: Path, model_cfg: ModelConfig
) -> tuple[dict[str, ParameterTensors], dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The leaves of a model, the tensors they are made of, and those that the decoder has no use for.

    Raises:
      UserError: a tensor is missing, unknown, twice there or of another shape than the config says.
    """
    raw = read_hf_config(source)
    found = (
        open_gguf_tensors(source, raw)
        if source.suffix == ".gguf"
        else open_safetensors_folder(source, fp8_block_shape(raw, source))
    )
    # Before lists of names are made, which a broken config would make long.
    wanted = sum((model_cfg.experts.num_experts if layer.use_experts else 1) for layer in model_cfg.layers)
    if wanted > len(found):
        raise UserError(f"expected {wanted} tensors or more in {source}, as its config says; found {len(found)}")
    prefix = next((p for p in DECODER_PREFIXES if f"{p}embed_tokens.weight" in found), "model.")
    leaves = parameter_tensors(model_cfg, prefix)
    expected = {name: leaf for leaf in leaves.values() for name in leaf.names.flat}
    patterns = [
        pattern.replace("{n}", str(model_cfg.num_layers))
        for pattern in SKIPPED_TENSORS["all"] + SKIPPED_TENSORS.get(model_cfg.family, ())
    ]
    spare = {name for name in found.keys() - expected.keys() if any(re.search(p, name) for p in patterns)}
    if model_cfg.tie_embeddings:
        spare |= found.keys() & {f"{DECODER_PREFIXES[prefix]}lm_head.weight"}
    for kind, odd in (("missing", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys() - spare)):
        if odd:
            raise UserError(
                f"expected {len(expected)} tensors in {source}, as its config says; "
                f"found {len(odd)} {kind}, such as {sorted(odd)[0]}"
            )
    for name, leaf in expected.items():
        if found[name].shape != leaf.theirs:
            raise UserError(
                f"expected {name} in {source} to be {leaf.theirs}, as its config says; found {found[name].shape}"
            )
        if found[name].dtype.kind in "iub":
            raise UserError(f"expected {name} in {source} to be of a float dtype; found {found[name].dtype}")
    if spare and str(source) not in _told:
        _told.add(str(source))
        log.warning("%s: %d tensors are not the decoder's and are skipped, such as %s", source, len(spare), min(spare))
    return leaves, {name: found[name] for name in expected}, {name: found[name] for name in spare}


def check_tied_head(
    source: Path, leaves: dict[str, ParameterTensors], stored: dict[str, StoredTensor], spare: dict[str, StoredTensor]
) -> None:
    """Checks that a head which the config ties to the embedding, and which is there all the same, equals it.

    Raises:
      UserError: it does not; which of the two is meant, the checkpoint does not say.
    """
    embedding = stored[str(leaves["embed/embedding"].names)]
    for name, head in spare.items():
        if name.endswith("lm_head.weight"):
            rows = (slice(at, at + 4096) for at in range(0, embedding.shape[0], 4096))
            every = (slice(None),)
            same = head.shape == embedding.shape and all(
                np.array_equal(head.read((cut, *every)), embedding.read((cut, *every))) for cut in rows
            )
            if not same:
                raise UserError(
                    f"expected {name} in {source} to equal the embedding, as tie_word_embeddings says; found "
                    "another; set tie_word_embeddings to false in config.json if the head is meant"
                )


def load(source: str | Path, *, mesh: Mesh | None = None, param_dtype: str = "float32") -> tuple[ModelConfig, dict]:
    """Reads a model: tensor by tensor, into arrays that lie where they will be used.

    Args:
      source: what `find_model` takes.
      mesh: place the parameters on it by `grpo_jax.parallel.mesh.TABLE`; each process reads what its devices hold. By default
        they go to the first device.
      param_dtype: the dtype of the arrays returned.
    Returns:
      The model's config and its parameters.
    Raises:
      UserError: a tensor is missing, unknown, twice there or of another shape than the config says.
    """
    source = find_model(source)
    model_cfg = read_model_config(source)
    leaves, stored, spare = open_model_tensors(source, model_cfg)
    shapes = param_shapes(model_cfg, param_dtype)
    check_tied_head(source, leaves, stored, spare)

    def read(path, shape, sharding):
        leaf = leaves[path_name(path)]
        axes = leaf.names.ndim

        def part(index):
            names = leaf.names[index[:axes]] if axes else leaf.names
            local = tuple(len(range(*cut.indices(size))) for cut, size in zip(index[axes:], leaf.shape))
            out = np.empty((*names.shape, *local), shape.dtype)
            for at in np.ndindex(*names.shape):
                value = stored[names[at]].read(leaf.cut(index[axes:]))
                out[at] = (value.T if leaf.row.transpose else value).reshape(local)
            return out

        return assemble_array(shape.shape, sharding, part)

    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), shapes)
    else:
        places = tree_shardings(mesh, shapes)
    return model_cfg, jax.tree_util.tree_map_with_path(read, shapes, places)


def assemble_array(
    shape: tuple[int, ...], sharding: Sharding, part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array whose parts are made by `part`, each once, with one device's share in memory at a time."""
    by_part = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        by_part.setdefault(str(index), (index, []))[1].append(device)
    made = []
    for index, devices in by_part.values():
        value = part(index)
        made += jax.block_until_ready([jax.device_put(value, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, made)


def save(folder: str | Path, model_cfg: ModelConfig, params: dict) -> None:
    """Writes a Hugging Face folder that `transformers` loads: config, safetensors, tokenizer, generation config.

    All but the weights is carried along from `config.source`. Each weight is written in the dtype it has there
    (dequantized ones as bfloat16), and so are tensors there that the decoder skips, such as a vision tower.

    Raises:
      UserError: `folder` is the source itself.
      ValueError: there is no source, and no config.json is written from nothing for this family.
    """
    folder, source = Path(folder), Path(model_cfg.source) if model_cfg.source else None
    if source and source.resolve() == folder.resolve():
        raise UserError(f"expected another folder than {folder}, where the model came from; choose another")
    raw, dtypes, spare = llama_hf_config(model_cfg) if source is None else read_hf_config(source), {}, {}
    leaves = parameter_tensors(model_cfg, "model.")
    if source:
        leaves, stored, spare = open_model_tensors(source, model_cfg)
        dtypes = {name: tensor.dtype for name, tensor in stored.items()}
        raw.pop("quantization_config", None)  # FP8 weights were multiplied by their scales
    tensors = tensors_from_params(leaves, params, dtypes, model_cfg.dtype)
    for name, tensor in spare.items():  # a head that is tied is the embedding as it is now
        tied = name.endswith("lm_head.weight")
        tensors[name] = tensors[str(leaves["embed/embedding"].names)] if tied else tensor
    write_safetensors(folder, tensors)
    if jax.process_index() != 0:
        return
    if source and source.suffix == ".gguf":
        from grpo_jax.weights.tokenizer import read_gguf_tokenizer

        read_gguf_tokenizer(source).save_pretrained(folder)
    for name in CARRIED_FILES:
        if source and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    unchanged = source and source.is_dir() and raw == read_hf_config(source)
    text = (source / "config.json").read_text(encoding="utf-8") if unchanged else json.dumps(raw, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if not (folder / "generation_config.json").is_file():
        ids = {f"{name}_token_id": raw.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
        known = {name: value for name, value in ids.items() if value is not None}
        (folder / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n")


def tensors_from_params(
    leaves: dict[str, ParameterTensors], params: dict, dtypes: dict[str, np.dtype], dtype: str
) -> dict[str, StoredTensor]:
    """Parameters as the tensors of a checkpoint, by name; `dtype` is that of tensors which `dtypes` does not name."""
    values = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def stored(leaf: ParameterTensors, at: tuple[int, ...]) -> StoredTensor:
        kind = dtypes.get(leaf.names[at], np.dtype(dtype))

        def read(index):
            value = np.asarray(gather_to_host(values[leaf.path][at])).astype(kind)
            value = value.reshape(leaf.theirs[::-1]).T if leaf.row.transpose else value.reshape(leaf.theirs)
            return np.ascontiguousarray(value[index])

        return StoredTensor(leaf.theirs, kind, read)

    return {leaf.names[at]: stored(leaf, at) for leaf in leaves.values() for at in np.ndindex(*leaf.names.shape)}


def write_safetensors(folder: Path, todo: dict[str, StoredTensor]) -> None:
    """Writes safetensors, one file or several of at most `SHARD_BYTES` and an index; a file at a time is in memory.

    Raises:
      UserError: the folder has safetensors that would stay and be read with the new ones.
    """
    shards, room = [[]], MAX_SHARD_BYTES
    for name, tensor in todo.items():
        size = tensor.bytes
        if size > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    stale = {path.name for path in folder.glob("*.safetensors")} - set(files)
    if stale:
        raise UserError(f"expected no other model in {folder}; found {min(stale)}; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for file, names in zip(files, shards):
        tensors = {name: todo[name].whole() for name in names}
        if jax.process_index() == 0:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # safetensors leaves it to its owner alone
        index |= dict.fromkeys(names, file)
    if len(shards) > 1 and jax.process_index() == 0:
        total = {"total_size": sum(tensor.bytes for tensor in todo.values())}
        text = json.dumps({"metadata": total, "weight_map": dict(sorted(index.items()))}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")


def llama_hf_config(model_cfg: ModelConfig) -> dict:
    """The fields of a Llama config.json.

    Raises:
      ValueError: the model is of another family.
    """
    theta = model_cfg.layers[0].rope.theta
    if model_cfg.family != "llama" or set(model_cfg.layers) != {LayerConfig(rope=RopeConfig(theta))}:
        raise ValueError(f"expected a plain llama; found {model_cfg.family}; save a model with the source it came from")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model_cfg.vocab_size,
        "hidden_size": model_cfg.hidden_size,
        "intermediate_size": model_cfg.intermediate_size,
        "num_hidden_layers": model_cfg.num_layers,
        "num_attention_heads": model_cfg.num_heads,
        "num_key_value_heads": model_cfg.num_kv_heads,
        "head_dim": model_cfg.head_dim,
        "max_position_embeddings": model_cfg.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": model_cfg.norm_eps,
        "hidden_act": model_cfg.activation,
        "attention_bias": model_cfg.qkv_bias,
        "mlp_bias": model_cfg.mlp_bias,
        "tie_word_embeddings": model_cfg.tie_embeddings,
        "eos_token_id": list(model_cfg.eos_ids) if len(model_cfg.eos_ids) != 1 else model_cfg.eos_ids[0],
        "bos_token_id": None,
        "dtype": model_cfg.dtype,
    }
