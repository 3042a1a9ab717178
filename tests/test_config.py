"""The config: its schema and its checks, whether the code reads every key, and which workdirs a run may use."""

import ast
import dataclasses
import functools
import operator
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from grpo_jax.config import (
    Config,
    check,
    check_files,
    check_model,
    check_workdir,
    default,
    pretrain_default,
    write_config,
)
from grpo_jax.config.docs import markdown
from grpo_jax.config.flags import load_config, override_key
from grpo_jax.config.help import explain
from grpo_jax.config.keys import flatten, key_specs, require_choices
from grpo_jax.config.pretrain_schema import PretrainConfig
from grpo_jax.config.rules import NO_EFFECT, USERS_FUNCTION, check_pretrain
from grpo_jax.config.schema import AdvantageSection, LossSection
from grpo_jax.config.workdir import check_trained_config, digest_files, read_config
from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig

REPO = Path(__file__).parent.parent
PACKAGE = REPO / "grpo_jax"


def changed(**values) -> ConfigDict:
    """Returns the default config with other values; `rollout__samples=1` sets rollout.samples.

    Unless changed, it has 16 x 8 sequences of 80 + 64 tokens.
    """
    sizes = {"rollout__prompts": 16, "rollout__samples": 8, "rollout__max_prompt_tokens": 80, "rollout__max_tokens": 64}
    config = default()
    for key, value in (sizes | values).items():
        override_key(config, key.replace("__", "."), str(value))
    return config


def dotted(node: ast.AST) -> list[str]:
    """Returns the names of `a.b.c`; the empty list for any other expression."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *names[::-1]] if isinstance(node, ast.Name) else []


def section_classes(config_class: type) -> dict[str, str]:
    """Returns the name of each section by the name of its class, and "" for the config's own class."""
    sections = {type(f.default).__name__: f.name for f in dataclasses.fields(config_class) if "spec" not in f.metadata}
    return sections | {config_class.__name__: ""}


def keys_read(source: str, config_class: type) -> set[str]:
    """Returns the config keys that the code reads, by type.

    An attribute counts if it is read from a config, named `cfg` (or `raw` before the check), as in
    `cfg.rollout.samples`; from a parameter that is annotated with a section's class, as in `rollout: RolloutSection`;
    or from a variable that is assigned a section, as in `rollout = cfg.rollout`. Attributes of other objects that have
    the name of a section do not count.
    """
    sections, keys = section_classes(config_class), set()

    def visit(node: ast.AST, prefixes: dict[str, str]) -> None:
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            prefixes = {name: prefix for name, prefix in prefixes.items() if name not in {a.arg for a in arguments}}
            for argument in arguments:
                kind = (dotted(argument.annotation) or [""])[-1] if argument.annotation else ""
                if kind in sections:
                    prefixes[argument.arg] = sections[kind]
                elif argument.arg in ("cfg", "raw") and not kind:
                    prefixes[argument.arg] = ""
        first, *rest = dotted(node) or [None]
        if first in prefixes and rest:
            keys.update(".".join(filter(None, [prefixes[first], *rest[:depth]])) for depth in range(1, len(rest) + 1))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            first, *rest = dotted(node.value) or [None]
            if len(rest) == 1 and prefixes.get(first) == "" and rest[0] in sections.values():
                prefixes[node.targets[0].id] = rest[0]
        for child in ast.iter_child_nodes(node):
            visit(child, prefixes)

    visit(ast.parse(source), {"cfg": "", "raw": ""})
    return keys


def unread(config: ConfigDict, config_class: type) -> list[str]:
    """Returns the keys of a config that no module outside of grpo_jax/config reads from a config of that class."""
    read = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "config" and (path.stem == "pretrain") == (config_class is PretrainConfig):
            read |= keys_read(path.read_text(encoding="utf-8"), config_class)
    return [key for key in flatten(config.to_dict()) if key not in read]


def test_the_code_reads_every_key():
    assert unread(default(), Config) == []


def test_the_code_reads_every_key_of_pretraining():
    passed_on = {f"model.{field.name}" for field in dataclasses.fields(ModelConfig)}
    read_by_main = {"job"}
    assert set(unread(pretrain_default(), PretrainConfig)) - passed_on <= read_by_main


@pytest.mark.parametrize(
    "key",
    [
        "forgotten",
        "rollout.forgotten",
        "rollout.tokens",
        "mesh.shape",
        "checkpoint.save",
        "optim.update",
        "model.layers",
        "train.tokens",
        "loss.shape",
        "task.path_name",
    ],
)
def test_a_key_that_nothing_reads_is_found(key):
    """Other objects have the attributes `rollout.tokens`, `mesh.shape` and so on; reading those does not count."""
    config = default()
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = 1
    assert key in unread(config, Config)


