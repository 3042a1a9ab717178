"""Every key of a training config with its meaning, and the check of all values before any device work."""

import json
import shlex
from collections import namedtuple
from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.errors import UserError

# Keys that are not there for a reason, which a user who looks for them is told.
REFUSED = dict.fromkeys(
    ("rollout.top_k", "rollout.top_p", "rollout.min_p"),
    (
        "the update scores the whole distribution, so the ratio of draws from a truncated one would be biased; "
        "eval.top_k, eval.top_p and eval.min_p may be set"
    ),
)

# Keys that may differ when a run is resumed: they do not change what an update computes.
RESUMABLE = (
    "total_steps",
    "checkpoint",
    "eval",
    "log",
    "mesh",
    "rollout.slots",
    "model.attention",
    "update.micro_tokens",
    "update.chunk_tokens",
    "update.remat",
    "optim.max_skips",
)


def default() -> ConfigDict:
    """The main job's config: the tiny base model on a CPU. configs/*.py start from it.

    In those files write `config["update"].minibatches`: `config.update` is a method of ConfigDict.
    """
    return ConfigDict(
        dict(
            job="grpo",
            seed=0,  # decides every draw of the run
            total_steps=80,  # updates
            model=dict(
                path="tiny",  # a Hugging Face folder, hub id or GGUF file; "tiny" is the base model in the package
                param_dtype="float32",  # of the master weights; bfloat16 loses steps below 1/256 of a weight
                reference_dtype="float32",  # of the frozen reference; none is kept where loss.kl_coef is 0
                compute_dtype="float32",  # of activations, and of weights where they are used; "bfloat16" on accelerators
                logit_dtype="float32",  # that the head's product comes in; probabilities are always float32
                attention="auto",  # "plain", "blocks", "splash" (TPU), "cudnn" (NVIDIA), or the best there is; all mean the same
            ),
            task=dict(
                name="addition",  # "addition" or "jsonl"
                digits=3,  # addition: of both numbers
                shots=0,  # addition: questions that stand answered before each, for a model that does not know the tags
                path="",  # jsonl: the file, one object a line with `question` and `answer`
                eval_path="",  # jsonl: held-out questions; "": every tenth line of task.path
            ),
            rollout=dict(
                prompts=16,  # B, questions a rollout
                samples=8,  # G, completions a question
                max_prompt_tokens=80,  # T; a longer prompt is an error
                max_tokens=56,  # S, where a completion is cut
                temperature=1.0,  # of sampling, and of every log-probability
                stop_strings=("</answer>",),  # a completion ends with the token that completes one, or with an EOS
                slots=0,  # completions drawn at a time; 0: as many as fit in memory
            ),
            update=dict(
                minibatches=1,  # updates a rollout is cut into
                epochs=1,  # times a rollout is gone through
                micro_tokens=1024,  # that a shard of rows computes on at a time, if the longest sequence is not longer
                chunk_tokens=512,  # of those, how many have logits at a time
                remat="layers",  # what is computed again backwards: "layers" (but attention), "matmuls" (all but them), "none"
            ),
            loss=dict(
                kl_coef=0.001,  # beta; 0: no reference model is kept
                clip_low=0.2,  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
                clip_high=0.2,
            ),
            optim=dict(
                name="adamw",  # "adamw", "adafactor", "lion" or "muon" (the matrices of the layers; the rest is AdamW's)
                lr=1.5e-4,  # the largest, after the warm-up; of a step of about 1 in root mean square (Muon's: 0.2)
                schedule="constant",  # after the warm-up: "constant", or down as "linear" or "cosine"
                warmup_steps=0,  # updates
                decay_steps=0,  # updates until the end of a schedule that goes down, the warm-up's included
                end_lr_fraction=0.0,  # of lr, at the end of a schedule that goes down, and after it
                b1=0.9,  # decay of AdamW's and Muon's first moment; Lion's step: b1 * moment + (1 - b1) * gradient
                b2=0.999,  # decay of AdamW's second moment, and of Lion's only one; Adafactor uses neither
                mu_dtype="float32",  # of the moment that averages gradients, or "bfloat16"; Adafactor has none
                weight_decay=0.0,  # an update takes lr * weight_decay of a parameter away
                grad_clip=1.0,  # largest global norm of a gradient
                max_skips=5,  # updates in a row whose gradient is not finite and that are left out, before the run ends
            ),
            mesh=dict(  # the sizes multiply to the number of devices; one may be -1 and takes what is left
                data=-1,  # rows are split, parameters copied
                fsdp=1,  # rows are split, parameters too, and gathered layer by layer
                expert=1,  # rows are split, and the experts of a mixture
                tensor=1,  # heads, MLP and vocabulary are split
            ),
            checkpoint=dict(
                every_steps=20,  # updates; the last one is always saved
                keep=2,  # checkpoints kept, the newest
            ),
            eval=dict(
                every_steps=0,  # updates; 0: before the first and after the last only
                questions=256,  # held-out problems
                temperature=1.0,  # 0 is greedy
                top_k=0,  # draw among the k likeliest tokens; 0: all
                top_p=1.0,  # among the fewest with this probability together
                min_p=0.0,  # among those with this part of the largest probability
            ),
            log=dict(
                every_steps=5,  # updates between two lines on the console, and between two files of samples
                samples=16,  # completions in such a file
                entropy=True,  # policy/entropy among the metrics: a pass over the logits
            ),
        )
    )


