"""configs/own.py: the keys that it derives for a model, a file and a machine, and main --dry-run."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_jax import config as configs
from grpo_jax import evaluate, generate, plan
from grpo_jax.config.flags import load_config, make_parser, parse_flags
from grpo_jax.config.keys import flatten
from grpo_jax.config.workdir import continue_derived
from grpo_jax.errors import UserError
from grpo_jax.main import main
from grpo_jax.planning.models import read_architecture
from grpo_jax.rewards import accuracy, format
from grpo_jax.run.context import BaseModel
from grpo_jax.run.derivation import Machine
from grpo_jax.run.derive import derive
from grpo_jax.run.dry_run import describe_expected
from grpo_jax.tasks.streams import make_task
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import PromptFormat
from tests.test_prompt import CHAT, EOS, byte_tokenizer

OWN = Path(__file__).parent.parent / "configs" / "own.py"
GIB = 2**30
CPU = Machine("cpu", "cpu", 1, 16 * GIB, 2)
H100 = Machine("gpu", "H100", 1, 79 * GIB, 16)
RTX4090 = Machine("gpu", "RTX 4090", 1, int(23.5 * GIB), 16)
V5E = Machine("tpu", "TPU v5e", 8, int(15.75 * GIB), 100)
SMALL, LARGE = "smollm2", "Qwen/Qwen2.5-1.5B"
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


def word_problems(path: Path, count: int = 200, solved: bool = True) -> Path:
    """Writes word problems in the form of GSM8K, whose answers follow `####`, or without the solutions."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        name, item = draw.choice(["Anna", "Ben", "Clara", "Emma"]), draw.choice(["apples", "books", "shells"])
        a, b = draw.randint(5, 90), draw.randint(2, 90)
        solution = f"{name} had {a} {item}.\nNow there are {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### "
        question = f"{name} has {a} {item} and gets {b} more. How many {item} does {name} have now?"
        rows.append({"question": question, "answer": solution * solved + str(a + b)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def derived(folder: Path, machine=CPU, model=SMALL, tokenizer=None, positions=8192, solved=True, **given):
    """Derives keys for a published architecture; `given` has keys with "__" for dots. Returns (cfg, lines, task)."""
    raw = load_config(str(OWN))
    raw.model.path, raw.task.path = model, str(word_problems(folder / "problems.jsonl", solved=solved))
    given = {name.replace("__", "."): value for name, value in given.items()}
    raw.update_from_flattened_dict(given)
    cfg = configs.check(raw)
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    model_cfg = replace(
        read_architecture(str(folder) if model == SMALL else model), max_positions=positions, eos_ids=()
    )
    base = BaseModel(folder, model_cfg, PromptFormat(tokenizer or byte_tokenizer()))
    task = make_task(None, cfg)
    values, lines = derive(cfg, {"model.path", "task.path", "task.name", *given}, base, task, machine)
    assert not values.keys() & given.keys() and values["derive"] is False
    raw.update_from_flattened_dict(values)
    return configs.check(raw), "\n".join(lines), task


def test_a_cpu_gets_float32_and_updates_that_take_about_a_minute(tmp_path):
    cfg, lines, _ = derived(tmp_path)
    assert cfg.model.compute_dtype == cfg.model.reference_dtype == "float32"
    seconds = int(re.search(r"an update should take about (\d+) s", lines)[1])
    assert 20 <= seconds <= 90
    longest = int(re.search(r"longest prompt ([\d,]+) tokens", lines)[1].replace(",", ""))
    assert longest <= cfg.rollout.max_prompt_tokens < longest + 16
    # The solutions have about 45 bytes, for twice as many of which the prompts of bytes leave no time.
    assert "longer completions would take too long on 2 cores" in lines and 64 <= cfg.rollout.max_tokens < 2 * 45 + 64


def test_an_accelerator_gets_bfloat16_and_the_sizes_of_the_presets(tmp_path):
    cfg, lines, _ = derived(tmp_path, H100, LARGE)
    assert cfg.model.compute_dtype == cfg.model.reference_dtype == "bfloat16"
    assert cfg.model.param_dtype == "float32" and cfg.loss.kl_coef > 0 and cfg.optim.name == "adamw"
    assert (cfg.rollout.prompts, cfg.rollout.samples, cfg.rollout.max_tokens) == (32, 16, 1024)
    assert cfg.optim.lr == 1e-6 and (cfg.mesh.data, cfg.mesh.fsdp) == (-1, 1)
    assert "of 79.0 GiB" in lines


def test_training_gives_up_the_reference_and_moments_where_memory_is_short_and_says_so(tmp_path):
    cfg, lines, _ = derived(tmp_path, RTX4090, LARGE)
    assert cfg.loss.kl_coef == 0 and cfg.optim.name == "adafactor"  # like the preset qwen2.5-1.5b-24gb
    assert "memory is short, so there is no reference" in lines
    with pytest.raises(UserError, match=r"Training must fit in memory; it takes at least .* Use more devices"):
        derived(tmp_path, RTX4090, LARGE, loss__kl_coef=0.01, optim__name="adamw")


def test_devices_share_the_state(tmp_path):
    cfg, _, _ = derived(tmp_path, V5E, LARGE)
    assert (cfg.mesh.data, cfg.mesh.fsdp) == (1, -1) and cfg.loss.kl_coef > 0
    cfg, _, _ = derived(tmp_path, V5E, LARGE, mesh__data=2, mesh__fsdp=4)
    assert (cfg.mesh.data, cfg.mesh.fsdp) == (2, 4)


def test_given_keys_stay_and_others_follow_them(tmp_path):
    few, _, _ = derived(tmp_path)
    many, _, _ = derived(tmp_path, rollout__samples=4, rollout__max_tokens=40, optim__lr=3e-5)
    assert (many.rollout.samples, many.rollout.max_tokens, many.optim.lr) == (4, 40, 3e-5)
    assert many.rollout.prompts > few.rollout.prompts  # shorter and fewer completions leave time for more prompts


def tokenizer_with(chat: str | None, end: str = EOS):
    """Builds a tokenizer with a chat template whose turns end with `end`."""
    chat = chat and chat.replace("<|im_end|>", end)
    return byte_tokenizer(special=["<|im_start|>", "<|im_end|>"], chat=chat)


@pytest.mark.parametrize(
    "tokenizer, template, reason",
    [
        (tokenizer_with(CHAT), "chat", "whose turns end with an EOS"),
        (tokenizer_with(None), "r1zero", "no chat template"),
        (tokenizer_with(CHAT, "<|im_end|>"), "r1zero", "do not end with an EOS"),
        (tokenizer_with(CHAT.replace("assistant\n", "assistant\n<think>\n")), "r1zero", "writes <think> itself"),
        (tokenizer_with("{{ raise_exception('no') }}"), "r1zero", "does not accept a conversation"),
    ],
)
def test_the_tokenizer_decides_the_template(tmp_path, tokenizer, template, reason):
    cfg, lines, _ = derived(tmp_path, tokenizer=tokenizer)
    assert cfg.prompt.template == template and reason in lines
    assert bool(cfg.prompt.instruction) == (template == "chat")
    assert cfg.rollout.stop_strings == (("</answer>",) if template == "chat" else ("</answer>", "User:"))


def test_examples_come_from_the_file_earn_the_full_reward_and_are_not_trained_on(tmp_path):
    cfg, _, task = derived(tmp_path)
    questions, completions = cfg.prompt.examples[::2], cfg.prompt.examples[1::2]
    answers = {problem.question: problem.answer for problem in task.train}
    assert len(set(questions)) == 2 and set(questions) <= answers.keys()
    assert accuracy(completions, [answers[question] for question in questions]).tolist() == [1, 1]
    assert format(completions).tolist() == [1, 1] and "<<" not in completions[0]
    left = make_task(None, cfg).train
    assert len(left) < len(task.train) and not {problem.question for problem in left} & set(questions)


def test_a_file_without_solutions_gets_general_examples_and_a_short_context_none(tmp_path):
    cfg, lines, _ = derived(tmp_path, solved=False)
    assert cfg.prompt.examples[0] == "What is 17 + 25?" and "no solutions to show" in lines
    cfg, _, _ = derived(tmp_path, positions=1536)  # R1-Zero's template alone has about 600 bytes
    assert cfg.prompt.examples == ()


def test_prompts_show_the_instruction_and_the_examples_as_turns():
    examples = ("1 + 1?", "<answer> 2 </answer>")
    plain = PromptFormat(byte_tokenizer(), instruction="Think.", examples=examples).text(Problem("2 + 2?", "4"))
    assert plain.startswith("Think.\n\nA conversation between User and Assistant.")
    assert plain.endswith("User: 1 + 1?. Assistant: <answer> 2 </answer> User: 2 + 2?. Assistant:")
    chat = PromptFormat(tokenizer_with(CHAT), "chat", instruction="Think.", examples=examples)
    question = [{"role": "system", "content": "S"}, {"role": "user", "content": "2 + 2?"}]
    turns = ["system\nS", "user\nThink.\n\n1 + 1?", "assistant\n<answer> 2 </answer>", "user\n2 + 2?"]
    expected = "<s>" + "".join(f"<|im_start|>{turn}{EOS}\n" for turn in turns) + "<|im_start|>assistant\n"
    assert chat.text(Problem(question, "4")) == expected


def own(folder: Path, *flags: str) -> list[str]:
    """Returns the arguments of a run of configs/own.py with the tiny model."""
    return [f"--config={OWN}", f"--workdir={folder / 'run'}", "--config.model.path=tiny", *flags]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "must have at least one problem; found none"),
        (
            [{"text": "1 + 1?", "answer": "2"}] * 20,
            "no field is known to hold the question",
        ),
        (
            [
                {"question": f"{i} + 1?", "answer": f"See the book, which has all the answers to question {i}."}
                for i in range(20)
            ],
            "unreadable",
        ),
        ([{"question": f"{i} + 1? " * 400, "answer": str(i + 1)} for i in range(20)], "have more"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_file_that_cannot_work_is_refused_before_any_update(tmp_path, rows, message, dry):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=re.escape(message)):
        main([*own(tmp_path, f"--config.task.path={path}"), *["--dry-run"] * dry])
    assert not (tmp_path / "run").exists()


def test_a_missing_model_or_file_is_asked_for_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"Pass --config\.model\.path=MODEL and --config\.task\.path=FILE"):
        main([f"--config={OWN}"])
    with pytest.raises(UserError, match=r"Set --config\.task\.path=FILE"):
        main(own(tmp_path))


