"""Drawing recorded completions again: names, what is missing, what a difference means, and real runs."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import config, generate
from grpo_jax.config import write_config
from grpo_jax.config.workdir import read_config
from grpo_jax.errors import UserError
from grpo_jax.main import main
from grpo_jax.rollout.draws import NO_FILTER, TokenFilter, choose_tokens, draw_margin
from grpo_jax.rollout.sampler import place_for_rollout
from grpo_jax.run.context import build_context, read_base_model
from grpo_jax.run.metrics import read_samples, write_samples
from grpo_jax.run.policy import load_policy
from grpo_jax.run.redraw import (
    NOT_THE_SAME,
    Redrawn,
    SampleName,
    config_of_sample,
    describe_redrawn,
    draw_again,
    find_problem,
    parse_sample_name,
    read_record,
)
from grpo_jax.tasks.streams import draw_problems, make_task
from tests.tiny import write_meta

REPO = Path(__file__).parent.parent


def test_a_sample_is_named_by_step_prompt_and_sample():
    assert parse_sample_name("21/320/7") == parse_sample_name("train-000021/320/7") == SampleName("train", 21, 320, 7)
    assert parse_sample_name("eval-20/3/0") == SampleName("eval", 20, 3, 0)
    assert parse_sample_name("21/320/7").policy_step == parse_sample_name("eval-20/3/0").policy_step == 20


@pytest.mark.parametrize(
    "text", ["", "1/2", "1/2/3/4", "-1/2/3", "1/2/x", "test-1/2/3", "1/2/3 ", "\uff11/2/3", "9" * 40 + "/1/1"]
)
def test_other_names_are_refused(text):
    with pytest.raises(UserError, match="--sample must be STEP/PROMPT_ID/SAMPLE_ID"):
        parse_sample_name(text)


@pytest.fixture
def workdir(tmp_path):
    """Returns the workdir of a run with records of the steps 1, 5 and 6, and folders of the checkpoints of 5 and 8."""
    cfg = config.check(config.default())
    write_config(tmp_path, cfg)
    for step in (1, 5, 6):
        write_samples(tmp_path, "train", step, [{"prompt_id": 3, "sample_id": n} for n in range(2)])
    for step in (5, 8):
        write_meta(tmp_path, step, {})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("2/3/0", r"has no samples/train-000002\.jsonl; found files of the steps 1, 5, 6\."),
        ("eval-5/3/0", r"has no samples/eval-000005\.jsonl; found files of the steps none\."),
        ("5/3/2", r"has 2 of the prompts 3 with sample ids 0, 1; found prompt 3, sample 2\."),
        ("5/4/1", r"has 2 of the prompts 3 with sample ids 0, 1; found prompt 4, sample 1\."),
    ],
)
def test_a_sample_that_is_not_recorded_is_refused_with_those_that_are(workdir, name, says):
    with pytest.raises(UserError, match=says):
        read_record(workdir, parse_sample_name(name))


def test_a_sample_whose_policy_is_not_kept_is_refused_with_the_steps_that_are(workdir):
    cfg = config.check(config.default())
    with pytest.raises(UserError, match=r"after step 4, .* found those of the steps 5, 8\. .* training steps 1, 6 can"):
        config_of_sample(cfg, workdir, parse_sample_name("5/3/0"))
    for name in ("1/3/0", "6/3/0", "eval-0/3/0", "eval-8/3/0"):
        assert config_of_sample(cfg, workdir, parse_sample_name(name)) == cfg


def test_a_sample_is_drawn_with_the_config_of_its_checkpoint(workdir):
    cfg = config.check(config.default())
    write_meta(workdir, 8, {"eval.temperature": 0.5, "rollout.samples": 8})
    assert config_of_sample(cfg, workdir, parse_sample_name("eval-8/3/0")).eval.temperature == 0.5
    write_meta(workdir, 8, {"rollout.samples": 4})
    with pytest.raises(UserError, match=r"which was trained with rollout\.samples=4; found rollout\.samples=8"):
        config_of_sample(cfg, workdir, parse_sample_name("eval-8/3/0"))


@pytest.mark.parametrize("flag", ["--prompt=hello", "--temperature=1", "--base", "--step=5"])
def test_a_sample_decides_on_its_prompt_and_its_policy(workdir, flag):
    with pytest.raises(UserError, match="--sample"):
        generate.main([f"--workdir={workdir}", "--sample=5/3/0", flag])


def test_a_key_that_binds_cannot_be_changed_for_a_sample(workdir):
    with pytest.raises(UserError, match=r"was started with rollout\.temperature=1\.0"):
        generate.main([f"--workdir={workdir}", "--sample=5/3/0", "--config.rollout.temperature=0.5"])


@pytest.mark.parametrize("filter", [NO_FILTER, TokenFilter(top_k=20)])
def test_a_margin_is_what_a_token_lacks_to_be_drawn(filter):
    logits, keys, ids = (
        jax.random.normal(jax.random.key(1), (60,)),
        jax.random.split(jax.random.key(0), 20),
        np.arange(60),
    )
    choose = jax.jit(lambda logits: choose_tokens(keys, logits, False, filter)[0])
    margins_of = jax.vmap(
        jax.vmap(partial(draw_margin, greedy=False, filter=filter), (None, None, None, 0)), (0, None, 0, None)
    )
    drawn = np.asarray(choose(jnp.tile(logits, (20, 1))))
    margins = np.array(jax.jit(margins_of)(keys, logits, drawn, ids))
    assert (margins >= 0).all() and (margins == 0).sum() >= 20
    if filter != NO_FILTER:
        assert np.isinf(margins).any()
        return  # raising a logit would also change which tokens are among the top 20
    margins[(ids // 8 != drawn[:, None] // 8) | (ids == drawn[:, None])] = np.inf  # a block has 8 tokens
    others = margins.argmin(axis=1)
    for share, expected in ((0.99, drawn), (1.01, others)):
        raised = logits + np.where(ids == others[:, None], share * margins.min(axis=1)[:, None], 0)
        assert choose(raised).tolist() == expected.tolist()


def test_the_problem_of_a_sample_is_that_of_the_training_which_left_out_the_examples(tmp_path):
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = config.default()
    raw.task.name, raw.task.path = "file", str(tmp_path / "sums.jsonl")
    raw.prompt.examples = tuple(text for row in rows[:10] for text in (row["question"], f"It is {row['answer']}."))
    cfg = config.check(raw)
    base = read_base_model(cfg)
    (drawn,) = draw_problems(make_task(None, cfg), [7], seed=cfg.seed, split="train")
    record = {"question": drawn.question, "expected": drawn.answer, "prompt": base.prompt_format.text(drawn)}
    _, problem, note = find_problem(cfg, base, SampleName("train", 1, 7, 0), record)
    assert problem == drawn and note == ""


def test_a_margin_between_blocks_is_what_the_other_block_lacks_to_be_chosen():
    """Eight tokens make a block; raising the logits of all of them raises the score of the block by as much."""
    logits, keys, ids = (
        2 * jax.random.normal(jax.random.key(2), (60,)),
        jax.random.split(jax.random.key(3), 8),
        np.arange(60),
    )
    choose = jax.jit(jax.vmap(lambda key, logits: choose_tokens(key[None], logits[None], False, NO_FILTER)[0][0]))
    margin = jax.jit(jax.vmap(partial(draw_margin, greedy=False, filter=NO_FILTER), (0, None, 0, 0)))
    drawn = np.asarray(choose(keys, jnp.tile(logits, (8, 1))))
    others = (drawn + 8) % 56
    needed = np.asarray(margin(keys, logits, drawn, others))[:, None]
    raised = (ids // 8 == others[:, None] // 8) * needed
    assert (np.asarray(choose(keys, logits + 0.99 * raised)) == drawn).all()
    assert (np.asarray(choose(keys, logits + 1.01 * raised)) // 8 == others // 8).all()
    greedy = draw_margin(keys[0], logits, 3, 20, True, NO_FILTER)
    assert greedy == logits[3] - logits[20]


def redrawn(**changes) -> Redrawn:
    record = {"tokens": [5, 6, 7], "logps": [-1.0, -2.0, -3.0]}
    same = Redrawn([5, 6, 7], [-1.0, -2.0, -3.0], ["a", "\x1b", "c"], record, ["a", "\x1b", "c"], None, 0.0, 0.0)
    return same._replace(**changes)


def test_a_description_tells_a_near_tie_from_another_policy():
    cfg = config.check(config.default())
    assert describe_redrawn(cfg, redrawn()).endswith(
        "All 3 tokens are the recorded ones; their log-probs differ by at most 0."
    )
    assert "'\\x1b'" in describe_redrawn(cfg, redrawn())
    other = dict(tokens=[5, 6, 8], logps=[-1.0, -2.00001, -2.9], pieces=["a", "b", "d"], first_difference=2)
    near = describe_redrawn(cfg, redrawn(**other, margin=2e-5, recorded_logp=-3.00001))
    assert "Token 2 is the first" in near and near.endswith("decided by 2e-05 nats. Rounding decided this near-tie.")
    for change in (dict(margin=0.5), dict(recorded_logp=-4.0), dict(logps=[-1.5, -2.0, -2.9])):
        far = redrawn(**other | dict(margin=2e-5, recorded_logp=-3.0) | change)
        assert describe_redrawn(cfg, far).endswith(NOT_THE_SAME)
    short = describe_redrawn(cfg, redrawn(tokens=[5, 6], logps=[-1.0, -2.0], pieces=["a", "b"], first_difference=2))
    assert "ends after 2 tokens and the record after 3" in short and short.endswith(NOT_THE_SAME)


RUN = """
    total_steps=3 rollout.prompts=6 rollout.samples=8 log.samples=-1 log.every_steps=3 checkpoint.every_steps=1
    checkpoint.keep=9 eval.questions=6 eval.every_steps=3 optim.lr=1e-3