def test_reading_a_key_is_told_from_reading_an_attribute_of_the_same_name():
    source = """
def f(cfg, rollout, mesh: Mesh, optim: OptimSection, settings: "x.y" = cfg.seed):
    print(cfg.rollout.samples.real, rollout.tokens, mesh.shape, optim.lr, other.loss.kl_coef)
    train = cfg.train
    return train.epochs, lambda optim: optim.b1
"""
    assert keys_read(source, Config) >= {"seed", "rollout.samples", "optim.lr", "train.epochs"}
    assert not keys_read(source, Config) & {"rollout.tokens", "mesh.shape", "optim.b1", "loss.kl_coef"}


def test_the_default_config_passes_and_keeps_its_values():
    assert dataclasses.asdict(check(default())) == default().to_dict() == dataclasses.asdict(Config())
    assert check(default()) == Config() and check_pretrain(pretrain_default()) == PretrainConfig()
    cfg = check(changed(seed=3, optim__lr=0.5, task__name="file", task__path="q.jsonl"))
    assert (cfg.seed, cfg.optim.lr, cfg.task.path, cfg.rollout.prompts) == (3, 0.5, os.path.abspath("q.jsonl"), 16)


def test_a_checked_config_cannot_be_changed():
    cfg = check(default())
    with pytest.raises(AttributeError):
        cfg.seed = 1
    with pytest.raises(AttributeError):
        cfg.loss.kl_coef = 0.5
    with pytest.raises(AttributeError):
        cfg.loss.new = 0.5
    assert (cfg.seed, cfg.loss.kl_coef) == (0, 0.001)


def test_a_checked_config_is_hashable_and_does_not_follow_its_source():
    source = default()
    cfg = check(source)
    source.loss.kl_coef = 0.5
    assert cfg.loss.kl_coef == 0.001
    assert hash(cfg) == hash(check(default())) != hash(check(source))
    assert cfg.rollout.stop_strings == ("</answer>",)


@pytest.mark.parametrize(
    "config_class, prepare, checked", [(Config, default, check), (PretrainConfig, pretrain_default, check_pretrain)]
)
def test_the_schema_types_its_keys_and_allows_its_defaults(config_class, prepare, checked):
    types = (int, float, str, bool, tuple)
    for key, spec in key_specs(config_class).items():
        assert type(spec.default) in types and spec.accepts(spec.default), key
        assert spec.meaning and not spec.meaning.endswith("."), key
    for section in (config_class, *(type(f.default) for f in dataclasses.fields(config_class))):
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            if "spec" in field.metadata:
                assert type(field.default) is getattr(field.type, "__origin__", field.type), field
    assert checked(prepare())


def bounds_of(config_class):
    """Yields each key that has numeric bounds, with values just outside of them."""
    for key, spec in key_specs(config_class).items():
        step = 1 if isinstance(spec.default, int) else 1e-3
        values = [spec.more_than, spec.below]
        values += [spec.at_least - step] if spec.at_least is not None else []
        values += [spec.at_most + step] if spec.at_most is not None else []
        yield from ((config_class, key, value) for value in values if value is not None)


@pytest.mark.parametrize("config_class, key, value", [*bounds_of(Config), *bounds_of(PretrainConfig)])
def test_a_value_outside_of_its_bounds_is_refused(config_class, key, value):
    config = default() if config_class is Config else pretrain_default()
    override_key(config, key, str(value))
    with pytest.raises(UserError, match=rf"{key} must be (at least|more|at most|below) .*found .*Set --config.{key}="):
        (check if config_class is Config else check_pretrain)(config)


POSITIVE = (
    "total_steps",
    "rollout.prompts",
    "rollout.max_tokens",
    "train.minibatches",
    "train.epochs",
    "train.micro_tokens",
    "train.chunk_tokens",
    "optim.lr",
    "optim.grad_clip",
    "optim.max_skips",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "log.every_steps",
    "task.digits",
    "optim.eps",
)
NOT_NEGATIVE = (
    "seed",
    "loss.kl_coef",
    "loss.clip_low",
    "loss.clip_high",
    "optim.warmup_steps",
    "optim.decay_steps",
    "task.shots",
    "optim.weight_decay",
    "eval.every_steps",
    "eval.temperature",
    "eval.top_k",
    "rollout.slots",
    "advantage.ddof",
    "advantage.eps",
    "loss.entropy_coef",
    "reference.every_updates",
    "rollout.max_prompt_tokens",
    "eval.questions",
    "checkpoint.retry_s",
)


@pytest.mark.parametrize("key, smallest", [*((key, 0) for key in NOT_NEGATIVE), *((key, 1) for key in POSITIVE)])
def test_sizes_are_positive_and_counts_are_not_negative(key, smallest):
    config = default()
    override_key(config, key, str(smallest - 1))
    with pytest.raises(UserError, match=rf"{key} must be (at least|more than) .*; found {smallest - 1}(\.0)?\. Set"):
        check(config)
    override_key(config, key, str(smallest))
    check(config)