def pretrain_default() -> ConfigDict:
    """The config of pretraining (configs/pretrain_tiny.py)."""
    return ConfigDict(
        dict(
            job="pretrain",
            seed=0,
            total_steps=800,
            corpus=dict(
                digits=3,  # of the numbers that are added
                exercises=3,  # after each conversation
            ),
            batch=dict(
                rows=64,  # pages a step
                row_tokens=192,  # where a page is cut
            ),
            model=dict(
                vocab_size=512,
                hidden_size=128,
                intermediate_size=384,
                num_layers=4,
                num_heads=4,
                num_kv_heads=2,
                head_dim=32,
                max_positions=512,
                tie_embeddings=True,
            ),
            optim=dict(
                lr=2e-3,  # the top of a cosine
                warmup_steps=50,
                weight_decay=0.01,
                grad_clip=1.0,
            ),
            log=dict(
                every_steps=50,
            ),
        )
    )


def freeze(config: ConfigDict):
    """The same keys as nested named tuples: immutable, and read as `config.section.key` everywhere else."""
    values = {key: freeze(value) if isinstance(value, ConfigDict) else value for key, value in config.items()}
    return namedtuple("Config", values)(**values)


def expect(fine: bool, key: str, expected: str, found, cure: str) -> None:
    """Raises the one-line UserError of a key with a wrong value."""
    if not fine:
        raise UserError(f"expected {key} to be {expected}; found {found}; {cure}")


POSITIVE = (
    "total_steps",
    "rollout.prompts",
    "rollout.max_prompt_tokens",
    "rollout.max_tokens",
    "update.minibatches",
    "update.epochs",
    "update.micro_tokens",
    "update.chunk_tokens",
    "optim.lr",
    "optim.grad_clip",
    "optim.max_skips",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "eval.questions",
    "log.every_steps",
    "task.digits",
)
NOT_NEGATIVE = (
    "seed",
    "loss.kl_coef",
    "loss.clip_low",
    "loss.clip_high",
    "optim.warmup_steps",
    "optim.decay_steps",
    "optim.weight_decay",
    "eval.every_steps",
    "eval.temperature",
    "eval.top_k",
    "log.samples",
    "task.shots",
    "rollout.slots",
)


def at(config, dotted: str):
    """The value of `section.key`."""
    for name in dotted.split("."):
        config = config[name]
    return config


def check_keys(raw: ConfigDict, known: ConfigDict) -> None:
    """Checks that a config has the keys of a default one, with values of their types, and its job."""
    expect(raw.get("job") == known.job, "job", repr(known.job), repr(raw.get("job")), "pass a --config of that job")
    job, known, found = known.job, flat(known.to_dict()), flat(raw.to_dict())
    odd = sorted(known.keys() ^ found.keys())
    for key in REFUSED.keys() & set(odd):
        raise UserError(f"expected no {key} in training; found {found[key]}; {REFUSED[key]}")
    if odd:
        raise UserError(
            f"expected the keys that grpo_jax/config.py lists for job={job!r}; found {odd[0]} "
            f"{'missing' if odd[0] in known else 'unknown'}; start the config from the one there"
        )
    for key, value in known.items():
        whole = isinstance(value, float) and type(found[key]) is int
        expect(
            whole or type(found[key]) is type(value),
            key,
            f"of type {type(value).__name__}",
            repr(found[key]),
            f"set --config.{key}",
        )