""".split()


def count_equal(workdir, name, records):
    """Draws records of one step again and returns how many are the recorded ones; every difference is a near-tie."""
    cfg = config_of_sample(config.check(read_config(workdir)), workdir, name)
    base, equal = read_base_model(cfg), 0
    name = name._replace(prompt_id=records[0]["prompt_id"])
    cfg, _, note = find_problem(cfg, base, name, records[0])
    assert note == ""
    context = build_context(cfg, base)
    with jax.set_mesh(context.mesh):
        _, params = load_policy(cfg, context, workdir, base=name.policy_step == 0, step=name.policy_step)
        placed = place_for_rollout(context.model_cfg, params, context.rollout_mesh)
    for record in records:
        name = name._replace(prompt_id=record["prompt_id"], sample_id=record["sample_id"])
        _, problem, _ = find_problem(cfg, base, name, record)
        drawn = draw_again(cfg, context, placed, name, problem, record)
        equal += drawn.first_difference is None
        assert drawn.first_difference is None or describe_redrawn(cfg, drawn).endswith("near-tie.")
    return equal


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_hundred_recorded_samples_at_least_99_are_drawn_again(tmp_path, dtype, capsys):
    flags = [f"--config.{key}" for key in (*RUN, f"model.compute_dtype={dtype}")]
    main([f"--config={REPO}/configs/r1zero.py", f"--workdir={tmp_path / 'run'}", *flags])
    equal = total = 0
    for kind, step in (("train", 1), ("train", 2), ("train", 3), ("eval", 0), ("eval", 3)):
        records = read_samples(tmp_path / "run", kind, step)[:32]
        equal += count_equal(tmp_path / "run", SampleName(kind, step, 0, 0), records)
        total += len(records)
    with capsys.disabled():
        print(f"\n{dtype}: {equal} of {total} recorded samples are drawn again")
    assert total >= 100 and equal >= total - 1 - total // 100


@pytest.mark.slow
def test_a_sample_that_is_not_the_recorded_one_ends_with_exit_code_3(tmp_path, capsys):
    workdir = tmp_path / "run"
    main([f"--config={REPO}/configs/r1zero.py", f"--workdir={workdir}", *(f"--config.{key}" for key in RUN)])
    records = read_samples(workdir, "train", 2)
    records[9]["tokens"][3] = (records[9]["tokens"][3] + 1) % 300
    write_samples(workdir, "train", 2, records)
    capsys.readouterr()
    ids = f"{records[9]['prompt_id']}/{records[9]['sample_id']}"
    with pytest.raises(SystemExit) as stopped:
        generate.main([f"--workdir={workdir}", f"--sample=2/{ids}", "--json"])
    assert stopped.value.code == 3
    drawn = json.loads(capsys.readouterr().out)
    assert (drawn["sample"], drawn["policy_step"], drawn["equal"], drawn["first_difference"]) == (
        f"2/{ids}",
        1,
        False,
        3,
    )
    assert drawn["largest_gap"] < 1e-4 and drawn["margin"] > 0.01
    (workdir / "samples" / "train-000002.jsonl").write_text(json.dumps(records[0] | {"prompt": "another"}))
    with pytest.raises(UserError, match="the template or the tokenizer has changed"):
        generate.main([f"--workdir={workdir}", f"--sample=2/{records[0]['prompt_id']}/0"])