LENGTH_PART = dict(reward__parts='["accuracy", "length"]')


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(reward__parts="[]"), "reward.parts must be at least one name; found"),
        (
            dict(reward__parts='["accuracy", ""]'),
            r"reward.parts must be at least one name; found .*Set --config.reward",
        ),
        (dict(reward__parts="[1, 2]"), "reward.parts must be at least one name"),
        (dict(reward__weights='[1, "2"]'), "reward.weights must be finite numbers; found"),
        (dict(reward__weights="[1, true]"), "reward.weights must be finite numbers"),
        (dict(reward__weights="[1, NaN]"), "reward.weights must be finite numbers"),
        (dict(reward__weights="[1, 1e999]"), "reward.weights must be finite numbers"),
        (
            dict(reward__parts='("accuracy",)'),
            r"one number for each of the 1 reward.parts; found 2. Set --config.reward.weights='\[1.0\]' or other",
        ),
        (dict(reward__weights="[1, 2, 3]"), "for each of the 2 reward.parts; found 3"),
        *(
            (
                dict(reward__parts=f'["accuracy", "{name}"]'),
                f"distinct Python identifiers other than .*, '{label}'. Rename",
            )
            for name, label in (
                ("accuracy", "accuracy"),
                ("my.py:accuracy", "accuracy"),
                ("m:mean", "mean"),
                ("m:length_mean", "length_mean"),
                ("m:kl", "kl"),  # the metric reward/kl is the penalty of loss.kl_in=reward
                ("f.py:overlong", "overlong"),  # and reward/overlong that of rollout.overlong=soft
                ("m:f-g", "f-g"),
                ("m:", ""),
                ("f.py:a b", "a b"),
            )
        ),
        (dict(task__name="file"), "task.path must name a file of problems.*found none. Set --config.task.path=FILE"),
        (dict(task__max_unreadable=-0.1), "task.max_unreadable must be at least 0 and at most 1; found -0.1"),
        (dict(task__max_unreadable=1.1), "task.max_unreadable must be at least 0 and at most 1; found 1.1"),
        (dict(task__digits=10), "task.digits must be at least 1 and at most 9; found 10"),
        (
            dict(rollout__samples=1),
            "rollout.samples must be at least 2, because a completion's advantage .*; found 1. Set",
        ),
        (dict(rollout__temperature=0), "rollout.temperature must be at least 0.01, because greedy .*; found 0.0. Set"),
        (dict(optim__b1=1), "optim.b1 must be at least 0 and below 1; found 1.0"),
        (dict(optim__b2=-0.1), "optim.b2 must be at least 0 and below 1; found -0.1"),
        (dict(optim__name="sgd"), "optim.name must be 'adamw', 'adafactor', 'lion' or 'muon'; found 'sgd'"),
        (dict(optim__schedule="sqrt"), "optim.schedule must be 'constant', 'linear' or 'cosine'; found 'sqrt'"),
        (dict(optim__mu_dtype="float16"), "optim.mu_dtype must be 'float32' or 'bfloat16'; found 'float16'"),
        (dict(optim__end_lr_fraction=1.5), "optim.end_lr_fraction must be at least 0 and at most 1; found 1.5"),
        (
            dict(optim__schedule="linear"),
            "optim.decay_steps must be more than optim.warmup_steps=0 while optim.schedule='linear'; found 0",
        ),
        (
            dict(optim__schedule="cosine", optim__decay_steps=90, optim__warmup_steps=90),
            "optim.decay_steps must be more than optim.warmup_steps=90 while optim.schedule='cosine'; found 90",
        ),
        (  # the last update would change nothing
            dict(total_steps=91, optim__schedule="linear", optim__decay_steps=90),
            "total_steps must be at most optim.decay_steps=90, after which the learning rate is 0; found 91. Lower it",
        ),
        (
            dict(optim__name="lion", optim__mu_dtype="bfloat16"),
            "optim.b2 must be at most 0.99 with optim.mu_dtype='bfloat16'.*found 0.999",
        ),
        (
            dict(optim__b1=0.995, optim__mu_dtype="bfloat16"),
            "optim.b1 must be at most 0.99 with optim.mu_dtype='bfloat16'.*found 0.995",
        ),
        (
            dict(train__minibatches=3),
            "train.minibatches must be a divisor of the 128 sequences .*found 3. Change one of the three",
        ),
        (dict(train__remat="all"), "train.remat must be 'layers', 'matmuls' or 'none'; found 'all'"),
        (
            dict(model__attention="flash"),
            "model.attention must be 'auto', 'plain', 'blocks', 'splash' or 'cudnn'; found",
        ),
        (dict(model__reference_dtype="int8"), "model.reference_dtype must be 'float32' or 'bfloat16'; found 'int8'"),
        *(
            (dict(loss__clip_dual=value), f"loss.clip_dual must be 0 or more than 1; found {value}. Set")
            for value in (-1.0, 0.5, 1.0)
        ),
        (dict(advantage__ddof=2), "advantage.ddof must be at least 0 and at most 1; found 2"),
        (dict(loss__clip_difference=1.5), "loss.clip_difference must be at least 0 and at most 1; found 1.5"),
        (
            dict(loss__aggregate="constant"),
            "loss.constant_length must be at least 1 with loss.aggregate=constant; found 0. Set it, for example to "
            "rollout.max_tokens",
        ),
        *(
            (
                dict(rollout__overlong_cache=cache) | values,
                "rollout.overlong_cache must be 1 to rollout.max_tokens=64 with rollout.overlong=soft or the reward "
                f"part 'length', and 0 otherwise; found {cache}. Change one of them",
            )
            for cache, values in (
                (0, dict(rollout__overlong="soft")),
                (65, dict(rollout__overlong="soft")),
                (0, LENGTH_PART),
                (65, LENGTH_PART),
                (8, {}),
                (8, dict(rollout__overlong="zero")),
                (8, dict(rollout__overlong="mask")),
            )
        ),
        (
            dict(reward__language="zh"),
            "reward.language='zh' has no effect without the part 'language' in reward.parts. Add it, or pass "
            "--config.reward.language=en",
        ),
        (dict(reward__language="tlh"), "reward.language must be 'ar', .*'vi' or 'zh'; found 'tlh'"),
        (
            dict(reward__parts='["accuracy", "my.py:language"]', reward__language="zh"),
            "reward.language='zh' has no effect",
        ),
        (
            dict(reward__parts='["accuracy"]', reward__weights="[1]", reward__format_empty=True),
            "reward.format_empty=True has no effect without the part 'format' in reward.parts. Add it, or pass "
            "--config.reward.format_empty=False",
        ),
        (dict(reward__deadline=3), "reward.deadline=3.0 has no effect without a function .*, or pass --config.reward."),
        (dict(mesh__fsdp=0), "mesh.fsdp must be at least 1, or -1 for the devices that the other axes leave; found 0"),
        (dict(seed=2**32), "seed must be "),  # JAX drops the upper bits: the same keys as with seed 0
        (dict(seed=10**30), "seed must be "),
    ],
)
def test_a_wrong_value_or_combination_is_refused(values, says):
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
        dict(mesh__fsdp=-1),
        *(dict(optim__name=name) for name in ("adafactor", "lion", "muon")),
        dict(optim__mu_dtype="bfloat16"),
        dict(optim__name="lion", optim__mu_dtype="bfloat16", optim__b1=0.995, optim__b2=0.99),
        dict(total_steps=90, optim__schedule="cosine", optim__decay_steps=90, optim__warmup_steps=89),
        dict(total_steps=91, optim__schedule="linear", optim__decay_steps=90, optim__end_lr_fraction=0.1),
        dict(total_steps=91, optim__schedule="linear", optim__decay_steps=90, optim__end_lr_fraction=1),
        dict(loss__kl_coef=0),
        dict(eval__temperature=0),
        dict(train__minibatches=32),
        dict(task__name="file", task__path="q.jsonl"),
        dict(task__name="my.py:task"),
        dict(reward__parts='["m:accuracy"]', reward__weights="[-0.5]"),
        dict(loss__clip_dual=1.001),
        dict(loss__clip_dual=0),
        dict(advantage__ddof=1),
        dict(loss__aggregate="constant", loss__constant_length=1),
        dict(loss__clip_difference=0, loss__ratio="difference"),
        *(dict(rollout__overlong="soft", rollout__overlong_cache=cache) for cache in (1, 64)),
        *(dict(**LENGTH_PART, rollout__overlong_cache=cache) for cache in (1, 64)),
        dict(**LENGTH_PART, rollout__overlong="soft", rollout__overlong_cache=8),
        dict(reward__parts='["accuracy", "language"]', reward__language="zh"),
        dict(reward__parts='["accuracy", "language"]'),
        dict(reward__parts='["accuracy", "my.py:grade"]', reward__deadline=0.1),
        dict(seed=2**32 - 1),
    ],
)
def test_values_at_their_bounds_pass(values):
    check(changed(**values))


