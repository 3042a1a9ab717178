"""Test environment: eight virtual CPU devices, a persistent compilation cache, and annotations checked at run time."""

import os
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# With the CPU scheduler that XLA uses by default, devices may run independent collectives in different orders and then
# wait for each other forever.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
# The suite spends most of its time compiling, and compiles about twice as fast without LLVM's optimizations.
# `make test-all` keeps them.
if os.environ.get("GRPO_JAX_TEST_OPTIMIZED") != "1":
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "grpo_jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# JAX reads the environment when it is imported, which the following imports do.
from jaxtyping import install_import_hook

import tests.strict  # noqa: F401  (install_import_hook refers to it by name)

# jaxtyping and beartype check the annotations of these modules, also while they are traced.
CHECKED = (
    "grpo_jax.model",
    "grpo_jax.learn",
    "grpo_jax.rollout.draws",
    "grpo_jax.rollout.slots",
    "grpo_jax.rollout.sampler",
    "grpo_jax.text.stops",
    "grpo_jax.tiny.pretrain",
)
install_import_hook(list(CHECKED), "tests.strict.check")