def check_pretrain(raw: ConfigDict):
    """Checks the config of pretraining and freezes it; all its numbers but the seed are more than 0.

    Raises:
      UserError: as `check`.
    """
    check_keys(raw, pretrain_default())
    free = ("seed", "optim.warmup_steps", "optim.weight_decay")
    for key, value in flat(raw.to_dict()).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            expect(value > 0 or key in free and value == 0, key, "more than 0", value, f"set --config.{key}")
    expect(
        raw.total_steps > raw.optim.warmup_steps,
        "total_steps",
        "more than optim.warmup_steps",
        f"{raw.total_steps} and {raw.optim.warmup_steps}",
        "set --config.total_steps",
    )
    expect(
        raw.model.num_heads % raw.model.num_kv_heads == 0 and raw.model.head_dim % 2 == 0,
        "model.num_heads",
        "a multiple of model.num_kv_heads, and model.head_dim even",
        f"{raw.model.num_heads}, {raw.model.num_kv_heads} and {raw.model.head_dim}",
        "set --config.model.num_heads",
    )
    expect(
        raw.batch.row_tokens <= raw.model.max_positions,
        "batch.row_tokens",
        "at most model.max_positions",
        f"{raw.batch.row_tokens} and {raw.model.max_positions}",
        "lower it",
    )
    expect(raw.corpus.digits <= 9, "corpus.digits", "at most 9", raw.corpus.digits, "set --config.corpus.digits")
    expect(
        raw.model.vocab_size >= 300,
        "model.vocab_size",
        "300 or more, for the bytes and some words",
        raw.model.vocab_size,
        "set --config.model.vocab_size",
    )
    return freeze(raw)


def check(raw: ConfigDict):
    """Checks every value and combination that needs neither the model nor the devices, and freezes the config.

    Raises:
      UserError: with the key, what it may be, what it is, and the way out.
    """
    check_keys(raw, default())
    config = freeze(raw)
    for key in POSITIVE:
        expect(at(raw, key) > 0, key, "more than 0", at(raw, key), f"set --config.{key}")
    for key in NOT_NEGATIVE:
        expect(at(raw, key) >= 0, key, "0 or more", at(raw, key), f"set --config.{key}")
    for key in (
        "model.param_dtype",
        "model.reference_dtype",
        "model.compute_dtype",
        "model.logit_dtype",
        "optim.mu_dtype",
    ):
        expect(
            at(raw, key) in ("float32", "bfloat16"),
            key,
            "'float32' or 'bfloat16'",
            repr(at(raw, key)),
            f"set --config.{key}",
        )
    ways = ("auto", "plain", "blocks", "splash", "cudnn")
    expect(
        config.model.attention in ways,
        "model.attention",
        f"one of {', '.join(ways)}",
        repr(config.model.attention),
        "set --config.model.attention",
    )
    expect(
        config.update.remat in ("none", "matmuls", "layers"),
        "update.remat",
        "'none', 'matmuls' or 'layers'",
        repr(config.update.remat),
        "set --config.update.remat",
    )
    expect(
        config.task.name in ("addition", "jsonl"),
        "task.name",
        "'addition' or 'jsonl'",
        repr(config.task.name),
        "for your own questions use task.name=jsonl and task.path=FILE.jsonl",
    )
    expect(
        config.task.name != "jsonl" or config.task.path,
        "task.path",
        "a JSONL file, as task.name is 'jsonl'",
        "none",
        "set --config.task.path=FILE.jsonl",
    )
    expect(config.task.digits <= 9, "task.digits", "at most 9", config.task.digits, "set --config.task.digits")
    expect(
        config.rollout.samples >= 2,
        "rollout.samples",
        "2 or more",
        config.rollout.samples,
        "an answer's advantage is measured against the others of its group",
    )
    expect(
        config.rollout.temperature >= 0.01,
        "rollout.temperature",
        "0.01 or more in training",
        config.rollout.temperature,
        "greedy answers of a group are all the same and teach nothing; eval.temperature may be 0",
    )
    expect(0 < config.eval.top_p <= 1, "eval.top_p", "in (0, 1]", config.eval.top_p, "set --config.eval.top_p")
    expect(0 <= config.eval.min_p <= 1, "eval.min_p", "in [0, 1]", config.eval.min_p, "set --config.eval.min_p")
    expect(
        all(isinstance(text, str) and text for text in config.rollout.stop_strings),
        "rollout.stop_strings",
        "strings that are not empty",
        config.rollout.stop_strings,
        "set --config.rollout.stop_strings",
    )
    expect(
        sum(len(text) for text in config.rollout.stop_strings) <= 4000,
        "rollout.stop_strings",
        "at most 4000 characters together",
        f"{sum(len(text) for text in config.rollout.stop_strings)}",
        "shorten them",
    )
    expect(config.seed < 2**32, "seed", "below 2**32", config.seed, "set --config.seed")
    for key in ("optim.b1", "optim.b2"):
        expect(0 <= at(raw, key) < 1, key, "in [0, 1)", at(raw, key), f"set --config.{key}")
    check_optim(config)
    rows = config.rollout.prompts * config.rollout.samples
    expect(
        rows % config.update.minibatches == 0,
        "update.minibatches",
        f"a divisor of the {rows} rows (rollout.prompts * rollout.samples)",
        config.update.minibatches,
        "change one of the three",
    )
    return config