# A key without effect, the values that give it one, and the switch that takes it away.
IDLE = [
    *(
        (key, value, {"task.name": "file", "task.path": "q.jsonl"}, f"task.name={off!r}")
        for key, value in (
            ("task.path", "q.jsonl"),
            ("task.eval_path", "e.jsonl"),
            ("task.question", "problem"),
            ("task.answer", "solution"),
            ("task.choices", "options"),
        )
        for off in ("addition", "my.py:primes", "~/my.py:primes", "python")
    ),
    *(
        (key, value, {"task.name": "file", "task.path": "q.jsonl"}, f"task.name={off!r}")
        for key, value in (("task.too_long", "drop"), ("task.max_unreadable", "0.5"))
        for off in ("addition", "my.py:primes")
    ),
    *(
        (key, "2", {"task.name": "addition"}, f"task.name={off!r}")
        for key in ("task.digits", "task.shots")
        for off in ("file", "my.module:primes", "python")
    ),
    ("eval.every_steps", "5", {"eval.questions": "8"}, "eval.questions=0"),
    ("checkpoint.best", "eval/accuracy", {"eval.every_steps": "20"}, "eval.every_steps=0"),
    ("optim.decay_steps", "90", {"optim.schedule": "linear"}, "optim.schedule='constant'"),
    (
        "optim.end_lr_fraction",
        "0.1",
        {"optim.schedule": "cosine", "optim.decay_steps": "90"},
        "optim.schedule='constant'",
    ),
    *(
        (key, value, {"optim.name": name}, "optim.name='adafactor'")
        for key, value in (("optim.b1", "0.8"), ("optim.b2", "0.95"), ("optim.mu_dtype", "bfloat16"))
        for name in ("adamw", "muon")
    ),
    ("optim.b1", "0.8", {"optim.name": "lion"}, "optim.name='adafactor'"),
    ("optim.b2", "0.95", {"optim.name": "lion"}, "optim.name='adafactor'"),
    ("optim.mu_dtype", "bfloat16", {"optim.name": "lion", "optim.b2": "0.99"}, "optim.name='adafactor'"),
    *(
        ("optim.eps", "1e-15", {"optim.name": name}, f"optim.name={off!r}")
        for name in ("adamw", "muon")
        for off in ("adafactor", "lion")
    ),
    ("eval.top_k", "5", {"eval.temperature": "0.1"}, "eval.temperature=0.0"),
    ("eval.top_p", "0.9", {"eval.temperature": "0.1"}, "eval.temperature=0.0"),
    ("eval.min_p", "0.1", {"eval.temperature": "0.1"}, "eval.temperature=0.0"),
    ("advantage.ddof", "1", {"advantage.std": "batch"}, "advantage.std='none'"),
    ("advantage.eps", "1e-4", {"advantage.std": "group"}, "advantage.std='none'"),
    *(
        ("loss.clip_difference", "0.1", {"loss.ratio": "difference"}, f"loss.ratio={off!r}")
        for off in ("token", "sequence", "sequence_token", "detached")
    ),
    *(
        ("loss.clip_low", "0.1", {"loss.ratio": "sequence"}, f"loss.ratio={off!r}")
        for off in ("detached", "difference")
    ),
    *(
        ("loss.clip_dual", "3.0", {"loss.ratio": "sequence_token"}, f"loss.ratio={off!r}")
        for off in ("detached", "difference")
    ),
    *(
        ("loss.clip_high", "0.28", {"loss.ratio": on}, "loss.ratio='difference'")
        for on in ("token", "sequence", "sequence_token", "detached")
    ),
    *(
        ("loss.constant_length", "64", {"loss.aggregate": "constant"}, f"loss.aggregate={off!r}")
        for off in ("sequence", "token", "prompt")
    ),
    *(
        (key, value, {"loss.kl_coef": "0.1"}, "loss.kl_coef=0.0")
        for key, value in (
            ("model.reference_dtype", "bfloat16"),
            ("reference.every_updates", "400"),
            ("loss.kl", "k2"),
            ("loss.kl_corrected", "true"),
            ("loss.kl_in", "reward"),
        )
    ),
    ("loss.kl_corrected", "true", {"loss.kl_in": "loss"}, "loss.kl_in='reward'"),
]


