"""Plans of a small model for TPUs and GPUs show nothing that a plan must not show, and say what does not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.config import check, default
from grpo_jax.planning.checks import violations
from grpo_jax.planning.models import plan_model

REPO = Path(__file__).parents[2]
SMALL = """
    rollout.max_prompt_tokens=128 rollout.max_tokens=128 train.micro_tokens=256 train.chunk_tokens=128
    model.compute_dtype=bfloat16 model.reference_dtype=bfloat16 mesh.data=1 mesh.fsdp=-1
""".split()


def plan(config, topology, *keys):
    command = [sys.executable, "-m", "grpo_jax.plan", f"--config={config}", f"--topology={topology}", "--json"]
    command += [f"--config.{key}" for key in keys]
    return subprocess.run(command, cwd=REPO, env=dict(os.environ), capture_output=True, text=True)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "h100:4"])
def test_a_small_preset_compiles_fits_and_wastes_nothing(topology):
    done = plan("configs/r1zero.py", topology, *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert set(report["programs"]) == {"placement", "prefill", "decode 192", "decode 256", "scoring", "update"}
    assert not any(program["counts"]["unknown"] for program in report["programs"].values())
    assert violations(report, plan_model(check(default()))) == []
    assert report["programs"]["decode 256"]["counts"]["product_flops"] > 0
    assert {each["kind"] for each in report["programs"]["update"]["counts"]["collectives"]} >= {"reduce-scatter"}


def test_a_model_that_does_not_fit_is_refused_with_what_would():
    done = plan("configs/r1zero.py:qwen2.5-7b", "v5e:2x2")
    assert done.returncode == 3
    report = json.loads(done.stdout)
    assert "at most 0 to fit in memory" in report["refusal"] and not report["fits"]
    assert {"settings": "32 chips", "suffices": True}.items() <= report["remedies"][1].items()


@pytest.mark.parametrize("topology", ["v5p:3x5x7", "h100:17"])
def test_devices_that_do_not_exist_are_a_mistake(topology):
    done = plan("configs/r1zero.py", topology, *SMALL)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: --topology={topology} must be")
