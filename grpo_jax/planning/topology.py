"""The slices and cards that programs can be compiled for, without having them.

v5e:8x8  v6e:2x2  v5p:4x4x4     TPU slices, compiled by the package libtpu
h100:8  rtx4090:1  l4:1         GPUs, compiled by JAX's CUDA plugin
cpu:8                           CPU devices of this machine
"""

import importlib.util
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from grpo_jax.errors import UserError


class Chip(NamedTuple):
    """The published figures of a device."""

    platform: str  # "tpu", "gpu" or "cpu"
    memory_bytes: int  # that a program can allocate
    bandwidth: float  # of the memory, in bytes per second
    flops: float  # dense bfloat16 products per second, counting a multiplication and an addition
    link_bandwidth: float  # bytes per second that a device sends to its neighbors in a slice or a host
    network_bandwidth: float  # bytes per second that a device sends to other hosts, outside a slice


GIB = 2**30
# Memory is what XLA reports on the device, not what the datasheet says.
CHIPS = {
    "v5e": Chip("tpu", int(15.75 * GIB), 819e9, 197e12, 200e9, 200e9),
    "v6e": Chip("tpu", int(31.25 * GIB), 1640e9, 918e12, 400e9, 400e9),
    "v5p": Chip("tpu", int(95.74 * GIB), 2765e9, 459e12, 600e9, 600e9),
    "h100": Chip("gpu", int(79.1 * GIB), 3350e9, 989e12, 450e9, 50e9),
    "rtx4090": Chip("gpu", int(23.5 * GIB), 1008e9, 165e12, 32e9, 3e9),
    "l4": Chip("gpu", int(22.0 * GIB), 300e9, 121e12, 32e9, 3e9),
}

# Fields of XLA's GpuTargetConfig. The code of a program depends on few of them.
GPU_TARGETS = {
    "h100": ("NVIDIA H100 80GB HBM3", 132, 233472, 2048, 3352320000000, 52428800, 1.98, 84978434048, 232448, 9, 0),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 128, 102400, 1536, 1008096000000, 75497472, 2.52, 25250000000, 101376, 8, 9),
    "l4": ("NVIDIA L4", 58, 102400, 1536, 300048000000, 50331648, 2.04, 23600000000, 101376, 8, 9),
}
GPUS_PER_HOST = 8


def gpu_target(name: str) -> str:
    """Returns the text of the GpuTargetConfig of a GPU."""
    kind, cores, shared, threads, bandwidth, cache, clock, memory, optin, major, minor = GPU_TARGETS[name]
    return f"""
        gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
            shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores}
            fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
            device_memory_size: {memory} shared_memory_per_block_optin: {optin}
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            driver_version: "13.0.0" runtime_version: "13.0.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{kind}"
    """


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns the kind and the sizes of a topology, such as ("v5e", (8, 8)).

    Raises:
        UserError: It is not one of the known kinds, or its sizes do not fit the kind.
    """
    kind, _, sizes = name.partition(":")
    dims = {"v5e": 2, "v6e": 2, "v5p": 3}.get(kind, 1)
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (dims - 1), sizes):
        raise UserError(
            "--topology must be like v5e:8x8, v6e:2x2, v5p:4x4x4, h100:8, rtx4090:1, l4:1 or cpu:8; "
            f"found {name!r}. Name one of these kinds and its sizes."
        )
    return kind, tuple(map(int, sizes.split("x")))


def compiler_environment(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables with which a process can compile for a topology. JAX reads them when imported.

    Args:
        name: The topology.
        environ: The environment of this process.
    """
    kind, sizes = parse_topology(name)
    changes = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    changes["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several processes compile at the same time
    # Otherwise programs with Pallas kernels contain line numbers, so editing a comment changes their digests.
    changes["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
    # libtpu complains if it cannot find out which host of a slice it runs on.
    changes |= {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3"}
    if kind == "cpu":
        count = f"--xla_force_host_platform_device_count={math.prod(sizes)}"
        changes["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {count}".strip()
        changes["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program that is read from it takes less memory
    return {**environ, **changes}


def check_compiler(kind: str) -> None:
    """Raises a UserError if the compiler for a kind of device is not installed."""
    package = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda13"}.get(CHIPS[kind].platform if kind in CHIPS else "cpu")
    try:
        found = package is None or importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if not found:
        raise UserError(
            f"Compiling for {kind} needs the extra `plan`; found no package {package}. Run "
            "`pip install -c constraints.txt -e '.[plan]'` in an environment of its own, or "
            "`make .venv-plan/installed`, which creates one."
        )


def topology_devices(name: str) -> list:
    """Returns the devices of a topology. Those of an accelerator can only be compiled for.

    Raises:
        UserError: The compiler does not know such a slice.
    """
    import jax  # imported here, because what it reads of the environment must be set first
    from jax.experimental import topologies

    kind, sizes = parse_topology(name)
    count = math.prod(sizes)
    if kind == "cpu":
        return jax.devices("cpu")[:count]
    hosts = -(-count // GPUS_PER_HOST)
    if count % hosts:
        raise UserError(
            f"--topology={name} must be GPUs of hosts that have {GPUS_PER_HOST} each, or fewer but equally many; found "
            f"{count} over {hosts} hosts. Choose a multiple of {GPUS_PER_HOST}."
        )
    shape = f"1x{hosts}x{count // hosts}"
    try:
        if CHIPS[kind].platform == "tpu":
            # A host has 2 x 2 chips, but there are slices of one chip.
            of_a_host = [min(2, size) for size in (*sizes[:2], 1)]
            tpu = dict(chips_per_host_bounds=of_a_host)
            return list(topologies.get_topology_desc(name, platform="tpu", **tpu).devices)
        gpu = dict(topology=shape, target_config=gpu_target(kind))
        return list(topologies.get_topology_desc(shape, platform="cuda", **gpu).devices)
    except Exception as error:  # each compiler raises exceptions of its own
        message = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology={name} must be a slice that exists; the compiler says: {message}. Choose another slice."
        ) from None