@pytest.mark.parametrize("key, value, others, switch", IDLE)
def test_a_key_that_another_switches_off_is_refused(key, value, others, switch):
    config = default()
    for name, text in {key: value, **others}.items():
        override_key(config, name, text)
    check(config)
    name, _, off = switch.partition("=")
    config = default()
    override_key(config, name, off.strip("'"))
    if off == "'file'":
        config.task.path = "q.jsonl"
    check(config)
    override_key(config, key, value)
    with pytest.raises(UserError) as raised:
        check(config)
    reset = str(default()[key.split(".")[0]][key.split(".")[1]]) or "''"
    for part in (f"{key}=", f"has no effect while {switch}. Pass --config.{key}={reset} to", f"or change {name}."):
        assert part in str(raised.value)


def test_every_pair_of_the_table_has_a_case():
    cases = ((key, *switch.replace("'", "").split("=")) for key, _, _, switch in IDLE)
    named = {(key, switch, USERS_FUNCTION if ":" in off else off.removesuffix(".0")) for key, switch, off in cases}
    assert named == {(key, switch, str(off)) for switch, offs, keys in NO_EFFECT for off in offs for key in keys}


@pytest.mark.parametrize(
    "best, every_steps, says",
    [
        ("accuracy", 20, "checkpoint.best must be one of eval/accuracy, eval/format, or '' for none; found 'accuracy'"),
        ("eval/format", 30, r"eval.every_steps must be a multiple of checkpoint.every_steps .* found 30 and 20"),
    ],
)
def test_the_best_checkpoint_is_of_a_reward_part_and_of_an_evaluation(best, every_steps, says):
    config = default()
    config.checkpoint.best, config.eval.every_steps = best, every_steps
    with pytest.raises(UserError, match=says):
        check(config)
    config.checkpoint.best, config.eval.every_steps = "eval/format", 40
    check(config)


