"""Mistakes on the command line end with one helpful line, before any device work and before a file is written."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest

from grpo_jax import cli, evaluate, export, generate, main
from grpo_jax.config import Config, check, default, flags, write_config
from grpo_jax.config.keys import flatten, key_specs
from grpo_jax.config.other_names import OTHER_NAMES
from grpo_jax.config.workdir import digest_files
from grpo_jax.errors import UserError
from grpo_jax.parallel import processes
from grpo_jax.weights.source import find_model
from tests.test_layout import ENTRY_POINTS
from tests.tiny import write_meta

ROOT = Path(__file__).parent.parent
R1ZERO = f"--config={ROOT}/configs/r1zero.py"
START = "from grpo_jax.config import default\n\ndef get_config():\n    c = default()\n"  # of a config file
PRETRAIN = f"--config={ROOT}/configs/pretrain_tiny.py"
# Keeps the run short if a mistake below goes undetected.
LITTLE = [
    "--config.total_steps=1",
    "--config.rollout.prompts=4",
    "--config.rollout.samples=2",
    "--config.rollout.max_tokens=2",
    "--config.eval.questions=2",
]


def contents(folder: Path) -> dict:
    """Returns every path under a folder with its bytes, or None if there is no folder."""
    if not folder.exists():
        return None
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(entry, workdir: Path, *argv: str, says: str) -> None:
    """Checks that an entry point raises a UserError that matches `says` and leaves the workdir unchanged."""
    before = contents(workdir)
    with pytest.raises(UserError, match=says):
        entry([*argv, f"--workdir={workdir}"])
    assert contents(workdir) == before


def check_with(**values) -> Config:
    """Returns the checked default config with other values; `loss__kl_coef=0.1` sets loss.kl_coef."""
    config = default()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return check(config)


def asking(path: Path, *questions: str) -> str:
    """Writes a file of problems with these questions and returns its path."""
    path.write_text("".join(f'{{"question": "{question}", "answer": 1}}\n' for question in questions))
    return str(path)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--config.rollout.sample=4"], r"found --config.rollout.sample. Did you mean --config.rollout.samples\?"),
        (["--config.lr=1"], r"found --config.lr. Did you mean --config.optim.lr\?"),
        (["--config.loss.beta=0.1"], r"found --config.loss.beta. Did you mean --config.loss.kl_coef\?"),
        (["--config.actor_rollout_ref.rollout.n=8"], r"rollout.n. Did you mean --config.rollout.samples\?"),
        (
            ["--config.per_device_train_batch_size=4"],
            r"Did you mean --config.rollout.prompts or --config.train.micro_tokens\?",
        ),
        (["--num_generations=8"], r"unknown flag '--num_generations'. Did you mean --config.rollout.samples\?"),
        (["--beta=0.1"], r"unknown flag '--beta'. Did you mean --config.loss.kl_coef\?"),
        (["--workdri=x"], r"unknown flag '--workdri'. Did you mean --workdir\?"),
        (["--config.rollout=4"], r"found --config.rollout. Did you mean --config.rollout\.\w+\?"),
        (["--config.xyzzy=1"], "found --config.xyzzy. The keys are .*rollout.samples.*total_steps"),
        (["--config.seed=many"], r"--config.seed must be of type int; found 'many'. Write it like 0\."),
        (["--config.total_steps=2.5"], "--config.total_steps must be of type int; found '2.5'"),
        (["--config.optim.lr=fast"], r"--config.optim.lr must be of type float; found 'fast'. Write it like [\d.]+\."),
        (["--config.optim.lr=nan"], "--config.optim.lr must be of type float; found 'nan'"),
        (["--config.optim.lr=inf"], "--config.optim.lr must be of type float; found 'inf'"),
        (
            ["--config.model.attention=cudnn"],
            "model.attention=cudnn needs gpu devices; found cpu. Set --config.model.attention=auto",
        ),
        (["--config.seed"], "--config.seed must be followed by a value; found none. Write --config.seed=VALUE"),
        (["--config.seed", "--config.total_steps=5"], "--config.seed must be followed by a value"),
        (["--config.seed="], "--config.seed must be of type int; found ''"),
        (["--config.rollout.stop_strings=</answer>"], r'a JSON list; found .*like .*\["</answer>"\]'),
        (["--config.rollout.stop_strings={}"], "a JSON list"),
        (['--config.rollout.stop_strings=[""]'], "rollout.stop_strings must be non-empty strings"),
        (["--config.rollout.stop_strings=[1]"], "rollout.stop_strings must be non-empty strings"),
        (
            ["--config.rollout.top_p=0.9"],
            "rollout.top_p must not be set, because .*ratio .* biased .eval.top_k.*; found 0.9. Leave it out",
        ),
        (["--config.rollout.top_k=5"], "rollout.top_k must not be set"),
        (["--config.eval.top_p=0"], "eval.top_p must be more than 0 and at most 1"),
        (["--config.eval.min_p=2"], "eval.min_p must be"),
        (["--config.eval.top_k=-1"], "eval.top_k must be at least 0"),
        (["--config.rollout.slots=-2"], "rollout.slots"),
        (
            ["--config.rollout.slots=1000000", "--config.rollout.prompts=1000", "--config.rollout.samples=1000"],
            r"rollout.slots may be at most [1-9]\d+ .*; found 1000000, .*Lower rollout.slots",
        ),
        (['--config.rollout.stop_strings=["' + "a" * 4001 + '"]'], "at most 4000 characters in total"),
        (["train"], "found the unknown argument 'train'"),
        (["--config.seed=1", "2"], "found the unknown argument '2'"),
        (["--resume"], "found the unknown flag '--resume'"),
        (["--work=x"], "found the unknown flag '--work'"),  # no abbreviations
        (["-h5"], "--help=SECTION must name a section of the config; found '5'"),
        (["--help=optm"], r"found 'optm'. Did you mean --help=optim\?"),
        (
            ["--config.optim.decay_steps=90"],
            "optim.decay_steps=90 has no effect while optim.schedule='constant'. Pass --config",
        ),
        (["--config.rollout.samples=1"], "rollout.samples must be at least 2, because .*; found 1"),
        (["--config.rollout.temperature=0"], "rollout.temperature must be at least 0.01, because .*; found 0.0"),
        (
            ["--config.train.minibatches=3", "--config.rollout.prompts=16", "--config.rollout.samples=8"],
            "a divisor of the 128 sequences",
        ),
        (["--config.mesh.data=3"], r"number of devices; found mesh.data=3 .*on 8 device\(s\). Set one of .* to -1"),
        (
            ["--config.mesh.fsdp=-1"],
            "one that may be -1; found mesh.data=-1 mesh.fsdp=-1 mesh.expert=1 mesh.tensor=1",
        ),
        (["--config.model.path=no/such/model"], "No model folder found at no/such/model. Set model.path"),
        (["--config.rollout.max_tokens=500"], r"the model's 512 positions .* Set rollout.max_tokens=439"),
        (["--config.task.name=adition"], "task.name must be 'addition', .*found 'adition'. Did you mean 'addition'"),
        (["--config.task.name=none.py:primes"], "task.name must .*found no file none.py. Correct the path"),
        (
            ['--config.reward.parts=["acuracy"]', "--config.reward.weights=[1]"],
            "reward.parts must be 'accuracy', .*found 'acuracy'. Did you mean 'accuracy'",
        ),
        (["--config.task.name=file"], "task.path must name a file of problems.*Set --config.task.path"),
        (
            ["--config.task.name=file", "--config.task.path=none.jsonl"],
            "Problems could not be read from .*none.jsonl: .*No such file",
        ),
        (
            ["--config.rollout.max_prompt_tokens=40"],
            r"max_prompt_tokens=40 tokens; 512 of 512 have more: problem 0 has 73, .*, problem 4 has 73, "
            r"and 507 more\. Set rollout.max_prompt_tokens=73\.$",
        ),
        (["--config.job=pretrain"], "job"),
        (["--config.job=sft"], "job"),
        (["--config.seed=100000000000000000000000000"], r"seed must be less than 2\*\*31"),
    ],
)
def test_a_mistake_in_training_is_refused(tmp_path, argv, says):
    refused(main.main, tmp_path / "run", R1ZERO, *LITTLE[:1], *argv, says=says)


@pytest.mark.parametrize(
    "config, says",
    [
        (f"{ROOT}/configs/r1zero.py:huge", "The preset of configs/r1zero.py must be one of tiny, .*; found 'huge'"),
        (f"{ROOT}/configs/pretrain_tiny.py:huge", "configs/pretrain_tiny.py has no presets; found 'huge'"),
        ("no/such.py", "--config must name a Python file such as configs/r1zero.py; found no file 'no/such.py'"),
        (f"{ROOT}/pyproject.toml", "--config must name a Python file .*found no file .*pyproject.toml"),
        (f"{ROOT}/tests/__init__.py", r"must define a function get_config\(preset\); found none"),
        ("", "--config must name a Python file"),
        ("r1zro", r"found no file 'r1zro'. Did you mean --config=r1zero\?"),
        ("r1zero:huge", "The preset of configs/r1zero.py must be one of tiny, .*; found 'huge'"),
    ],
)
def test_a_wrong_config_file_or_preset_is_refused(tmp_path, config, says):
    refused(main.main, tmp_path / "run", f"--config={config}", says=says)


def test_training_needs_a_config_or_the_workdir_of_a_run(tmp_path):
    for argv in ([], ["--config.seed=1"]):
        with pytest.raises(UserError, match=r"--config=FILE.py or --workdir=DIR must be given; found none. Run with -"):
            main.main(argv)
    refused(main.main, tmp_path / "run", "--config", says="argument --config: expected one argument")
    refused(main.main, tmp_path / "run", says="a config.json: found none. Pass another .* start .* with --config=FILE")
    (tmp_path / "model").mkdir()
    shutil.copy(find_model("tiny") / "config.json", tmp_path / "model")
    refused(main.main, tmp_path / "model", says="config.json holds .*instead of the config of a run")


def test_an_empty_config_flag_does_not_resume_the_run_in_the_workdir(tmp_path):
    write_config(tmp_path, Config())
    with pytest.raises(UserError, match="--config must name"):
        flags.parse_flags(flags.make_parser("", ""), ["--config=", f"--workdir={tmp_path}"])


@pytest.mark.parametrize("place", ["training line", "held-out line", "eval_path"])
def test_a_question_that_is_too_long_is_refused_before_training(tmp_path, place):
    """No matter which rollout it would be part of. The tenth line is held out, the fourth is not."""
    questions = [f"q{i}" for i in range(20)]
    other = ["q"]
    wrong, index = {"training line": (questions, 3), "held-out line": (questions, 9), "eval_path": (other, 0)}[place]
    wrong[index] = "word " * 20
    paths = [f"--config.task.path={asking(tmp_path / 'q.jsonl', *questions)}"]
    if place == "eval_path":
        paths.append(f"--config.task.eval_path={asking(tmp_path / 'e.jsonl', *other)}")
    refused(
        main.main,
        tmp_path / "run",
        R1ZERO,
        *LITTLE,
        "--config.task.name=file",
        "--config.rollout.max_prompt_tokens=80",
        *paths,
        says=r"max_prompt_tokens=80 tokens; 1 of \d+ have more: .* has \d+\. "
        r"Set rollout.max_prompt_tokens=\d+, or leave them out with task.too_long=drop\.$",
    )


def test_a_broken_problem_file_is_refused_before_training(tmp_path):
    good = asking(tmp_path / "q.jsonl", *(f"q{i}" for i in range(20)))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": 1}\n{"question": "q"}\n')
    one = asking(tmp_path / "one.jsonl", "a", "A ")
    for paths, says in (
        ([f"--config.task.path={bad}"], "bad.jsonl, .* found 1 of 2 rows: line 2: no field .* the answer"),
        (
            [f"--config.task.path={good}", f"--config.task.eval_path={bad}"],
            "bad.jsonl, .* found 1 of 2 rows: line 2: no field .* the answer",
        ),
        (
            [f"--config.task.path={one}"],
            "At least one problem must be left for training; found 1 different question, all",
        ),
        (
            [f"--config.task.path={good}", f"--config.task.eval_path={good}"],
            "task.eval_path must not hold the same problems",
        ),
    ):
        refused(main.main, tmp_path / "run", R1ZERO, *LITTLE, "--config.task.name=file", *paths, says=says)


def test_a_run_is_resumed_with_changed_files_only_on_request(tmp_path, capsys):
    (tmp_path / "config.py").write_text(START + "    return c")
    path = asking(tmp_path / "q.jsonl", *(f"q{i}" for i in range(20)))
    run, changes = tmp_path / "run", ("--config.task.name=file", f"--config.task.path={path}")
    cfg = check_with(task__name="file", task__path=path)
    write_config(run, cfg, digest_files(path))
    assert json.loads((run / "files.json").read_text()) == digest_files(path)
    with open(path, "a") as file:
        file.write("\n")
    says = f"{path} has changed since the run in {run} was started. Restore it, .* or pass --accept-changed-files"
    refused(evaluate.main, run, says="must have saved a checkpoint")
    write_meta(run, 1, flatten(asdict(cfg)))  # without a checkpoint, nothing binds a run
    refused(main.main, run, f"--config={tmp_path / 'config.py'}", *changes, says=says)
    assert f"\n{path} changed since the run was started.\n" in capsys.readouterr().err


def test_a_run_with_evaluations_is_not_resumed_without_them(tmp_path):
    """It would train on the problems that it has held out."""
    path = asking(tmp_path / "q.jsonl", "a", "b")
    flags = [f"--config={tmp_path / 'config.py'}", "--config.task.name=file", f"--config.task.path={path}"]
    (tmp_path / "config.py").write_text(START + "    return c")
    cfg = check_with(task__name="file", task__path=path)
    write_config(tmp_path / "run", cfg)
    write_meta(tmp_path / "run", 1, flatten(asdict(cfg)))
    says = "was started with eval.questions=256 and cannot be resumed with eval.questions=0"
    refused(main.main, tmp_path / "run", *flags, "--config.eval.questions=0", says=says)


def test_a_run_without_held_out_problems_cannot_be_evaluated_on_its_own_problems(tmp_path):
    run = tmp_path / "run"
    write_config(run, check_with(eval__questions=0))
    for argv in ([], ["--config.eval.questions=8"]):
        refused(evaluate.main, run, *argv, says=f"the run in {run} has none, because its eval.questions is 0. Pass --q")


@pytest.mark.parametrize(
    "file, says",
    [
        ("tokenizer.json", "tokenizer"),
        ("config.json", "config.json in .* must be a readable JSON file"),
        ("model.safetensors", "must be a complete safetensors file"),
    ],
)
def test_a_broken_model_folder_is_refused_before_training(tmp_path, file, says):
    shutil.copytree(find_model("tiny"), tmp_path / "model")
    (tmp_path / "model" / file).write_text("{")
    refused(main.main, tmp_path / "run", R1ZERO, *LITTLE, f"--config.model.path={tmp_path / 'model'}", says=says)


def test_a_run_with_another_config_is_not_resumed(tmp_path):
    other = default()
    other.seed = 5
    write_config(tmp_path / "run", check(other))
    write_meta(tmp_path / "run", 1, flatten(asdict(check(other))))
    refused(
        main.main,
        tmp_path / "run",
        R1ZERO,
        says=r"was started with seed=5 .* with seed=0\. Choose another --workdir, .* or pass --config.seed=5",
    )


def test_a_run_is_not_resumed_if_its_template_has_changed(tmp_path):
    template = tmp_path / "t.txt"
    template.write_text("Question: {question}")
    keys = [*LITTLE, f"--config.prompt.template={template}"]
    cfg = flags.parse_flags(flags.make_parser("", ""), [R1ZERO, *keys])[1]
    write_config(tmp_path / "run", check(cfg), digest_files(str(template)))
    write_meta(tmp_path / "run", 1, flatten(asdict(check(cfg))))
    template.write_text("Question: {question}\n")
    refused(main.main, tmp_path / "run", R1ZERO, *keys, says="t.txt has changed since the run in .* was started")


def test_a_folder_with_other_files_is_refused_as_a_workdir(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    refused(main.main, tmp_path / "run", R1ZERO, says="holds other files")


def test_pretraining_does_not_overwrite_a_model(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    refused(main.main, tmp_path / "run", PRETRAIN, says="neither a model nor a run; found .*model")


@pytest.mark.parametrize("entry, argv", [(evaluate.main, []), (generate.main, ["--prompt=hello"])])
def test_reading_a_run_needs_its_config_and_a_checkpoint(tmp_path, entry, argv):
    refused(entry, tmp_path / "none", *argv, says="must be the workdir of a training run, with a config.json")
    write_config(tmp_path / "run", Config())
    refused(entry, tmp_path / "run", *argv, says="must have saved a checkpoint; found none in .*Train first")
    (tmp_path / "run" / "checkpoints" / "reference").mkdir(parents=True)  # killed before its first checkpoint
    refused(entry, tmp_path / "run", *argv, says="must have saved a checkpoint; found none in .*Train first")
    (tmp_path / "run" / "checkpoints" / "4").mkdir()
    refused(entry, tmp_path / "run", *argv, "--step=5", says=r"one of the steps kept in .* \(4\); found 5. Choose one")
    refused(entry, tmp_path / "run", *argv, "--step=4", "--base", says="Only one of --base and --step may be given")


@pytest.mark.parametrize("entry, argv", [(evaluate.main, []), (generate.main, ["--prompt=hello"])])
@pytest.mark.parametrize(
    "change, says",
    [
        (
            "--config.rollout.max_tokens=500",
            r"the model's 512 positions minus rollout.max_tokens=500; .* Set rollout.max_tokens",
        ),
        ("--config.rollout.sample=4", "Did you mean --config.rollout.samples"),
        ("--config.mesh.data=3", "mesh.data=3"),
        (
            "--config.model.path=no/such/model",
            "model.path must be tiny, with which the run in .* was started; found no/such/model",
        ),
        ("--steps=3", "found the unknown flag '--steps'"),
    ],
)
def test_a_mistake_in_reading_a_run_is_refused(tmp_path, entry, argv, change, says):
    write_config(tmp_path / "run", Config())
    refused(entry, tmp_path / "run", *argv, change, says=says)


@pytest.mark.parametrize("entry, argv", [(evaluate.main, []), (generate.main, ["--prompt=hello"])])
def test_a_pretraining_config_cannot_be_read_as_a_run(tmp_path, entry, argv):
    refused(entry, tmp_path / "run", PRETRAIN, *argv, says="job must be 'grpo' here; found 'pretrain'")


def test_reading_a_run_needs_a_config_or_a_workdir():
    for entry, argv in ((evaluate.main, []), (generate.main, ["--prompt=hello"])):
        with pytest.raises(
            UserError, match=r"--config=FILE.py or --workdir=DIR must be given; found none. Run with --help"
        ):
            entry(argv)


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "--prompt must hold a question; found none. Pass --prompt="),
        (["--prompt="], "--prompt must hold a question; found none"),
        (
            ["--prompt=" + "word " * 20, "--config.rollout.max_prompt_tokens=80"],
            r"max_prompt_tokens=80 tokens; 1 of 1 have more: --prompt has \d+\. Set rollout.max_prompt_tok",
        ),
        (
            ["--prompt=" + "word " * 600],
            r"at most 456 tokens, the model's 512 positions minus .*--prompt has \d+\. Shorten",
        ),
        (["--prompt=\udc80"], r"--prompt must be valid Unicode; found the lone surrogate '\\udc80'\. Remove it"),
        (["--prompt=hello", "--config.prompt.template=none.txt"], "could not read '.*none.txt'"),
        (["--prompt=hello", "--temperature=-1"], "--temperature must be a number of 0 or more; found -1.0"),
        (["--prompt=hello", "--temperature=nan"], "--temperature must be a number of 0 or more; found nan"),
        (["--prompt=hello", "--temperature=warm"], "argument --temperature: invalid float value: 'warm'"),
        (["hello"], "found the unknown argument 'hello'"),
    ],
)
def test_a_mistake_in_generating_is_refused(tmp_path, argv, says):
    write_config(tmp_path / "run", Config())
    refused(generate.main, tmp_path / "run", *argv, says=says)


def test_a_mistake_in_the_questions_to_evaluate_is_refused(tmp_path):
    run, path = tmp_path / "run", tmp_path / "q.jsonl"
    write_config(run, Config())
    refused(evaluate.main, run, f"--questions={path}", says="could not be read from .*q.jsonl: .*No such file")
    path.write_text('{"question": "q", "answer": 1}\n{"question": "q", "result": 1}\n')
    refused(
        evaluate.main,
        run,
        f"--questions={path}",
        says="q.jsonl, .* line 2: no field is known to hold the answer; the fields are question, result",
    )
    refused(
        evaluate.main,
        run,
        f"--questions={asking(path, 'q', 'word ' * 20)}",
        "--config.rollout.max_prompt_tokens=80",
        says=r"max_prompt_tokens=80 tokens; 1 of 2 have more: .* has \d+\. Set rollout.max_prompt_tokens=",
    )


def test_flags_are_parsed_as_the_type_of_their_key():
    def parse(*argv):
        return flags.parse_flags(flags.make_parser("", ""), argv)

    _, config, workdir, _ = parse(
        R1ZERO,
        "--config.seed=3",
        "--config.optim.lr=1",
        "--config.loss.kl_coef",
        "0",
        "--config.mesh.data",
        "-1",
        "--config.task.path=a=b.jsonl",
        "--config.model.path=",
    )
    assert (config.seed, config.optim.lr, config.loss.kl_coef, config.mesh.data) == (3, 1.0, 0.0, -1)
    assert isinstance(config.optim.lr, float) and isinstance(config.loss.kl_coef, float)
    assert (config.task.path, config.model.path) == ("a=b.jsonl", "")
    assert workdir == Path("runs/r1zero")
    assert parse(f"{R1ZERO}:tiny")[2] == Path("runs/r1zero-tiny")
    assert parse(R1ZERO, "--workdir=a/b")[2] == Path("a/b")


def test_a_run_is_read_with_its_own_config(tmp_path):
    mine = default()
    mine.seed = 5
    write_config(tmp_path, check(mine))

    def parse(*argv):
        return flags.parse_flags(flags.make_parser("", "", of_a_run=True), [*argv, f"--workdir={tmp_path}"])[1]

    assert parse().seed == 5
    assert parse("--config.seed=6").seed == 6
    assert parse(R1ZERO).seed == 0


def without_phases(stderr: str) -> list[str]:
    """Returns the lines of a command but those that say what it is doing, such as "Starting, 4 s"."""
    return [line for line in stderr.splitlines() if not re.fullmatch(r".*, \d+ s", line)]


def command(folder: Path, module: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"grpo_jax.{module}", *argv], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "module, argv, says",
    [
        ("main", ["--config.rollout.sam\nple=4"], "Did you mean --config.rollout.samples?"),  # a newline in the message
        ("evaluate", ["--config.rollout.max_tokens=4"], "Train first"),
        # The tokenizer's library has warnings of its own, one of them for texts of more than the model's 512 tokens.
        ("generate", ["--prompt=" + "word " * 600], "the model's 512 positions"),
    ],
)
def test_a_mistake_ends_with_one_line_and_exit_code_2(tmp_path, module, argv, says):
    done = command(tmp_path, module, R1ZERO, *argv)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = without_phases(done.stderr)
    assert line.startswith("error: ") and says in line
    assert not list(tmp_path.iterdir())  # no runs/


@pytest.mark.parametrize("module", ["main", "evaluate", "generate"])
def test_help_shows_the_flags_and_an_example(tmp_path, module):
    done = command(tmp_path, module, "--help")
    assert (done.returncode, without_phases(done.stderr)) == (0, [])
    assert "--workdir" in done.stdout and "--config" in done.stdout
    assert f"example:\n  python -m grpo_jax.{module} --" in done.stdout


@pytest.mark.parametrize("module", ["main", "evaluate", "generate", "export"])
def test_help_lists_the_sections_and_explains_their_keys(module, capsys):
    entry = import_module(f"grpo_jax.{module}").main
    for argv, parts in (
        (["--help"], ["--config FILE.py[:PRESET]", "--workdir DIR", "optim       The optimizer", "seed        Seed"]),
        (["--help=optim"], ["--config.optim.lr=0.00015  (float, more than 0)", "peak learning rate"]),
        (["--help=all"], ["--config.rollout.samples=8", "--config.seed=0", "--config.log.entropy=True  (bool)"]),
        (["--help=pretrain"], ["--config.corpus.digits=3  (int, at least 1 and at most 9)"]),
    ):
        with pytest.raises(SystemExit) as ended:
            entry(argv)
        assert not ended.value.code
        out = capsys.readouterr().out
        assert all(part in out for part in parts), out


@pytest.mark.parametrize(
    "rollout, says",
    [
        ({}, "rollout.temperature is missing"),
        ({"temperature": "1"}, "rollout.temperature is of type str instead of float"),
    ],
)
def test_generating_from_a_broken_config_is_refused(tmp_path, rollout, says):
    values = default().to_dict()
    del values["rollout"]["temperature"]
    values["rollout"] |= rollout
    (tmp_path / "config.json").write_text(json.dumps(values))
    refused(generate.main, tmp_path, "--prompt=hello", says=says)


def test_a_model_path_that_is_not_text_is_refused(tmp_path):
    values = default().to_dict()
    values["model"]["path"] = 5
    (tmp_path / "config.json").write_text(json.dumps(values))
    refused(evaluate.main, tmp_path, says="model.path is of type int instead of str")


def test_filters_of_generate_apply_at_its_own_temperature(tmp_path):
    """The keys eval.top_k, eval.top_p and eval.min_p apply at --temperature, or else at rollout.temperature."""
    write_config(tmp_path / "run", check_with(eval__temperature=0.0))
    top_k, prompt = "--config.eval.top_k=5", "--prompt=hello"
    refused(evaluate.main, tmp_path / "run", top_k, says="eval.top_k=5 has no effect while eval.temperature=0.0")
    refused(generate.main, tmp_path / "run", top_k, prompt, says="must have saved a checkpoint")
    refused(generate.main, tmp_path / "run", top_k, prompt, "--temperature=0.5", says="must have saved a checkpoint")
    refused(
        generate.main,
        tmp_path / "run",
        top_k,
        prompt,
        "--temperature=0",
        says="eval.top_k=5 has no effect while eval.temperature=0.0",
    )


def test_a_config_of_the_package_is_found_from_any_folder_but_a_local_one_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def seed_of(spec):
        return flags.parse_flags(flags.make_parser("", ""), [f"--config={spec}"]).raw.seed

    for spec in ("r1zero", "r1zero:tiny", "configs/r1zero.py", "configs/dapo.py:tiny"):
        assert seed_of(spec) == 0
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "seeds.py").write_text("SEED = 7\n")  # a sibling, as `python -m` finds it
    local = f"from configs.seeds import SEED\n{START}    c.seed = SEED\n    return c\n"
    (tmp_path / "configs" / "r1zero.py").write_text(local)
    monkeypatch.syspath_prepend(tmp_path)
    assert [seed_of(spec) for spec in ("r1zero", "configs/r1zero.py", "configs/dapo.py")] == [7, 7, 0]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for spec in ("other/r1zero.py", "r1zero.py", "../r1zero.py"):
        with pytest.raises(UserError, match="found no file"):
            seed_of(spec)


def test_the_console_script_runs_the_entry_points(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo-jax"])
    assert {module for module, _ in cli.COMMANDS.values()} - {""} == ENTRY_POINTS - {"cli"}
    for argv in ([], ["help"], ["--help"]):
        cli.main(argv)
        listed = capsys.readouterr().out
        assert all(f"\n  {name} " in listed for name in cli.COMMANDS)
    for argv in (["help", "export"], ["export", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(argv)
        assert "usage: grpo-jax export" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"one of train, .*; found 'tarin'. Did you mean grpo-jax train\?"):
        cli.main(["tarin"])
    with pytest.raises(UserError, match=r"found no file 'none.py'"):
        cli.main(["train", "--config=none.py"])


def test_other_trainers_names_stand_for_keys_that_exist_and_are_not_ours():
    names = {name for others in OTHER_NAMES.values() for name in others.split()}
    assert OTHER_NAMES.keys() <= key_specs(Config).keys() and not names & key_specs(Config).keys()


def test_flags_expand_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(
        "from grpo_jax.config import default\n\ndef get_config(preset=''):\n    return default()\n"
    )
    for config in ("~/mine.py", "~/mine.py:any"):
        workdir = flags.parse_flags(flags.make_parser("", ""), [f"--config={config}", "--workdir=~/run"]).workdir
        assert workdir == tmp_path / "run"
    write_config(tmp_path / "run", check_with(model__path="~/model"))
    shutil.copytree(find_model("tiny"), tmp_path / "model")
    refused(evaluate.main, Path("~/run"), "--config.model.path=~/model", says="must have saved a checkpoint")
    refused(evaluate.main, Path("~/run"), "--questions=~/none.jsonl", says=f"{tmp_path}/none.jsonl")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    refused(export.main, Path("~/run"), "--out=~/out", says=f"{tmp_path}/out; found other files there")


@pytest.mark.parametrize(
    "text, says",
    [
        ("def get_config():\n    return None\n", "must return a ConfigDict; found NoneType"),
        ("def get_config(:\n", "mine.py raised SyntaxError"),
        (
            f"{START}    c.rollout.samples = '8'\n    return c\n",
            "mine.py line 5 raised TypeError",
        ),
        (
            f"{START}    c.update.epochs = 2\n    return c\n",
            "mine.py line 5 raised AttributeError",
        ),
    ],
)
def test_a_mistake_in_a_config_file_is_refused(tmp_path, text, says):
    (tmp_path / "mine.py").write_text(text)
    refused(main.main, tmp_path / "run", f"--config={tmp_path}/mine.py", says=says)


def test_a_preset_of_a_config_without_presets_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return None\n")
    refused(main.main, tmp_path / "run", f"--config={tmp_path}/mine.py:big", says="raised TypeError")


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "", "  "])
def test_a_workdir_outside_of_the_file_system_is_refused(tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir must be a folder of a mounted file system"):
        main.main([R1ZERO, f"--workdir={workdir}", *LITTLE])
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--workdir must be a writable folder"):
        main.main(
            [R1ZERO, f"--workdir={tmp_path}/file/run", "--config.mesh.data=8", *LITTLE, "--config.rollout.prompts=8"]
        )


def test_fewer_steps_than_the_run_has_done_are_refused(tmp_path):
    run = tmp_path / "run"
    write_config(run, Config())
    write_meta(run, 40, {})
    refused(
        main.main, run, R1ZERO, "--config.total_steps=20", says="total_steps must be at least 40, .* has done; found 20"
    )


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--config.model.num_heads=3", "model.num_heads must be a multiple of model.num_kv_heads=2; found 3"),
        ("--config.batch.row_tokens=4096", "batch.row_tokens must be at most model.max_positions=512"),
        ("--config.batch.rows=0", "batch.rows must be at least 1"),
        ("--config.total_steps=3", "total_steps must be more than optim.warmup_steps=50; found 3"),
        ("--dry-run", "pretraining has none"),
    ],
)
def test_a_mistake_in_pretraining_is_refused(tmp_path, flag, says):
    refused(main.main, tmp_path / "run", PRETRAIN, flag, says=says)


def test_pretraining_does_not_write_into_a_run(tmp_path):
    write_config(tmp_path / "run", Config())
    refused(main.main, tmp_path / "run", PRETRAIN, says="neither a model nor a run; found .*config.json")


@pytest.mark.parametrize(
    "environ, several",
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, True),
        ({"GRPO_JAX_DISTRIBUTED": "1"}, True),
    ],
)
def test_a_multiprocess_run_is_recognized_by_its_environment(environ, several):
    assert processes.is_multiprocess(environ) == several


def test_processes_that_are_connected_are_not_connected_again(monkeypatch):
    """A Python process may call `grpo_jax.train` twice; JAX refuses to initialize again."""
    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: True)
    processes.join_processes({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "two"})


def test_incomplete_process_variables_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    refused(main.main, tmp_path / "run", R1ZERO, *LITTLE, says="needs JAX_COORDINATOR_ADDRESS.*'two'")
    refused(main.main, tmp_path / "run", PRETRAIN, says="Pretraining runs in one process")
