"""Eight virtual devices on the CPU, a compilation cache outside the repository, shapes and types checked as code runs."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation, which takes about half as long without LLVM's optimizations. `make test-all`
# runs with them.
OPTIMIZED = os.environ.get("GRPO_JAX_TEST_OPTIMIZED") == "1"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8" + (
    "" if OPTIMIZED else " --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "grpo_jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook  # noqa: E402

import tests.strict  # noqa: E402,F401  (named below)

# In the tests the annotated shapes and dtypes of these modules are checked, at trace time too.
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