def check_optim(config) -> None:
    """Checks the combinations of the `optim` section."""
    optim = config.optim
    expect(
        optim.name in ("adamw", "adafactor", "lion", "muon"),
        "optim.name",
        "'adamw', 'adafactor', 'lion' or 'muon'",
        repr(optim.name),
        "set --config.optim.name",
    )
    expect(
        optim.schedule in ("constant", "linear", "cosine"),
        "optim.schedule",
        "'constant', 'linear' or 'cosine'",
        repr(optim.schedule),
        "set --config.optim.schedule",
    )
    expect(
        0 <= optim.end_lr_fraction <= 1,
        "optim.end_lr_fraction",
        "in [0, 1]",
        optim.end_lr_fraction,
        "set --config.optim.end_lr_fraction",
    )
    if optim.schedule != "constant":
        # A length of its own: total_steps may change when a run is resumed, and the learning rates must not.
        expect(
            optim.decay_steps > optim.warmup_steps,
            "optim.decay_steps",
            f"more than optim.warmup_steps, as optim.schedule is {optim.schedule!r}",
            f"{optim.decay_steps} and {optim.warmup_steps}",
            "set --config.optim.decay_steps, to total_steps or more",
        )
        expect(
            optim.end_lr_fraction or config.total_steps <= optim.decay_steps,
            "total_steps",
            "at most optim.decay_steps, after which the learning rate is 0",
            f"{config.total_steps} and {optim.decay_steps}",
            "lower it, or begin a run with more optim.decay_steps or an optim.end_lr_fraction",
        )
    key = "b2" if optim.name == "lion" else "b1"
    if optim.mu_dtype == "bfloat16" and optim.name != "adafactor":
        expect(
            getattr(optim, key) <= 0.99,
            f"optim.{key}",
            "at most 0.99 with optim.mu_dtype='bfloat16', whose 8 bits do not hold smaller changes of the moment",
            getattr(optim, key),
            f"set --config.optim.{key}",
        )


def check_model(config, model_config) -> None:
    """Checks the lengths against the model's positions."""
    longest = config.rollout.max_prompt_tokens + config.rollout.max_tokens
    expect(
        longest <= model_config.max_positions,
        "rollout.max_prompt_tokens + rollout.max_tokens",
        f"at most the model's {model_config.max_positions} positions (max_position_embeddings)",
        f"{config.rollout.max_prompt_tokens} + {config.rollout.max_tokens}",
        "lower one of them",
    )


def flat(config: dict, prefix: str = "") -> dict:
    """{`section.key`: value} of nested dicts."""
    out = {}
    for key, value in config.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def as_flag(value) -> str:
    """A value as the command line takes it."""
    return shlex.quote(json.dumps(value)) if isinstance(value, tuple) else str(value)


def with_tuples(values):
    """Parsed JSON with its lists as tuples, as a config has them."""
    if isinstance(values, dict):
        return {key: with_tuples(value) for key, value in values.items()}
    return tuple(values) if isinstance(values, list) else values


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Checks that a workdir is new or belongs to this config.

    Raises:
      UserError: the workdir holds a run of another config (keys in RESUMABLE may differ), or other files.
    """
    path = Path(workdir) / "config.json"
    mine = config.to_dict()
    if path.is_file():
        theirs, ours = flat(read_config(workdir).to_dict()), flat(mine)
        for key in sorted(theirs.keys() | ours.keys()):
            same = theirs.get(key) == ours.get(key)
            if key not in theirs or key not in ours:
                raise UserError(
                    f"expected the config keys that {workdir} was begun with; found {key} "
                    f"{'added' if key in ours else 'gone'}: another version of grpo_jax began it; choose "
                    "another --workdir"
                )
            if not same and not any(key == free or key.startswith(free + ".") for free in RESUMABLE):
                raise UserError(
                    f"expected the config that {workdir} was begun with; found {key}={ours.get(key)!r} where the run "
                    f"has {theirs.get(key)!r}; choose another --workdir or pass --config.{key}={as_flag(theirs.get(key))}"
                )
    elif path.parent.exists() and (not Path(workdir).is_dir() or any(Path(workdir).iterdir())):
        raise UserError(
            f"expected a new folder or one of an earlier run at {workdir}; found other files there; "
            "choose another --workdir"
        )


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json, whole or not at all: what the run, resumed or not, goes on with.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = workdir / "config.json.partial"
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        partial.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(
            f"expected a folder that can be written at {workdir}; found: {error}; choose another --workdir"
        ) from None


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run.

    Raises:
      UserError: the folder has no readable config.json.
    """
    path = Path(workdir) / "config.json"
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"{str(values)[:40]!r}, no JSON object")
        return ConfigDict(with_tuples(values))
    except (OSError, ValueError) as error:
        raise UserError(
            f"expected the workdir of a run, with config.json, at {workdir}; found: {error}; "
            "pass the --workdir of a training run"
        ) from None