# Values of keys that choose between methods, each of which has effects of its own elsewhere.
SWITCHES = [
    (key, value)
    for key, spec in key_specs(Config).items()
    if key.partition(".")[0] in ("groups", "advantage", "loss") or key == "rollout.overlong"
    for value in spec.choices
]
NEEDED_BY = {
    ("loss.aggregate", "constant"): {"loss.constant_length": "64"},
    ("rollout.overlong", "soft"): {"rollout.overlong_cache": "8"},
}


@pytest.mark.parametrize("key, value", SWITCHES)
def test_every_method_can_be_chosen_from_the_default_config(key, value):
    config = default()
    for name, text in ({key: value} | NEEDED_BY.get((key, value), {})).items():
        override_key(config, name, text)
    section, _, name = key.partition(".")
    assert getattr(getattr(check(config), section), name) == value
    override_key(config, key, "other")
    with pytest.raises(UserError, match=rf"{key} must be '{key_specs(Config)[key].choices[0]}'.*; found 'other'. Set"):
        check(config)


def test_names_outside_of_a_section_are_checked_without_a_config():
    """The public functions `advantages` and `grpo_loss` take names as arguments, which no config has checked."""
    require_choices(LossSection(ratio="difference", aggregate="constant", kl="k1", kl_in="reward"))
    require_choices(AdvantageSection(mean="leave_one_out", std="none", ddof=7))
    for section, says in (
        (LossSection(ratio="gspo"), "^ratio must be 'token', .* or 'difference'; found 'gspo'. Choose one of them.$"),
        (LossSection(aggregate="mean"), "^aggregate must be 'sequence', .* or 'constant'; found 'mean'"),
        (LossSection(kl="k4"), "^kl must be 'k1', 'k2' or 'k3'; found 'k4'"),
        (AdvantageSection(mean="rloo"), "^mean must be 'group', 'batch' or 'leave_one_out'; found 'rloo'"),
        (AdvantageSection(std="None"), "^std must be 'group', 'batch' or 'none'; found 'None'"),
    ):
        with pytest.raises(ValueError, match=says):
            require_choices(section)


def test_one_error_names_every_flag_that_resets_a_key_without_effect():
    config = load_config(f"{REPO}/configs/r1zero.py:qwen2.5-0.5b")
    for key, value in (("task.name", "addition"), ("optim.name", "adafactor"), ("loss.kl_coef", "0")):
        override_key(config, key, value)
    with pytest.raises(UserError) as raised:
        check(config)
    told = str(raised.value).partition("Pass ")[2].partition(" to restore")[0].split()
    assert sorted(told) == [
        "--config.model.reference_dtype=float32",
        "--config.optim.b2=0.999",
        "--config.task.path=''",
    ]
    for flag in told:
        key, _, value = flag.removeprefix("--config.").partition("=")
        override_key(config, key, value.strip("'"))
    check(config)


@pytest.mark.parametrize("text", ['["accuracy"]', '("accuracy",)', "('accuracy',)", ' [ "accuracy" ] ', '"accuracy",'])
def test_a_flag_takes_a_json_list_or_a_python_tuple(text):
    config = default()
    override_key(config, "reward.parts", text)
    override_key(config, "reward.weights", "(2,)")
    cfg = check(config)
    assert cfg.reward.parts == ("accuracy",)
    assert cfg.reward.weights == (2.0,) and type(cfg.reward.weights[0]) is float


@pytest.mark.parametrize("text", ["accuracy", '"accuracy"', "5", "{}", "[", "(1", "[*x]", "", "f()", "{[]}"])
def test_a_flag_that_is_not_a_list_is_refused(text):
    with pytest.raises(UserError, match=r'must be a JSON list; found .* Write it like .\["accuracy", "format"\]'):
        override_key(default(), "reward.parts", text)


def test_paths_expand_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = changed(task__name="file", task__path="~/q.jsonl", task__eval_path="~/e.jsonl", model__path="~/model")
    cfg = check(config)
    assert (cfg.task.path, cfg.task.eval_path, cfg.model.path) == tuple(
        f"{tmp_path}/{name}" for name in ("q.jsonl", "e.jsonl", "model")
    )
    write_config(tmp_path / "run", cfg)
    check_workdir(tmp_path / "run", check(config))  # the same command resumes
    config.task.path = os.path.expanduser("~/q.jsonl")
    check_workdir(tmp_path / "run", check(config))  # and so does one whose shell expanded the path
    assert check(read_config(tmp_path / "run")) == cfg
    assert check(changed(model__path="org/name")).model.path == "org/name"


