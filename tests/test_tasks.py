"""Tasks: problems depend on seed and index alone, and no question is both trained on and held out."""

import json
import re
from pathlib import Path

import pytest

from grpo_jax.config import check, default
from grpo_jax.config.schema import Config, EvalSection, TaskSection
from grpo_jax.errors import UserError
from grpo_jax.rewards import accuracy, format
from grpo_jax.tasks import Problem, read_problems
from grpo_jax.tasks.addition import addition_task, is_held_out
from grpo_jax.tasks.problem_file import file_task
from grpo_jax.tasks.problem_list import ProblemList, split_problems
from grpo_jax.tasks.streams import (
    CHECKED_PROBLEMS,
    draw_problems,
    held_out_problems,
    make_task,
    problems_to_check,
    resolve_task,
)


def write_problems(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_twenty(path) -> str:
    """Writes the problems q0 to q19, of which q9 and q14 are held out."""
    return write_problems(path, [{"question": f"q{i}", "answer": i} for i in range(20)])


def file_problems(path, eval_path="", **options) -> ProblemList:
    return file_task(TaskSection(name="file", path=str(path), eval_path=str(eval_path)), **options)


def questions(task, indices, seed=0, split="train") -> list[str]:
    return [task(i, seed=seed, split=split).question for i in indices]


def addition(indices, seed=0, split="train", digits=3, shots=0) -> list[Problem]:
    return [addition_task(digits, shots)(i, seed=seed, split=split) for i in indices]


def test_addition_depends_on_seed_and_index_alone():
    forwards = addition(range(50), seed=7)
    task = addition_task(3)
    assert [task(i, seed=7, split="train") for i in reversed(range(50))] == forwards[::-1]
    assert len({problem.question for problem in forwards}) > 40  # 742,500 pairs to draw from


def test_addition_differs_between_seeds():
    assert addition(range(50), seed=7) != addition(range(50), seed=8)


@pytest.mark.parametrize("digits", [1, 2, 3, 9])
def test_addition_asks_for_the_sum_of_two_numbers_of_that_many_digits(digits):
    for split in ("train", "eval"):
        for problem in addition(range(30), split=split, digits=digits):
            a, b = map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\?", problem.question).groups())
            assert len(str(a)) == len(str(b)) == digits
            assert problem.answer == str(a + b)
            assert problem.metadata == {"a": a, "b": b}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_solved_examples_are_correct_never_show_the_answer_or_a_held_out_sum_and_leave_the_problem_unchanged(split):
    for index in range(40):
        (problem,), (bare,) = (addition([index], 3, split, digits=1, shots=shots) for shots in (2, 0))
        *examples, question = problem.question.split(" User: ")
        assert (question, problem.answer, problem.metadata) == (bare.question, bare.answer, bare.metadata)
        assert len(examples) == 2
        for text in examples:
            shown, completion = text.split(". Assistant:")
            a, b = map(int, re.findall(r"\d+", shown))
            assert f" {a} + {b} = {a + b} " in completion and not is_held_out(a, b)
            assert a + b != int(problem.answer)
            assert accuracy([completion], [str(a + b)]) == format([completion]) == 1


def test_addition_train_and_eval_share_no_pair():
    pairs = {
        split: {(p.metadata["a"], p.metadata["b"]) for p in addition(range(1500), split=split, digits=2)}
        for split in ("train", "eval")
    }
    assert all(a * b % 11 == 1 for a, b in pairs["eval"])
    assert all(a * b % 11 != 1 for a, b in pairs["train"])
    # The draws cover most of the held-out pairs (about one in twelve of 90 * 90), so they would reveal a leak.
    assert len(pairs["eval"]) > 500
    both_orders = pairs["eval"] | {(b, a) for a, b in pairs["eval"]}
    assert not both_orders & pairs["train"]


def test_held_out_rule_on_hand_computed_pairs():
    # 12 * 12 = 144 = 13 * 11 + 1; 3 * 4 = 12 = 11 + 1; 3 * 5 = 15 = 11 + 4; 11 * b leaves 0.
    assert is_held_out(12, 12) and is_held_out(3, 4) and is_held_out(4, 3)
    assert not is_held_out(3, 5) and not is_held_out(11, 100)


def test_an_epoch_of_a_file_visits_each_training_problem_once(tmp_path):
    task = file_problems(write_twenty(tmp_path / "q.jsonl"))
    training = {f"q{i}" for i in range(20) if i not in (9, 14)}
    epochs = [questions(task, range(18 * e, 18 * (e + 1))) for e in range(3)]
    assert all(set(epoch) == training for epoch in epochs)
    # With 18! orders, two epochs do not agree by chance.
    assert epochs[0] != epochs[1] != epochs[2] != sorted(training)


def test_the_order_of_a_file_is_the_same_in_every_version(tmp_path):
    """A run resumed with another version of the package must ask the same problems. The last 8 are in the 2nd epoch."""
    task = file_problems(write_twenty(tmp_path / "q.jsonl"))
    assert questions(task, range(8), seed=3) == ["q4", "q19", "q18", "q7", "q5", "q3", "q1", "q13"]
    assert questions(task, range(18, 26), seed=3) == ["q16", "q1", "q17", "q7", "q15", "q11", "q18", "q4"]
    assert questions(task, range(2), split="eval") == ["q14", "q9"]


def test_held_out_problems_of_a_file_end(tmp_path):
    task = file_problems(write_twenty(tmp_path / "q.jsonl"))
    assert set(questions(task, range(2), split="eval")) == {"q9", "q14"}
    with pytest.raises(IndexError):
        task(2, seed=0, split="eval")


def test_a_file_task_depends_on_seed_and_index_alone(tmp_path):
    path = write_twenty(tmp_path / "q.jsonl")
    forwards = questions(file_problems(path), range(40), seed=3)
    assert questions(file_problems(path), reversed(range(40)), seed=3) == forwards[::-1]
    assert questions(file_problems(path), range(40), seed=4) != forwards


def test_with_an_eval_path_no_problem_of_the_training_file_is_held_out(tmp_path):
    path = write_twenty(tmp_path / "q.jsonl")
    other = write_problems(tmp_path / "e.jsonl", [{"question": "held", "answer": "1"}])
    task = file_problems(path, other)
    assert questions(task, range(1), split="eval") == ["held"]
    assert set(questions(task, range(20))) == {f"q{i}" for i in range(20)}


def test_the_task_follows_the_config(tmp_path):
    cfg = default()
    cfg.task.digits, cfg.task.shots = 2, 1
    assert resolve_task(check(cfg))(3, seed=5, split="eval") == addition([3], 5, "eval", digits=2, shots=1)[0]
    cfg = default()
    cfg.task.name, cfg.task.path = "file", write_twenty(tmp_path / "q.jsonl")
    assert questions(resolve_task(check(cfg)), range(18)) == questions(file_problems(cfg.task.path), range(18))
    cfg.task.eval_path = write_problems(tmp_path / "e.jsonl", [{"question": "held", "answer": "1"}])
    assert questions(resolve_task(check(cfg)), range(1), split="eval") == ["held"]


def test_a_config_may_name_a_function_of_the_user_as_its_task(tmp_path):
    cfg = default()
    (tmp_path / "my.py").write_text("def primes(index, *, seed, split): return index, seed, split")
    cfg.task.name = f"{tmp_path}/my.py:primes"
    assert resolve_task(check(cfg))(3, seed=5, split="eval") == (3, 5, "eval")


def test_the_error_for_an_unknown_task_says_how_to_resume_a_run_on_a_list():
    with pytest.raises(
        UserError, match=r"task.name must be 'addition', 'file', .*'adition'. Did you mean 'addition'\?$"
    ):
        resolve_task(Config(task=TaskSection(name="adition")))
    with pytest.raises(UserError, match=r"found 'python'. .* To resume a run of grpo_jax.train with problems=...,"):
        resolve_task(Config(task=TaskSection(name="python")))


def test_problems_may_be_a_path_a_list_a_task_or_what_the_config_names(tmp_path):
    cfg = Config(task=TaskSection(digits=1))
    assert make_task(None, cfg)(0, seed=0, split="train") == addition([0], digits=1)[0]
    path = write_twenty(tmp_path / "q.jsonl")
    for source in (path, Path(path)):
        assert questions(make_task(source, cfg), range(18)) == questions(file_problems(path), range(18))
    assert questions(make_task(tuple(read_problems(path)), cfg), range(18)) == questions(file_problems(path), range(18))
    task = addition_task(2)
    assert make_task(task, cfg) is task
    with pytest.raises(UserError, match=r"problems must be a list of Problem, .*; found int. Pass one of these"):
        make_task(5, cfg)


def listed(count) -> list[Problem]:
    return [Problem(f"q{i}", str(i)) for i in range(count)]


def test_a_list_is_split_like_a_file():
    task = make_task(listed(25), Config())
    assert {problem.question for problem in held_out_problems(task, 256)} == {"q9", "q14", "q24"}
    assert set(questions(task, range(22))) == {f"q{i}" for i in range(25)} - {"q9", "q14", "q24"}
    assert task.notes == ("22 problems for training, 3 held out",)


def test_about_a_tenth_of_the_questions_is_held_out_and_adding_more_changes_none():
    few, many = (split_problems(listed(count), hold_out=True) for count in (2000, 3000))
    assert 170 < len(few.held_out) < 230
    assert [problem.question for problem in many.held_out[: len(few.held_out)]] == [p.question for p in few.held_out]


@pytest.mark.parametrize("count", range(2, 40))
def test_at_least_one_question_is_held_out_and_one_is_trained_on(count):
    task = split_problems([Problem(f"What is {count} + {i}?", "1") for i in range(count)], hold_out=True)
    assert task.train and task.held_out


def test_not_all_questions_are_held_out_even_if_all_hashes_say_so():
    task = split_problems([Problem("q9", "1"), Problem("q14", "1")], hold_out=True)
    assert len(task.train) == len(task.held_out) == 1


def test_duplicates_of_a_question_are_in_the_same_split():
    """Whatever their spacing, case and compatibility characters are, as text or in a message."""
    copies = (
        "What is 2 + {}?",
        " what is\n2 +  {}? ",
        "WHAT IS 2 + {}?",
        "What\xa0is \uff12 + {}?",
        r"What~is 2\,+\ {} ?",
        "What is 2+{}?",
    )
    problems = [Problem(copy.format(i), "1") for i in range(100) for copy in copies]
    problems += [Problem([{"role": "user", "content": copies[0].format(i)}], "1") for i in range(100)]
    task = split_problems(problems, hold_out=True)
    sides = [{re.search(r"(\d+) ?\?", str(p.question))[1] for p in side} for side in (task.train, task.held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert task.notes == (
        f"{7 * len(sides[0])} problems for training, {7 * len(sides[1])} held out; duplicate questions: 600",
    )


def test_duplicate_questions_with_other_answers_are_counted():
    problems = [*listed(20), Problem("q1", "1"), Problem("Q1", "one"), Problem("q2", "3")]
    assert split_problems(problems, hold_out=True).notes[0].endswith("; duplicate questions: 3 (2 with another answer)")


def test_a_note_says_that_all_problems_have_the_same_answer(tmp_path):
    path = tmp_path / "q.jsonl"
    for answers, is_noted in ((["7"] * 20, True), (["7"] * 19 + ["8"], False)):
        path.write_text("".join(f'{{"question": "q{i}", "answer": "{answer}"}}\n' for i, answer in enumerate(answers)))
        notes = file_task(TaskSection(name="file", path=str(path))).notes
        assert any(f"All 20 problems of {path} have the answer '7'" in note for note in notes) == is_noted


def test_without_evaluation_every_problem_is_trained_on():
    cfg = Config(eval=EvalSection(questions=0))
    task = make_task(listed(25), cfg)
    assert (len(task.train), task.held_out, held_out_problems(task, 0)) == (25, [], [])


def test_a_single_question_cannot_be_split():
    with pytest.raises(
        UserError, match=r"left for training; found 1 different question, .* set --config.eval.questions=0"
    ):
        make_task([Problem("1 + 1?", "2"), Problem("1 + 1?", "2")], Config())


def test_held_out_questions_of_another_file_are_not_trained_on(tmp_path):
    held_out = [{"question": "Q3 ", "answer": "3"}, {"question": "held", "answer": "1"}]
    task = file_problems(write_twenty(tmp_path / "q.jsonl"), write_problems(tmp_path / "e.jsonl", held_out))
    assert {p.question for p in task.train} == {f"q{i}" for i in range(20)} - {"q3"}
    assert [p.question for p in task.held_out] == ["Q3 ", "held"]
    assert task.notes[2] == "19 problems for training, 2 held out; not trained on because held out: 1"


def test_the_held_out_file_must_differ_from_the_training_file(tmp_path):
    path = write_twenty(tmp_path / "q.jsonl")
    copy = write_twenty(tmp_path / "copy.jsonl")
    for pair in ((path, path), (path, copy), ("owner/name", "owner/name")):
        with pytest.raises(
            UserError, match=r"task.eval_path must not hold the same problems as task.path; found equal"
        ):
            file_problems(*pair)
    more = write_problems(tmp_path / "more.jsonl", [{"question": f"q{i}", "answer": i} for i in range(21)])
    with pytest.raises(UserError, match=r"for training; found 20 different .* or name another task.eval_path\.$"):
        file_problems(path, more)


def test_problems_of_a_list_with_unreadable_answers_are_left_out_up_to_the_limit(tmp_path):
    problems = [*listed(99), Problem("q", " ")]
    task = make_task(problems, Config())
    assert len(task.train) + len(task.held_out) == 99
    assert task.notes[0].startswith("99 problems, 1 unreadable row (problems[99]: ")
    with pytest.raises(UserError, match=r"rows of problems, .*found 1 of 99 rows: problems\[98\]: .* them, or"):
        make_task(problems[1:], Config())
    assert len(make_task(problems[1:], Config(), graded=False).train) > 80


@pytest.mark.parametrize(
    "problems, says",
    [
        ([], "problems must have at least one problem; found none"),
        ([Problem("q", "1"), ("q", "1")], r"problems\[1\] must be a grpo_jax.tasks.Problem; found \('q', '1'\). Write"),
        ([Problem("q", 1)], r"problems\[0\]: the answer must be a string; found 1. Write it as text"),
    ],
)
def test_a_list_must_hold_problems(problems, says):
    with pytest.raises(UserError, match=says):
        make_task(problems, Config())


def test_held_out_problems_are_asked_in_the_order_of_seed_0():
    def task(index, *, seed, split):
        return Problem(f"{index} {seed} {split}", "")

    assert [problem.question for problem in held_out_problems(task, 2)] == ["0 0 eval", "1 0 eval"]


def test_a_task_may_end_in_evaluation_only():
    def task(index, *, seed, split):
        return listed(3)[index]

    assert held_out_problems(task, 256) == listed(3)
    with pytest.raises(UserError, match=r"The task 'task' must return a Problem for index 3, .*raised IndexError"):
        draw_problems(task, range(5), seed=0, split="train")
    with pytest.raises(UserError, match="at least one held-out problem; found none for split 'eval'"):
        held_out_problems(lambda index, **_: [][index], 256)


@pytest.mark.parametrize(
    "returned, says",
    [
        (None, "must be a grpo_jax.tasks.Problem; found None. Write"),
        ("q", "must be a grpo_jax.tasks.Problem; found 'q'"),
        (Problem(1, "2"), ": the question must be a text, or messages .*; found 1. Write"),
        (Problem("1", 2.5), ": the answer must be a string; found 2.5. Write"),
    ],
)
def test_what_a_task_returns_must_be_a_problem(returned, says):
    def task(index, *, seed, split):
        return Problem("q", "1") if index < 4 else returned

    with pytest.raises(UserError, match=f"The value of task 'task' for index 4 of split 'train'.*{says}"):
        draw_problems(task, range(8), seed=0, split="train")


def test_an_exception_in_a_task_is_reported_with_its_location():
    def task(index, *, seed, split):
        return Problem("q", str(1 // (index - 2)))

    line = task.__code__.co_firstlineno + 1
    with pytest.raises(UserError) as raised:
        draw_problems(task, range(8), seed=5, split="eval")
    says = "for index 2, seed 5 and split 'eval', but it raised ZeroDivisionError: integer division or modulo by zero"
    assert f"{says} ({__file__}:{line})." in str(raised.value)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_prompts_of_a_whole_list_and_of_the_start_of_an_endless_task_are_checked():
    assert problems_to_check(ProblemList(listed(3), listed(2)), 0, 1) == (listed(3), listed(2))
    train, held_out = problems_to_check(addition_task(3), 7, 5)
    assert train == addition(range(CHECKED_PROBLEMS), seed=7)
    assert held_out == held_out_problems(addition_task(3), 5)
    assert problems_to_check(addition_task(3), 7, 0) == (train, [])


def test_problems_compare_by_value_and_cannot_be_changed():
    assert Problem("q", "1") == Problem("q", "1", {}) != Problem("q", "2")
    with pytest.raises(AttributeError):
        Problem("q", "1").answer = "2"
