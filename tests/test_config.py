"""The config: no key without a reader, a case for each rule, and what a workdir may be used for."""

import ast
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from grpo_jax.config import (
    check,
    check_model,
    check_workdir,
    default,
    flat,
    freeze,
    pretrain_default,
    read_config,
    write_config,
)
from grpo_jax.errors import UserError
from grpo_jax.flags import override
from grpo_jax.model.architecture import ModelConfig

PACKAGE = Path(__file__).parent.parent / "grpo_jax"


def changed(**values):
    """The default config with other values: rollout__samples=1 stands for rollout.samples. 16 * 8 rows of 80 + 64."""
    sizes = dict(rollout__prompts=16, rollout__samples=8, rollout__max_prompt_tokens=80, rollout__max_tokens=64)
    config = default()
    for key, value in (sizes | values).items():
        override(config, key.replace("__", "."), str(value))
    return config


def attributes(source: str) -> set[str]:
    """`b.c` of every expression that ends in `.b.c` or is `b.c`. Strings and comments do not count as reading."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
            found.add(f"{owner}.{node.attr}")
    return found


def unread(config) -> list[str]:
    """The leaf keys that no module but config.py reads."""
    read = set()
    for path in PACKAGE.glob("*.py"):
        if path.stem != "config":
            read |= attributes(path.read_text(encoding="utf-8"))
    whole = lambda key: key if "." in key else f"config.{key}"
    return [key for key in flat(config.to_dict()) if whole(key) not in read and f"raw.{key}" not in read]


def test_every_key_is_read_by_the_code():
    assert unread(default()) == []


def test_every_key_of_pretraining_is_read_by_the_code():
    shape = {f"model.{field.name}" for field in dataclasses.fields(ModelConfig)}  # passed on as a whole
    assert [key for key in unread(pretrain_default()) if key not in shape] == []


def test_a_key_that_nobody_reads_is_found():
    config = default()
    config.rollout.forgotten = 1
    config.forgotten = 1
    assert sorted(unread(config)) == ["forgotten", "rollout.forgotten"]


def test_default_config_passes_and_keeps_its_values():
    assert check(default())._asdict().keys() == default().to_dict().keys()
    config = check(changed(seed=3, optim__lr=0.5, task__path="q.jsonl"))
    assert (config.seed, config.optim.lr, config.task.path, config.rollout.prompts) == (3, 0.5, "q.jsonl", 16)


def test_a_checked_config_cannot_be_changed():
    config = check(default())
    with pytest.raises(AttributeError):
        config.seed = 1
    with pytest.raises(AttributeError):
        config.loss.kl_coef = 0.5
    with pytest.raises(AttributeError):
        config.loss.new = 0.5
    with pytest.raises(TypeError):
        config["seed"] = 1
    assert (config.seed, config.loss.kl_coef) == (0, 0.001)


def test_a_frozen_config_does_not_follow_its_source():
    source = default()
    config = freeze(source)
    source.loss.kl_coef = 0.5
    assert config.loss.kl_coef == 0.001


@pytest.mark.parametrize(
    "key",
    [
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
    ],
)
@pytest.mark.parametrize("value", ["0", "-1"])
def test_value_must_be_more_than_0(key, value):
    config = default()
    override(config, key, value)
    with pytest.raises(UserError, match=rf"expected {key} to be more than 0; found {value}(\.0)?; set --config.{key}"):
        check(config)


@pytest.mark.parametrize(
    "key",
    [
        "seed",
        "loss.kl_coef",
        "loss.clip_low",
        "loss.clip_high",
        "optim.warmup_steps",
        "optim.decay_steps",
        "optim.weight_decay",
        "eval.every_steps",
        "eval.temperature",
        "log.samples",
    ],
)
def test_value_must_be_0_or_more(key):
    config = default()
    override(config, key, "-1")
    with pytest.raises(UserError, match=rf"expected {key} to be 0 or more; found -1(\.0)?; set --config.{key}"):
        check(config)
    override(config, key, "0")
    check(config)


@pytest.mark.parametrize(
    "values, says",
    [
        (
            dict(task__name="sums"),
            "expected task.name to be 'addition' or 'jsonl'; found 'sums'; .*task.path=FILE.jsonl",
        ),
        (dict(task__name="jsonl"), "expected task.path to be a JSONL file.*found none; set --config.task.path"),
        (dict(task__digits=10), "expected task.digits to be at most 9; found 10"),
        (dict(rollout__samples=1), "expected rollout.samples to be 2 or more; found 1; .*measured against the others"),
        (dict(rollout__samples=0), "expected rollout.samples to be 2 or more; found 0"),
        (dict(rollout__temperature=0), "expected rollout.temperature to be 0.01 or more in training; found 0.0; "),
        (dict(rollout__temperature=-1), "expected rollout.temperature to be 0.01 or more in training; found -1.0; "),
        (dict(optim__b1=1), r"expected optim.b1 to be in \[0, 1\); found 1.0"),
        (dict(optim__b2=-0.1), r"expected optim.b2 to be in \[0, 1\); found -0.1"),
        (dict(optim__name="sgd"), "expected optim.name to be 'adamw', 'adafactor', 'lion' or 'muon'; found 'sgd'"),
        (dict(optim__schedule="sqrt"), "expected optim.schedule to be 'constant', 'linear' or 'cosine'; found 'sqrt'"),
        (dict(optim__mu_dtype="float16"), "expected optim.mu_dtype to be 'float32' or 'bfloat16'; found 'float16'"),
        (dict(optim__end_lr_fraction=1.5), r"expected optim.end_lr_fraction to be in \[0, 1\]; found 1.5"),
        (dict(optim__end_lr_fraction=-0.5), r"expected optim.end_lr_fraction to be in \[0, 1\]; found -0.5"),
        (
            dict(optim__schedule="linear"),
            "expected optim.decay_steps to be more than optim.warmup_steps.*'linear'; found 0 and 0; set --config",
        ),
        (
            dict(optim__schedule="cosine", optim__decay_steps=90, optim__warmup_steps=90),
            "expected optim.decay_steps to be more than optim.warmup_steps.*'cosine'; found 90 and 90",
        ),
        (
            dict(
                total_steps=91, optim__schedule="linear", optim__decay_steps=90
            ),  # the last update would change nothing
            "expected total_steps to be at most optim.decay_steps, .* is 0; found 91 and 90; ",
        ),
        (
            dict(optim__name="lion", optim__mu_dtype="bfloat16"),
            "expected optim.b2 to be at most 0.99 with .*'bfloat16'.*found 0.999",
        ),
        (
            dict(optim__b1=0.995, optim__mu_dtype="bfloat16"),
            "expected optim.b1 to be at most 0.99 with .*'bfloat16'.*found 0.995",
        ),
        (
            dict(update__minibatches=3),
            "expected update.minibatches to be a divisor of the 128 rows .*found 3; change one of the three",
        ),
        (dict(update__remat="all"), "expected update.remat to be 'none', 'matmuls' or 'layers'; found 'all'"),
        (
            dict(model__attention="flash"),
            "expected model.attention to be one of auto, plain, blocks, splash, cudnn; found",
        ),
        (
            dict(model__reference_dtype="int8"),
            "expected model.reference_dtype to be 'float32' or 'bfloat16'; found 'int8'",
        ),
        (dict(seed=2**32), "expected seed to be "),  # JAX drops the upper bits: the same keys as of 0
        (dict(seed=10**30), "expected seed to be "),
    ],
)
def test_rule_of_check(values, says):
    with pytest.raises(UserError, match=says):
        check(changed(**values))


@pytest.mark.parametrize(
    "values",
    [
        dict(task__digits=9),
        dict(task__digits=1),
        dict(rollout__samples=2),
        dict(rollout__temperature=0.01),
        dict(optim__b1=0),
        dict(optim__b2=0.999),
        dict(optim__decay_steps=0, optim__warmup_steps=100),
        *(dict(optim__name=name) for name in ("adafactor", "lion", "muon")),
        dict(optim__mu_dtype="bfloat16"),
        dict(optim__name="lion", optim__mu_dtype="bfloat16", optim__b1=0.995, optim__b2=0.99),
        dict(optim__name="adafactor", optim__mu_dtype="bfloat16", optim__b1=0.995),
        dict(total_steps=90, optim__schedule="cosine", optim__decay_steps=90, optim__warmup_steps=89),
        dict(total_steps=91, optim__schedule="linear", optim__decay_steps=90, optim__end_lr_fraction=0.1),
        dict(total_steps=91, optim__schedule="linear", optim__decay_steps=90, optim__end_lr_fraction=1),
        dict(loss__kl_coef=0),
        dict(eval__temperature=0),
        dict(update__minibatches=32),
        dict(task__name="jsonl", task__path="q.jsonl"),
        dict(seed=2**32 - 1),
    ],
)
def test_values_at_the_edge_pass(values):
    check(changed(**values))


def test_job_of_a_training_config_is_grpo():
    """A config of pretraining has other keys, and an unknown job must not train as if it were known."""
    with pytest.raises(UserError, match="expected (job|the keys)"):
        check(pretrain_default())
    with pytest.raises(UserError, match="job.*'sft'"):
        check(changed(job="sft"))


def test_keys_are_those_of_the_default_config():
    """A config.json of another version, or a config file that was not begun with default()."""
    lacking, more = default(), default()
    del lacking.loss["clip_low"]
    more.loss.new = 1
    with pytest.raises(UserError, match="loss.clip_low missing"):
        check(lacking)
    with pytest.raises(UserError, match="loss.new unknown"):
        check(more)


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", "0"),
        ("seed", 0.0),
        ("seed", None),
        ("total_steps", True),
        ("optim.lr", "1e-3"),
        ("task.path", 5),
    ],
)
def test_values_are_of_the_default_configs_types(key, value):
    """A config file or a config.json may hold anything."""
    config = default().to_dict()
    *sections, name = key.split(".")
    section = config[sections[0]] if sections else config
    section[name] = value
    with pytest.raises(UserError, match=f"expected {key} to be of type .*; found {value!r}; set --config.{key}"):
        check(ConfigDict(config))
    config = default().to_dict()
    config["optim"]["lr"] = 1  # a whole number is a float, too
    assert check(ConfigDict(config)).optim.lr == 1


def test_prompt_and_completion_fit_the_model():
    """80 + 64 = 144 tokens."""
    config = check(changed())
    check_model(config, SimpleNamespace(max_positions=144))
    says = (
        r"rollout.max_prompt_tokens \+ rollout.max_tokens to be at most the model's 143 positions "
        r"\(max_position_embeddings\); found 80 \+ 64"
    )
    with pytest.raises(UserError, match=says):
        check_model(config, SimpleNamespace(max_positions=143))


def test_config_of_a_run_is_read_back(tmp_path):
    config = changed(optim__lr=1e-5, task__path="q.jsonl")
    write_config(tmp_path / "a" / "run", config)
    again = read_config(tmp_path / "a" / "run")
    assert again.to_dict() == config.to_dict()
    assert check(again) == check(config)
    check_workdir(tmp_path / "a" / "run", config)  # the same command resumes


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "5", "null"])
def test_folder_without_a_readable_config_is_a_user_error(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="expected the workdir of a run, with config.json, at .*pass the --workdir"):
        read_config(tmp_path)


# What does not change an update's result may change between a run and its continuation.
MAY_CHANGE = {
    "total_steps",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "eval.every_steps",
    "eval.questions",
    "eval.temperature",
    "eval.top_k",
    "eval.top_p",
    "eval.min_p",
    "rollout.slots",
    "log.every_steps",
    "log.samples",
    "mesh.data",
    "mesh.fsdp",
    "mesh.expert",
    "mesh.tensor",
    "update.micro_tokens",
    "update.chunk_tokens",
    "update.remat",
    "model.attention",
    "log.entropy",
    "optim.max_skips",
}


@pytest.mark.parametrize("key", flat(default().to_dict()))
def test_only_keys_that_change_no_update_may_change_on_a_resume(tmp_path, key):
    write_config(tmp_path, default())
    config = default()
    old = flat(config.to_dict())[key]
    new = (
        not old
        if isinstance(old, bool)
        else f"{old}x"
        if isinstance(old, str)
        else (*old, "x")
        if isinstance(old, tuple)
        else old + 1
    )
    override(config, key, json.dumps(new) if isinstance(old, tuple) else str(new))
    if key in MAY_CHANGE:
        check_workdir(tmp_path, config)
        return
    with pytest.raises(UserError) as raised:
        check_workdir(tmp_path, config)
    for part in (f"found {key}={new!r}", repr(old), str(tmp_path), "choose another --workdir"):
        assert part in str(raised.value)


def test_key_that_the_run_does_not_have_is_a_difference(tmp_path):
    write_config(tmp_path, default())
    config = default()
    config.loss.new = 1
    with pytest.raises(UserError, match="found loss.new added: another version"):
        check_workdir(tmp_path, config)


def test_new_or_empty_folder_is_a_workdir(tmp_path):
    check_workdir(tmp_path / "new" / "run", default())
    check_workdir(tmp_path, default())
    assert not list(tmp_path.iterdir())  # looking creates nothing


def test_folder_with_other_files_is_no_workdir(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="found other files there; choose another --workdir"):
        check_workdir(tmp_path, default())
    with pytest.raises(UserError, match="choose another --workdir"):
        check_workdir(tmp_path / "thesis.tex", default())