def test_the_config_page_matches_the_schema():
    """Written by `python -m grpo_jax.config.docs > docs/config.md`."""
    page = (REPO / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == markdown()
    for config_class in (Config, PretrainConfig):
        for key, spec in key_specs(config_class).items():
            assert f"| `{key}`" in page and spec.meaning in page


def test_help_explains_every_key_and_suggests_topics():
    for key, spec in key_specs(Config).items():
        for topic in ("all", key, key.split(".")[0], key.rpartition(".")[0] or key):
            assert f"--config.{key}=" in explain(topic)
        assert " ".join(spec.meaning.split()) in " ".join(explain(key).split())
    assert "--config.corpus.digits=3" in explain("pretrain")
    assert "optim" in explain("optim") and "rollout" not in explain("optim")
    with pytest.raises(UserError, match=r"found 'optm'. Did you mean --help=optim\?"):
        explain("optm")
    with pytest.raises(UserError, match=r"found 'xyzzy'. Choose one of .*rollout.*all"):
        explain("xyzzy")


def test_each_job_accepts_only_its_own_configs():
    """A config of pretraining has other keys, and an unknown job must not train as if it were known."""
    with pytest.raises(UserError, match="job must be 'grpo'"):
        check(pretrain_default())
    with pytest.raises(UserError, match="job must be 'pretrain' here; found 'grpo'"):
        check_pretrain(default())
    with pytest.raises(UserError, match=r"job.*'sft'"):
        check(changed(job="sft"))


def test_a_config_must_have_exactly_the_default_keys():
    """Others are a config.json of another version, or a config file that does not start from default()."""
    lacking, more = default(), default()
    del lacking.loss["clip_low"]
    more.loss.new = 1
    with pytest.raises(UserError, match=r"loss.clip_low is missing"):
        check(lacking)
    with pytest.raises(UserError, match=r"loss.new is unknown"):
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
def test_values_must_have_the_types_of_the_defaults(key, value):
    """A config file or a config.json may hold anything."""
    config = default().to_dict()
    *sections, name = key.split(".")
    section = functools.reduce(operator.getitem, sections, config)
    section[name] = value
    with pytest.raises(UserError, match=rf"{key} must be of type \w+; found {value!r}. Set --config.{key}="):
        check(ConfigDict(config))
    config = default().to_dict()
    config["optim"]["lr"] = 1  # whole numbers are accepted as floats
    assert check(ConfigDict(config)).optim.lr == 1


def test_prompt_and_completion_must_fit_the_model():
    """80 + 64 = 144 tokens."""
    config = check(changed())
    check_model(config, SimpleNamespace(max_positions=144))
    says = (
        r"rollout.max_prompt_tokens \+ rollout.max_tokens must be at most the model's 143 positions "
        r"\(max_position_embeddings\); found 80 \+ 64. Lower one of them"
    )
    with pytest.raises(UserError, match=says):
        check_model(config, SimpleNamespace(max_positions=143))


def test_the_config_of_a_run_is_read_back(tmp_path):
    mine = dict(reward__parts='["m:f", "format"]', reward__weights="[1, 2]")
    cfg = check(changed(optim__lr=1e-5, task__name="file", task__path="q.jsonl", **mine))
    write_config(tmp_path / "a" / "run", cfg)
    assert check(read_config(tmp_path / "a" / "run")) == cfg
    check_workdir(tmp_path / "a" / "run", cfg)  # the same command resumes


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "5", "null"])
def test_a_folder_without_a_readable_config_is_a_user_error(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"must be the workdir of a training run, with a config.json: .*Pass another"):
        read_config(tmp_path)