def test_a_dry_run_shows_the_plan_prompts_answers_and_a_group_and_writes_nothing(tmp_path, capsys):
    path = word_problems(tmp_path / "problems.jsonl")
    short = ["--config.rollout.max_tokens=24", "--config.rollout.samples=4", "--config.mesh.data=8"]
    main(own(tmp_path, f"--config.task.path={path}", *short, "--dry-run"))
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "200 problems" in printed and "-> rollout.max_prompt_tokens=" in printed
    assert "rollout.samples" not in printed.split("Prompt 1")[0].replace("prompts x 4", "")
    questions = {row["question"]: row["answer"].split()[-1] for row in map(json.loads, path.read_text().splitlines())}
    shown = re.findall(r"User: ([^\n]*?)\. Assistant:\nExpected answer \d: (\d+), read as the number (\d+)", printed)
    assert len(shown) == 3 and all(questions[question] == answer == read for question, answer, read in shown)
    assert "4 completions of prompt 1:" in printed
    assert len(re.findall(r"  = reward [\d.]+: accuracy [01] format [01]", printed)) == 4
    assert "Nothing was written." in printed


def test_an_answer_is_read_only_if_the_accuracy_reward_grades_it():
    problem = Problem("1 + 1?", "nan")
    assert "which no completion could match" in describe_expected(problem, is_graded=True)
    assert describe_expected(problem, is_graded=False) == problem.answer


