"""Tasks: problems depend on seed and index alone, splits share no problem, files are checked line by line."""

import json
import re

import pytest

from grpo_jax.config import check, default
from grpo_jax.config.schema import TaskSection
from grpo_jax.errors import UserError
from grpo_jax.rewards.parts import reward_parts
from grpo_jax.tasks.addition import addition_task, is_held_out
from grpo_jax.tasks.problem_file import file_task, read_problems
from grpo_jax.tasks.streams import held_out_problems, make_task


def write_problems(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_twenty(path) -> str:
    """Writes the problems q0 to q19, of which the tenth and the twentieth (q9 and q19) are held out."""
    return write_problems(path, [{"question": f"q{i}", "answer": i} for i in range(20)])


def questions(task, indices) -> list[str]:
    return [task(i).question for i in indices]


def test_addition_depends_on_seed_and_index_alone():
    forwards = [addition_task(7, "train", 3)(i) for i in range(50)]
    task = addition_task(7, "train", 3)
    backwards = [task(i) for i in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert len(set(questions(task, range(50)))) > 40  # 742,500 pairs to draw from


def test_addition_differs_between_seeds():
    assert questions(addition_task(7, "train", 3), range(50)) != questions(addition_task(8, "train", 3), range(50))


@pytest.mark.parametrize("digits", [1, 2, 3, 9])
def test_addition_asks_for_the_sum_of_two_numbers_of_that_many_digits(digits):
    for split in ("train", "eval"):
        for problem in map(addition_task(0, split, digits), range(30)):
            a, b = map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\?", problem.question).groups())
            assert len(str(a)) == len(str(b)) == digits
            assert problem.answer == str(a + b)
            assert problem.metadata == {"a": a, "b": b}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_solved_examples_are_correct_never_held_out_and_leave_the_problem_unchanged(split):
    for index in range(40):
        problem, bare = addition_task(3, split, 1, shots=2)(index), addition_task(3, split, 1)(index)
        *examples, question = problem.question.split(" User: ")
        assert (question, problem.answer, problem.metadata) == (bare.question, bare.answer, bare.metadata)
        assert len(examples) == 2
        for text in examples:
            shown, completion = text.split(". Assistant:")
            a, b = map(int, re.findall(r"\d+", shown))
            assert f" {a} + {b} = {a + b} " in completion and not is_held_out(a, b)
            assert reward_parts([completion], [str(a + b)])["total"] == 2


def test_addition_train_and_eval_share_no_pair():
    pairs = {
        split: {(p.metadata["a"], p.metadata["b"]) for p in map(addition_task(0, split, 2), range(1500))}
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
    task = file_task(0, "train", write_twenty(tmp_path / "q.jsonl"), "")
    training = {f"q{i}" for i in range(20) if i not in (9, 19)}
    epochs = [questions(task, range(18 * e, 18 * (e + 1))) for e in range(3)]
    assert all(set(epoch) == training for epoch in epochs)
    # With 18! orders, two epochs do not agree by chance.
    assert epochs[0] != epochs[1] != epochs[2] != sorted(training)


def test_every_tenth_problem_of_a_file_is_held_out(tmp_path):
    task = file_task(0, "eval", write_twenty(tmp_path / "q.jsonl"), "")
    assert set(questions(task, range(2))) == set(questions(task, range(2, 4))) == {"q9", "q19"}


def test_a_file_task_depends_on_seed_and_index_alone(tmp_path):
    path = write_twenty(tmp_path / "q.jsonl")
    forwards = questions(file_task(3, "train", path, ""), range(40))
    assert questions(file_task(3, "train", path, ""), reversed(range(40))) == forwards[::-1]
    assert questions(file_task(4, "train", path, ""), range(40)) != forwards


def test_with_an_eval_path_no_problem_of_the_training_file_is_held_out(tmp_path):
    path = write_twenty(tmp_path / "q.jsonl")
    other = write_problems(tmp_path / "e.jsonl", [{"question": "held", "answer": "1"}])
    assert set(questions(file_task(0, "eval", path, other), range(5))) == {"held"}
    assert set(questions(file_task(0, "train", path, other), range(20))) == {f"q{i}" for i in range(20)}


def test_a_file_of_fewer_than_ten_problems_needs_an_eval_path(tmp_path):
    path = write_problems(tmp_path / "q.jsonl", [{"question": f"q{i}", "answer": i} for i in range(9)])
    with pytest.raises(UserError, match=r"task.path .* must have at least 10; .*set task.eval_path"):
        file_task(0, "eval", path, "")


def test_make_task_follows_the_config(tmp_path):
    cfg = default()
    cfg.task.digits = 2
    assert make_task(check(cfg).task, 5, "eval")(3) == addition_task(5, "eval", 2)(3)
    cfg.task.digits = 3
    cfg.task.name, cfg.task.path = "jsonl", write_twenty(tmp_path / "q.jsonl")
    assert questions(make_task(check(cfg).task, 5, "train"), range(18)) == questions(
        file_task(5, "train", cfg.task.path, ""), range(18)
    )


def test_other_fields_of_a_line_become_metadata(tmp_path):
    row = {"question": "q", "answer": "1", "level": 3, "source": {"book": "b"}}
    (problem,) = read_problems(write_problems(tmp_path / "q.jsonl", [row]))
    assert problem.metadata == {"level": 3, "source": {"book": "b"}}


@pytest.mark.parametrize(
    "written, text",
    [
        ("72", "72"),
        ("-3", "-3"),
        ("3.5", "3.5"),
        ('"72"', "72"),
        ('"x = 1"', "x = 1"),
        ("0.00001", "0.00001"),  # 1e-05 would be graded as a word
    ],
)
def test_numeric_answers_become_text(tmp_path, written, text):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"question": "q", "answer": {written}}}\n')
    assert read_problems(str(path))[0].answer == text


def test_lines_end_at_newlines_only(tmp_path):
    """JSON strings may contain line and paragraph separators and NEL, at which str.splitlines would split."""
    text = "a\N{LINE SEPARATOR}b\N{PARAGRAPH SEPARATOR}c\N{NEXT LINE}d"
    path = write_problems(tmp_path / "q.jsonl", [{"question": text, "answer": "1"}, {"question": "q", "answer": "2"}])
    assert [problem.question for problem in read_problems(path)] == [text, "q"]


def test_empty_lines_and_windows_line_endings_are_skipped(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "1"}\r\n\r\n  \n{"question": "r", "answer": "2"}')
    assert [problem.question for problem in read_problems(str(path))] == ["q", "r"]


GOOD = '{"question": "q", "answer": "1"}\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must have at least one problem; found none"),
        ("\n \n", "must have at least one problem; found none"),
        (GOOD + "{", "line 2 must be a JSON object; found invalid JSON: Expecting property name"),
        (GOOD + GOOD + '{"question": "q", "ans', "line 3 must be .*: Unterminated string"),
        (GOOD + "[1, 2]", r"line 2 must be a JSON object; found '\[1, 2\]'"),
        (GOOD + '{"answer": "1"}', r"line 2 must have the field 'question'; found the fields \['answer'\]"),
        (GOOD + '{"question": "q"}', r"line 2 must have the field 'answer'; found the fields \['question'\]"),
        (GOOD + '{"question": 5, "answer": "1"}', "line 2 must have a string in the field 'question'; found 5"),
        (GOOD + '{"question": "q", "answer": true}', "line 2 .* a string or a number .* 'answer'; found True"),
        (GOOD + '{"question": "q", "answer": null}', "line 2 .* 'answer'; found None"),
        (GOOD + '{"question": "q", "answer": ["1"]}', r"line 2 .* 'answer'; found \['1'\]"),
    ],
)
def test_malformed_files_raise_a_user_error_that_names_the_line(tmp_path, text, message):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_problems(str(path))
    assert str(path) in str(raised.value)


def test_unreadable_files_raise_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"UTF-8 file with one JSON object per line; .*Is a directory"):
        read_problems(str(tmp_path))
    (tmp_path / "q.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(UserError, match="utf-8"):
        read_problems(str(tmp_path / "q.jsonl"))


@pytest.mark.parametrize(
    "row", [{"question": " ", "answer": 1}, {"question": "1?", "answer": " "}, {"question": "1?", "answer": "9" * 201}]
)
def test_problems_that_no_completion_could_solve_are_refused(tmp_path, row):
    (tmp_path / "q.jsonl").write_text('{"question": "1?", "answer": 1}\n' + json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 2 must have a question, and an answer of 1 to 200 characters"):
        read_problems(str(tmp_path / "q.jsonl"))


def test_no_more_problems_are_held_out_than_the_file_has(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": f"{i}?", "answer": i}) + "\n" for i in range(30)))
    task = TaskSection(name="jsonl", path=str(tmp_path / "q.jsonl"))
    assert sorted(problem.question for problem in held_out_problems(task, 256)) == ["19?", "29?", "9?"]
    assert len(held_out_problems(task, 2)) == 2