def test_paths_of_existing_files_are_stored_absolute(tmp_path, monkeypatch):
    """So a run may be resumed from another folder, by a path relative to that."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "q.jsonl").write_text("")
    (tmp_path / "a" / "chat").mkdir()
    stored = []
    for folder, path in (("a", "q.jsonl"), ("a", "./q.jsonl"), (".", "a/q.jsonl"), (".", tmp_path / "a" / "q.jsonl")):
        monkeypatch.chdir(tmp_path / folder)
        cfg = check(changed(task__name="file", task__path=str(path), task__eval_path="owner/name"))
        stored.append((cfg.task.path, cfg.task.eval_path))
    assert set(stored) == {(str(tmp_path / "a" / "q.jsonl"), "owner/name")}
    monkeypatch.chdir(tmp_path / "a")
    assert check(changed(prompt__template="chat")).prompt.template == "chat"
    assert check(changed(prompt__template="q.jsonl")).prompt.template == str(tmp_path / "a" / "q.jsonl")


@pytest.mark.parametrize("change", ["content", "added", "removed"])
def test_changed_files_are_refused_unless_accepted(tmp_path, change):
    folder, run = tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    (folder / "a.csv").write_text("1")
    (folder / "b.csv").write_text("2")
    write_config(run, Config(), digest_files(str(folder)))
    check_files(run, digest_files(str(folder)))
    if change == "removed":
        (folder / "a.csv").unlink()
    else:
        (folder / {"content": "a.csv", "added": "0.csv"}[change]).write_text("3")
    digests = digest_files(str(folder))
    with pytest.raises(
        UserError, match=r"\.csv has changed since the run in .*run was started. .*--accept-changed-files"
    ):
        check_files(run, digests)
    check_files(run, digests, accept=True)
    write_config(run, Config(), digests)
    check_files(run, digests)


# Keys that do not affect what an update computes, so that they may change between a run and its continuation.
MAY_CHANGE = {
    "total_steps",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.best",
    "checkpoint.retry_s",
    "run.time_limit",
    "eval.every_steps",
    "eval.questions",
    "eval.temperature",
    "eval.top_k",
    "eval.top_p",
    "eval.min_p",
    "rollout.slots",
    "log.every_steps",
    "log.samples",
    "log.sinks",
    "mesh.data",
    "mesh.fsdp",
    "mesh.expert",
    "mesh.tensor",
    "rollout.mesh.tensor",
    "rollout.mesh.expert",
    "train.micro_tokens",
    "train.chunk_tokens",
    "train.remat",
    "model.attention",
    "log.entropy",
    "optim.max_skips",
    "reward.deadline",
    "task.max_unreadable",
}


def with_key(cfg: Config, key: str, value) -> Config:
    """Returns the config with another value, which need not be allowed."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(cfg, **{name: with_key(getattr(cfg, name), rest, value) if rest else value})


@pytest.mark.parametrize("key", key_specs(Config))
def test_only_keys_that_affect_no_update_may_change_on_a_resume(tmp_path, key):
    write_config(tmp_path, Config())
    old = key_specs(Config)[key].default
    new = not old if isinstance(old, bool) else (*old, "x") if isinstance(old, tuple) else old + type(old)(1)
    cfg = with_key(Config(), key, new)
    check_workdir(tmp_path, cfg)  # a run without a checkpoint binds nothing
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    if key in MAY_CHANGE:
        check_workdir(tmp_path, cfg)
        return
    with pytest.raises(UserError) as raised:
        check_workdir(tmp_path, cfg)
    for part in (f"started with {key}={old!r}", f"with {key}={new!r}", str(tmp_path), "Choose another --workdir"):
        assert part in str(raised.value)


def test_all_keys_that_differ_are_listed_at_once_with_the_way_out(tmp_path):
    write_config(tmp_path, Config())
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    cfg = with_key(with_key(with_key(Config(), "seed", 3), "optim.lr", 0.5), "total_steps", 9)
    says = (
        r"started with seed=0, optim.lr=0.00015 and cannot be resumed with seed=3, optim.lr=0.5\. Choose another "
        r"--workdir, leave out --config to resume it as it is, or pass --config.seed=0 --config.optim.lr=0.00015\.$"
    )
    with pytest.raises(UserError, match=says):
        check_workdir(tmp_path, cfg)
    says = "was trained with seed=0, optim.lr=0.00015; found seed=3, optim.lr=0.5. Undo"
    with pytest.raises(UserError, match=says):
        check_trained_config(tmp_path, cfg, 1, flatten(dataclasses.asdict(Config())))


def test_a_run_with_other_keys_is_not_resumed(tmp_path):
    write_config(tmp_path, Config())
    (tmp_path / "checkpoints" / "damaged-1").mkdir(parents=True)
    text = (tmp_path / "config.json").read_text().replace('"keep"', '"kept"')  # which may change, and may be missing
    (tmp_path / "config.json").write_text(text.replace('"clip_low"', '"clip"').replace('"seed": 0,', ""))
    says = "lacks seed, lacks loss.clip_low, has the unknown checkpoint.kept, has the unknown loss.clip. Choose"
    with pytest.raises(UserError, match="must have the keys of this version of grpo_jax to be resumed, but it " + says):
        check_workdir(tmp_path, Config())


def test_a_new_or_empty_folder_is_a_workdir(tmp_path):
    check_workdir(tmp_path / "new" / "run", Config())
    check_workdir(tmp_path, Config())
    assert not list(tmp_path.iterdir())  # the check creates nothing
    for name in ("run.lock", "files.json", "config.json.partial"):  # of a start that was killed at once
        (tmp_path / name).write_text("")
        check_workdir(tmp_path, Config())


def test_a_folder_with_other_files_is_not_a_workdir(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files. Choose another --workdir"):
        check_workdir(tmp_path, Config())
    with pytest.raises(UserError, match="Choose another --workdir"):
        check_workdir(tmp_path / "thesis.tex", Config())