def test_a_run_that_derived_its_config_goes_on_with_it_and_with_what_is_set_now(tmp_path):
    raw = configs.default()
    raw.update_from_flattened_dict({"model.path": "tiny", "rollout.max_tokens": 24, "optim.lr": 2e-5})
    configs.write_config(tmp_path, configs.check(raw))
    now = load_config(str(OWN))
    now.total_steps = 200  # in a config file, or from Python
    now.rollout.max_tokens = 56  # the default, on the command line
    values = flatten(continue_derived(now, {"rollout.max_tokens"}, tmp_path).to_dict())
    changed = {name: value for name, value in values.items() if value != flatten(raw.to_dict())[name]}
    assert changed == {"total_steps": 200, "rollout.max_tokens": 56, "task.name": "file"}


@pytest.mark.parametrize("entry", [evaluate.main, generate.main, plan.main])
def test_other_commands_read_what_a_run_has_derived_and_derive_nothing(tmp_path, entry):
    arguments = own(tmp_path, "--config.task.path=problems.jsonl")
    with pytest.raises(UserError, match=r"run that has been started"):
        entry(arguments)
    raw = configs.default()
    raw.update_from_flattened_dict({"model.path": "tiny", "task.name": "file", "task.path": "problems.jsonl"})
    raw.rollout.max_tokens = 24
    configs.write_config(tmp_path / "run", configs.check(raw))
    parsed = parse_flags(make_parser("", "", of_a_run=True), arguments).raw
    assert (parsed.rollout.max_tokens, parsed.derive) == (24, False)


@pytest.mark.slow
def test_the_same_command_resumes_with_what_was_derived_and_the_stored_config_is_concrete(tmp_path, capsys):
    path = word_problems(tmp_path / "problems.jsonl")
    arguments = own(
        tmp_path, f"--config.task.path={path}", "--config.rollout.max_tokens=24", "--config.rollout.prompts=4"
    )
    main([*arguments, "--config.total_steps=1"])
    first = flatten(json.loads((tmp_path / "run" / "config.json").read_text()))
    assert first["derive"] is False and first["rollout.max_prompt_tokens"] > 0
    word_problems(tmp_path / "other.jsonl", solved=False)  # what would be derived now does not matter
    main([*arguments, "--config.total_steps=2"])
    second = flatten(json.loads((tmp_path / "run" / "config.json").read_text()))
    assert {name for name in first if first[name] != second[name]} == {"total_steps"}
    assert "Resuming after step 1" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
