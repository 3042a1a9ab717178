"""Tasks: problems are functions of seed and index, splits share no question, files are checked line by line."""

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
from grpo_jax.tiny.corpus import corpus_text

DRAWS = range(4000)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def twenty(path) -> str:
    """Twenty lines, q0 to q19; the tenth and the twentieth (q9 and q19) are held out."""
    return write(path, [{"question": f"q{i}", "answer": i} for i in range(20)])


def questions(task, indices) -> list[str]:
    return [task(i).question for i in indices]


def test_addition_is_a_function_of_seed_and_index():
    forwards = [addition_task(7, "train", 3)(i) for i in range(50)]
    task = addition_task(7, "train", 3)
    backwards = [task(i) for i in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert len(set(questions(task, range(50)))) > 40  # of 742,500 pairs: the stream moves on


def test_addition_differs_between_seeds():
    assert questions(addition_task(7, "train", 3), range(50)) != questions(addition_task(8, "train", 3), range(50))


@pytest.mark.parametrize("digits", [1, 2, 3, 9])
def test_addition_asks_for_the_sum_of_two_numbers_of_that_many_digits(digits):
    for split in ("train", "eval"):
        for problem in map(addition_task(0, split, digits), range(100)):
            a, b = map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\?", problem.question).groups())
            assert len(str(a)) == len(str(b)) == digits
            assert problem.answer == str(a + b)
            assert problem.metadata == {"a": a, "b": b}


def test_addition_is_spelled_out_the_same_every_time():
    problem = addition_task(0, "train", 3)(0)
    a, b = problem.metadata["a"], problem.metadata["b"]
    assert problem.question == f"What is {a} + {b}?"


@pytest.mark.parametrize("split", ["train", "eval"])
def test_questions_may_follow_answered_ones(split):
    """The question itself is the same as without; what stands before it is right and never held out."""
    for index in range(40):
        problem, alone = addition_task(3, split, 1, shots=2)(index), addition_task(3, split, 1)(index)
        *shown, asked = problem.question.split(" User: ")
        assert (asked, problem.answer, problem.metadata) == (alone.question, alone.answer, alone.metadata)
        assert len(shown) == 2
        for text in shown:
            question, answer = text.split(". Assistant:")
            a, b = map(int, re.findall(r"\d+", question))
            assert f" {a} + {b} = {a + b} " in answer and not is_held_out(a, b)
            assert reward_parts([answer], [str(a + b)])["total"] == 2


def test_addition_train_and_eval_share_no_pair():
    pairs = {
        split: {(p.metadata["a"], p.metadata["b"]) for p in map(addition_task(0, split, 2), DRAWS)}
        for split in ("train", "eval")
    }
    assert all(a * b % 11 == 1 for a, b in pairs["eval"])
    assert all(a * b % 11 != 1 for a, b in pairs["train"])
    # Of 90 * 90 pairs the draws meet most of the held-out ones, so a leak would be seen in either order.
    assert len(pairs["eval"]) > 500
    both_orders = pairs["eval"] | {(b, a) for a, b in pairs["eval"]}
    assert not both_orders & pairs["train"]


def test_held_out_rule_by_hand():
    # 12 * 12 = 144 = 13 * 11 + 1; 3 * 4 = 12 = 11 + 1; 3 * 5 = 15 = 11 + 4; 11 * b leaves 0.
    assert is_held_out(12, 12) and is_held_out(3, 4) and is_held_out(4, 3)
    assert not is_held_out(3, 5) and not is_held_out(11, 100)


def test_corpus_never_holds_a_held_out_pair():
    """Pages ask `a + b`; the steps of a solution are written without spaces and are single digits."""
    texts = [corpus_text(0, i, 3, digits) for i in range(200) for digits in (2, 3)]
    pairs = [tuple(map(int, pair)) for text in texts for pair in re.findall(r"(\d+) \+ (\d+)", text)]
    assert len(pairs) >= 400  # one a page at least
    assert not [pair for pair in pairs if is_held_out(*pair)]


def test_corpus_is_a_function_of_seed_and_index():
    assert corpus_text(0, 5, 3, 3) == corpus_text(0, 5, 3, 3)
    assert len({corpus_text(seed, index, 3, 3) for seed in range(3) for index in range(3)}) == 9


def test_jsonl_epoch_visits_each_training_line_once(tmp_path):
    task = file_task(0, "train", twenty(tmp_path / "q.jsonl"), "")
    kept = {f"q{i}" for i in range(20) if i not in (9, 19)}
    epochs = [questions(task, range(18 * e, 18 * (e + 1))) for e in range(3)]
    assert all(set(epoch) == kept for epoch in epochs)
    # 18! orders: that two of them agree by chance cannot be.
    assert epochs[0] != epochs[1] != epochs[2] != sorted(kept)


def test_jsonl_holds_every_tenth_line_out(tmp_path):
    task = file_task(0, "eval", twenty(tmp_path / "q.jsonl"), "")
    assert set(questions(task, range(2))) == set(questions(task, range(2, 4))) == {"q9", "q19"}


def test_jsonl_is_a_function_of_seed_and_index(tmp_path):
    path = twenty(tmp_path / "q.jsonl")
    forwards = questions(file_task(3, "train", path, ""), range(40))
    assert questions(file_task(3, "train", path, ""), reversed(range(40))) == forwards[::-1]
    assert questions(file_task(4, "train", path, ""), range(40)) != forwards


def test_jsonl_takes_held_out_questions_from_eval_path(tmp_path):
    path = twenty(tmp_path / "q.jsonl")
    other = write(tmp_path / "e.jsonl", [{"question": "held", "answer": "1"}])
    assert set(questions(file_task(0, "eval", path, other), range(5))) == {"held"}
    assert set(questions(file_task(0, "train", path, other), range(20))) == {
        f"q{i}" for i in range(20)
    }  # no line left out


def test_jsonl_with_fewer_than_ten_lines_needs_an_eval_path(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": f"q{i}", "answer": i} for i in range(9)])
    with pytest.raises(UserError, match=r"at least 10 questions in task.path=.*set task.eval_path"):
        file_task(0, "eval", path, "")


def test_make_task_follows_the_config(tmp_path):
    cfg = default()
    cfg.task.digits = 2
    assert make_task(check(cfg).task, 5, "eval")(3) == addition_task(5, "eval", 2)(3)
    cfg.task.digits = 3
    cfg.task.name, cfg.task.path = "jsonl", twenty(tmp_path / "q.jsonl")
    assert questions(make_task(check(cfg).task, 5, "train"), range(18)) == questions(
        file_task(5, "train", cfg.task.path, ""), range(18)
    )


def test_other_fields_become_metadata(tmp_path):
    row = {"question": "q", "answer": "1", "level": 3, "source": {"book": "b"}}
    (problem,) = read_problems(write(tmp_path / "q.jsonl", [row]))
    assert problem.metadata == {"level": 3, "source": {"book": "b"}}


@pytest.mark.parametrize(
    "written, text",
    [
        ("72", "72"),
        ("-3", "-3"),
        ("3.5", "3.5"),
        ('"72"', "72"),
        ('"x = 1"', "x = 1"),
        ("0.00001", "0.00001"),  # not 1e-05, which the rewards read as a word
    ],
)
def test_answers_that_are_numbers_become_text(tmp_path, written, text):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "q", "answer": %s}\n' % written)
    assert read_problems(str(path))[0].answer == text


def test_lines_end_at_newlines_only(tmp_path):
    """Line and paragraph separators and NEL are ordinary characters of a JSON string; str.splitlines cuts there."""
    text = "a\N{LINE SEPARATOR}b\N{PARAGRAPH SEPARATOR}c\N{NEXT LINE}d"
    path = write(tmp_path / "q.jsonl", [{"question": text, "answer": "1"}, {"question": "q", "answer": "2"}])
    assert [problem.question for problem in read_problems(path)] == [text, "q"]


def test_empty_lines_and_windows_line_ends_are_skipped(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "1"}\r\n\r\n  \n{"question": "r", "answer": "2"}')
    assert [problem.question for problem in read_problems(str(path))] == ["q", "r"]


GOOD = '{"question": "q", "answer": "1"}\n'


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "at least one question"),
        ("\n \n", "at least one question"),
        (GOOD + "{", "line 2; found: Expecting property name"),
        (GOOD + GOOD + '{"question": "q", "ans', "line 3; found: Unterminated string"),
        (GOOD + "[1, 2]", r"JSON object in .* line 2; found '\[1, 2\]'"),
        (GOOD + '{"answer": "1"}', r"field 'question' \(a str\) in .* line 2; found the fields \['answer'\]"),
        (
            GOOD + '{"question": "q"}',
            r"field 'answer' \(a text or number\) in .* line 2; found the fields \['question'\]",
        ),
        (GOOD + '{"question": 5, "answer": "1"}', "field 'question' .* line 2; found 5"),
        (GOOD + '{"question": "q", "answer": true}', "field 'answer' .* line 2; found True"),
        (GOOD + '{"question": "q", "answer": null}', "field 'answer' .* line 2; found None"),
        (GOOD + '{"question": "q", "answer": ["1"]}', r"field 'answer' .* line 2; found \['1'\]"),
    ],
)
def test_broken_file_is_a_user_error_that_names_the_line(tmp_path, text, says):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as raised:
        read_problems(str(path))
    assert str(path) in str(raised.value)


def test_unreadable_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="expected a JSONL file"):
        read_problems(str(tmp_path))  # a folder
    (tmp_path / "q.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(UserError, match="utf-8"):
        read_problems(str(tmp_path / "q.jsonl"))


@pytest.mark.parametrize(
    "row", [{"question": " ", "answer": 1}, {"question": "1?", "answer": " "}, {"question": "1?", "answer": "9" * 201}]
)
def test_a_question_that_cannot_be_rewarded_is_refused(tmp_path, row):
    (tmp_path / "q.jsonl").write_text('{"question": "1?", "answer": 1}\n' + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"answer of 1 to 200 characters in .* line 2"):
        read_problems(str(tmp_path / "q.jsonl"))


def test_held_out_problems_are_no_more_than_there_are(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": f"{i}?", "answer": i}) + "\n" for i in range(30)))
    task = TaskSection(name="jsonl", path=str(tmp_path / "q.jsonl"))
    assert sorted(problem.question for problem in held_out_problems(task, 256)) == ["19?", "29?", "9?"]
    assert len(held_out_problems(task, 2)) == 2
