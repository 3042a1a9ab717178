"""Problems are read from common formats and data sets, and errors name the place of what cannot be used."""

import csv
import gzip
import io
import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_jax.config.schema import TaskSection
from grpo_jax.errors import UserError
from grpo_jax.tasks import read_problems, rows
from grpo_jax.tasks.problem_file import READABLE, file_task, read_with_notes
from grpo_jax.tasks.rows import read_rows
from grpo_jax.text.answers import read_expected

ROWS = [{"question": f'What is {i} + {i}?\nNow, "quickly": é', "answer": str(2 * i)} for i in range(1, 5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
CHOICES = ["133", "134", "131", "143"]
SHOWN = "Q?\n(A) 133\n(B) 134\n(C) 131\n(D) 143"


def as_csv(delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ("question", "answer"), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def as_parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


CONTENTS = {
    "lines": (LINES, "line 3"),
    "lines with Windows ends and blank lines": ("\n" + LINES.replace("\n", "\r\n \r\n"), "line 6"),
    "UTF-8 with a byte order mark": (b"\xef\xbb\xbf" + LINES.encode(), "line 3"),
    "UTF-16": (LINES.encode("utf-16"), "line 3"),
    "UTF-16 without a byte order mark": (LINES.encode("utf-16-le"), "line 3"),
    "array": (json.dumps(ROWS), "row 3"),
    "array over lines": (json.dumps(ROWS, indent=2), "row 3"),
    "array in an object": (json.dumps({"version": "1", "data": ROWS}), "row 3"),
    "array in an object over lines": (json.dumps({"version": "1", "data": ROWS}, indent=1), "row 3"),
    "CSV": (as_csv(","), "line 6"),
    "TSV": (as_csv("\t"), "line 6"),
    "CSV with semicolons": (as_csv(";"), "line 6"),
    "parquet": (as_parquet(), "row 3"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_is_recognized_by_its_content(tmp_path, name, zipped):
    content, place = CONTENTS[name]
    content = content.encode() if isinstance(content, str) else content
    path = tmp_path / "q.data"
    path.write_bytes(gzip.compress(content) if zipped else content)
    problems = read_problems(path)
    assert [{"question": p.question.replace("\r", ""), "answer": p.answer} for p in problems] == ROWS
    assert problems[2].id == f"q.data {place}" and problems[2].metadata == {}


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_one(tmp_path, row, **fields):
    (problem,) = read_problems(write(tmp_path / "q.jsonl", row), **fields)
    return problem


@pytest.mark.parametrize(
    "row, question, answer",
    [
        ({"question": "Q?", "answer": "It is 1,000 + 8.\n<<1000+8=1008>>\n#### 1,008"}, "Q?", "1,008"),
        ({"problem": "Q?", "solution": r"First \boxed{1}, then $\boxed{\frac{1}{2}}$."}, "Q?", r"\frac{1}{2}"),
        ({"problem": "Q?", "solution": r"So $\boxed 7$."}, "Q?", "7"),
        ({"solution": r"\boxed{5}", "problem": "Q?", "answer": "72"}, "Q?", "72"),
        ({"problem": "Q?", "answer": None, "solution": r"\boxed{5}"}, "Q?", "5"),
        ({"problem": "Q?", "answer": " ", "solution": r"\boxed{5}"}, "Q?", "5"),
        ({"ID": "1", "Question": "Q?", "Answer": "72", "Part": ""}, "Q?", "72"),
        ({"Problem": "Q?", "Answer": 72}, "Q?", "72"),
        ({"question": "Q?", "context": None, "final_answer": ["$2$"], "solution": ["Long."]}, "Q?", "$2$"),
        ({"question": "Q?", "context": "Seen.", "final_answer": ["2", "3"]}, "Seen.\n\nQ?", "2, 3"),
        ({"prompt": PROMPT, "reward_model": {"ground_truth": "2", "style": "rule"}, "answer": "no"}, PROMPT, "2"),
        ({"prompt": PROMPT, "reward_model": {"ground_truth": '["2"]'}}, PROMPT, "2"),
        ({"prompt": "Q?", "solution": r"\frac{3}{5}"}, "Q?", r"\frac{3}{5}"),
        ({"prompt": [dict(PROMPT[1], name="x")], "ground_truth": "2"}, PROMPT[1:], "2"),
        (
            {"body": "Mia has 2 cats.", "question": "How many?", "answer": "2 (cats)"},
            "Mia has 2 cats. How many?",
            "2 (cats)",
        ),
        ({"Body": "Mia has 2 cats.", "Question": "How many?", "Answer": 2.0}, "Mia has 2 cats. How many?", "2.0"),
        ({"question": "Q?", "choices": CHOICES, "answer": 3, "subject": "x"}, SHOWN, "(D) 143"),
        ({"question": "Q?", "options": CHOICES, "answer": "B", "answer_index": 1}, SHOWN, "(B) 134"),
        ({"question": "Q?", "choices": {"text": CHOICES, "label": list("ABCD")}, "answerKey": "C"}, SHOWN, "(C) 131"),
        ({"question": "Q?", "choices": {"text": CHOICES, "label": list("1234")}, "answerKey": "4"}, SHOWN, "(D) 143"),
        ({"question": "Q?", "options": dict(zip("ABCD", CHOICES, strict=True)), "answer_idx": "D"}, SHOWN, "(D) 143"),
        ({"question": "Q?", "options": ["A)133", "B)134", "C)131", "D)143"], "correct": "B"}, SHOWN, "(B) 134"),
        (
            {"passage": "Read.", "question": "Q?", "options": ["(A)133", "(B)134", "(C)131", "(D)143"], "label": "C"},
            "Read.\n\n" + SHOWN,
            "(C) 131",
        ),
        ({"passage": None, "question": "Q?", "options": None, "label": None, "answer": "$7$"}, "Q?", "$7$"),
        ({"Question": "Q?", "A": 133, "B": 134, "C": 131, "D": 143, "Answer": "D"}, SHOWN, "(D) 143"),
        ({"question": "Q?", "choices": CHOICES, "answer": "(B)"}, SHOWN, "(B) 134"),
        ({"question": "Q?", "choices": CHOICES, "answer": "143"}, SHOWN, "(D) 143"),
        ({"query": "Q?", "choices": CHOICES, "gold": [2]}, SHOWN, "(C) 131"),
        ({"question": "Q?", "answer": "7", "metadata": {"source_dataset": "chain_sum"}}, "Q?", "7"),
    ],
)
def test_rows_of_known_data_sets_are_recognized(tmp_path, row, question, answer):
    problem = read_one(tmp_path, row)
    assert (problem.question, problem.answer) == (question, answer)
    assert problem == read_one(tmp_path, dict(reversed(row.items())))  # in any order of the fields


def test_all_other_fields_become_metadata(tmp_path):
    row = {"passage": "P.", "question": "q", "options": ["1", "2"], "label": "A", "level": 3, "other": {"book": ["b"]}}
    assert read_one(tmp_path, row).metadata == {"level": 3, "other": {"book": ["b"]}}


def test_the_right_choice_of_gpqa_has_no_fixed_position(tmp_path):
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    rows = [{"Question": f"Q{i}?", **dict(zip(names, ("10", "11", "12", "13"), strict=True))} for i in range(40)]
    problems = read_problems(write(tmp_path / "q.jsonl", *rows))
    assert {problem.answer for problem in problems} == {"(A) 10", "(B) 10", "(C) 10", "(D) 10"}
    for problem in problems:
        assert f"\n{problem.answer}" in problem.question and all(f") {i}" in problem.question for i in range(10, 14))
    assert (
        problems[3:]
        == [  # a problem's order does not depend on the others
            *read_problems(write(tmp_path / "q.jsonl", *rows[:3], *rows[3:]))[3:]
        ]
    )


@pytest.mark.parametrize(
    "fields, question, answer",
    [
        (dict(question="ask.text", answer="facts.1"), "1 + 1?", "2"),
        (dict(question="turns.0.content", answer="key"), "Hm?", "B"),
        (dict(question="turns", answer="facts.0"), [{"role": "user", "content": "Hm?"}], "1"),
        (dict(question="ask.text", answer="key", choices="offers"), "1 + 1?\n(A) 1\n(B) 2", "(B) 2"),
    ],
)
def test_fields_can_be_named(tmp_path, fields, question, answer):
    row = {"ask": {"text": "1 + 1?"}, "facts": ["1", "2"], "turns": [{"role": "user", "content": "Hm?"}], "key": "B"}
    problem = read_one(tmp_path, row | {"offers": ["1", "2"]}, **fields)
    assert (problem.question, problem.answer) == (question, answer)


@pytest.mark.parametrize(
    "row, verifier",
    [
        ({"target": 24, "nums": [3, 4, 2]}, "countdown"),
        ({"prompt": PROMPT, "reward_model": {"ground_truth": {"target": 9, "numbers": [4, 5]}}}, "countdown"),
        ({"question": "q", "answer": "1", "metadata": {"source_dataset": "rush_hour"}}, "rush_hour"),
        ({"question": "q", "answer": "1", "metadata": '{"source_dataset": "sudoku"}'}, "sudoku"),
        (
            {"prompt": PROMPT, "data_source": "reasoning_gym/n_queens", "reward_model": {"ground_truth": "1"}},
            "n_queens",
        ),
    ],
)
def test_rows_with_several_right_answers_are_refused_with_the_verifier_that_they_need(tmp_path, row, verifier):
    with pytest.raises(UserError, match=f"found 1 of 1 rows: line 1: it needs the verifier '{verifier}', because"):
        read_one(tmp_path, row)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"q": "Q?", "meta": {"a": 1}}, "no field is known to hold the question; the fields are q, meta.a"),
        ({"question": "Q?", "x": "1"}, "no field is known to hold the answer; the fields are question, x"),
        ({"question": "Q?", "answer": None}, "the field 'answer' is empty; the fields are question, answer"),
        ({"Question": " ", "answer": "1"}, "the field 'Question' is empty; the fields are Question, answer"),
        ({"question": 5, "answer": "1"}, "the question must be a text, or messages .*; found 5"),
        ({"prompt": [*PROMPT, {"role": "assistant", "content": "2"}], "answer": "2"}, "messages of which the last is"),
        ({"prompt": [{"role": "user"}], "answer": "2"}, "the question must be a text, or messages"),
        ({"prompt": [{"role": "tool", "content": "x"}], "answer": "2"}, "the question must be a text, or messages"),
        ({"question": "Q?", "answer": True}, "must be a text or a number; found True"),
        ({"question": "Q?", "answer": float("nan")}, "must be a text or a number; found nan"),
        ({"question": "Q?", "answer": float("inf")}, "must be a text or a number; found inf"),
        ({"question": "Q?", "answer": {"value": 1}}, "must be a text or a number; found {'value': 1}"),
        (
            {"problem": "Q?", "solution": "We see that it is true for all n, as was to be shown."},
            "no final answer in the",
        ),
        ({"problem": "Q?", "answer": "proof", "solution": r"\boxed{1}"}, "no final answer in the field 'answer'"),
        ({"question": "Q?", "answer": r"\boxed{"}, r"no final answer in the field 'answer' \(last `.boxed`\)"),
        ({"question": "Q?", "choices": CHOICES, "answer": 4}, "must name one of the choices; found '4', which names 0"),
        (
            {"question": "Q?", "choices": ["1", "0"], "answer": "0"},
            "must name one of the choices; found '0', which names 2",
        ),
        ({"question": "Q?", "choices": ["1", None], "answer": 0}, "found None"),
    ],
)
def test_rows_without_a_question_or_an_answer_are_refused_with_the_reason(tmp_path, row, says):
    with pytest.raises(UserError, match=rf"Of the rows of .*q.jsonl, .* found 1 of 1 rows: line 1: .*{says}") as raised:
        read_one(tmp_path, row)
    assert "--config.task.question=FIELD, --config.task.answer=FIELD" in str(raised.value)


def test_a_verifier_that_is_needed_is_not_looked_for_in_fields(tmp_path):
    with pytest.raises(UserError, match=r"accuracy must not be a reward part\. Correct them\.$"):
        read_one(tmp_path, {"target": 24, "nums": [3, 4, 2]})


def test_choices_differ_only_in_their_content(tmp_path):
    """The columns of GPQA end with line breaks here and there, for the correct answer more often than for others."""
    row = {"Question": "Q?", "Correct Answer": "7\n", "Incorrect Answer 1": "8", "Incorrect Answer 2": " 9"}
    problem = read_one(tmp_path, row | {"Incorrect Answer 3": "two\n lines"})
    assert sorted(line[4:] for line in problem.question.splitlines()[1:]) == ["7", "8", "9", "two lines"]
    assert problem.answer[4:] == "7" and f"\n{problem.answer}" in problem.question
    problem = read_one(tmp_path, {"question": "Q?", "choices": ["7 ", "8\n"], "answer": "8\n"})
    assert (problem.question, problem.answer) == ("Q?\n(A) 7\n(B) 8", "(B) 8")


@pytest.mark.parametrize(
    "row, question, answer",
    [
        ({"question": "Q?", "options": ["(A)1", "(B)2", "(C)1"], "label": ["A", "C"]}, "Q?", "(A), (C)"),
        (
            {"question_stem": "Q?", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B"},
            "Q?",
            "(B) 2",
        ),
        (
            {
                "question": {"stem": "Q?", "choices": [{"text": "1", "label": "A"}, {"text": "2", "label": "B"}]},
                "answerKey": "A",
            },
            "Q?",
            "(A) 1",
        ),
    ],
)
def test_choices_are_found_in_objects_and_several_may_be_correct(tmp_path, row, question, answer):
    problem = read_one(tmp_path, row)
    assert (problem.question.splitlines()[0], problem.answer) == (question, answer)


def test_a_solution_without_a_box_does_not_stand_for_an_empty_answer(tmp_path):
    with pytest.raises(UserError, match="the field 'answer' is empty and `solution` has no box"):
        read_one(tmp_path, {"problem": "Q?", "solution": "Then 9", "answer": ""})
    assert read_one(tmp_path, {"problem": "Q?", "solution": r"\boxed{9}", "answer": ""}).answer == "9"
    assert read_one(tmp_path, {"prompt": "Q?", "solution": "9"}).answer == "9"


def test_a_path_that_is_too_long_is_an_error_in_one_line():
    with pytest.raises(UserError, match=r"could not be read from .*File name too long"):
        read_problems("q" * 300)


def test_a_named_field_must_exist(tmp_path):
    row = {"question": "Q?", "answer": "1"}
    with pytest.raises(UserError, match="line 1: the field 'key' is missing or empty; the fields are question, answer"):
        read_one(tmp_path, row, answer="key")
    with pytest.raises(UserError, match="line 1: the field 'answer' must hold 2 to 26 choices; found '1'"):
        read_one(tmp_path, row, choices="answer")


def test_unreadable_rows_are_left_out_and_listed_up_to_the_limit(tmp_path):
    rows = [{"problem": f"{i}?", "solution": rf"\boxed{{{i}}}"} for i in range(200)]
    rows[4], rows[7] = {"problem": "4?", "solution": ""}, {"problem": "7?", "answer": 7}
    path = write(tmp_path / "q.jsonl", *rows)
    problems, note = read_with_notes(path, TaskSection(), graded=True)
    assert len(problems) == 199 and problems[4].id == "q.jsonl line 6"
    assert note == (
        r"q.jsonl: question from `problem`, answer from `solution` (last `\boxed`) in 198 rows; "
        "question from `problem`, answer from `answer` in 1 row; 199 problems, 1 unreadable row "
        "(line 5: the field 'solution' is empty; the fields are problem, solution)"
    )
    with pytest.raises(
        UserError, match=r"task.max_unreadable=0.001 may be unreadable; found 1 of 200 rows: line 5: the field"
    ):
        read_with_notes(path, TaskSection(max_unreadable=0.001), graded=True)


def test_answers_that_no_completion_could_match_are_refused_only_if_they_are_compared(tmp_path):
    path = write(
        tmp_path / "q.jsonl", {"question": "Q?", "answer": "one " * 20}, {"question": "R?", "answer": {"tests": [1]}}
    )
    with pytest.raises(UserError, match=r"found 2 of 2 rows: line 1: no completion could .*; line 2: an answer"):
        read_problems(path)
    problems, _ = read_with_notes(path, TaskSection(), graded=False)
    assert [problem.answer for problem in problems] == ["one " * 20, '{"tests": [1]}']


GOOD = '{"question": "q", "answer": "1"}\n'
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "must have at least one problem; found none"),
        ("\n \n", "must have at least one problem; found none"),
        ("[]", "must have at least one problem; found none"),
        ("question,answer\n", "read as CSV, it has the header 'question,answer', but no rows"),
        ("PK\3\4\0\0\n", "it is neither text nor parquet"),
        (GOOD + "{", "line 2 is not valid JSON: Expecting property name.*; found '{'"),
        ("[version https://git-lfs.github.com/spec/v1", r"found '.version https://git-lfs"),
        (GOOD + GOOD + '{"question": "q", "ans', "line 3 is not valid JSON: Unterminated string"),
        (GOOD + GOOD[:-1] + ",", "line 2 is not valid JSON: Extra data"),
        (GOOD + "[1, 2]", r"line 2 must be an object with named fields; found \[1, 2\]"),
        (f"[{GOOD},]", "not valid JSON: .*line 2 column"),
        (f"[{GOOD}, 5]", "row 2 must be an object with named fields; found 5"),
        ('{"question": "q",\n"answer": }', "not valid JSON: Expecting value: line 2 column 11"),
        (GOOD + '{"question": "q", "answer": "1", "answer": "2"}', "line 2 has the key 'answer' twice in an object"),
        (f'[{GOOD}, {{"question": "q", "meta": [{{"a": 1, "a": 1}}]}}]', "row 2 has the key 'a' twice in an object"),
        (GOOD + r'{"question": "q \ud83d", "answer": "1"}', r"line 2 has half of a surrogate pair, .* in 'q .ud83d'"),
        (GOOD + r'{"question": "q", "answer": "1", "\udc00": 1}', "line 2 has half of a surrogate pair"),
        (GOOD.encode() + b'{"question": "caf\xe9"}', r"line 2 has .*bytes that are not UTF-8, in 'caf.udce9'"),
        (b"question,answer\n1 + 1?,2\ncaf\xe9?,1\n", "line 3 has .*bytes that are not UTF-8, in 'caf"),
        (
            GOOD + '{"question": "q", "answer": "1", "m": ' + DEEP + "}",
            "line 2 is not valid JSON: more than 100 levels",
        ),
        (
            GOOD + '{"question": "q", "answer": "1", "m": ' + "[" * 150 + "]" * 150 + "}",
            "line 2 is not valid JSON: more than 100 levels",
        ),
        (GOOD + '{"question": "q", "answer": ' + "9" * 5000 + "}", "line 2 is not valid JSON: Exceeds the limit"),
        ("question,answer\n1 + 1?,2\n2 + 2?,4,5\n", "line 3 has 3 columns, but the header has 2"),
        ("question,answer,answer\n1 + 1?,2,2\n", "the header has the column 'answer' twice"),
        (
            'question,answer\n"1 + 1?,2\n2 + 2?,4\n',
            "the row that begins on line 2 is not valid CSV: unexpected end of data",
        ),
        (gzip.compress(LINES.encode())[:-20], "end-of-stream marker"),
        (gzip.compress(as_parquet())[:-20], "end-of-stream marker"),
        (as_parquet()[:-20], "magic bytes|footer"),
    ],
)
def test_malformed_files_are_refused_with_the_place(tmp_path, content, says):
    path = tmp_path / "q.data"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=says) as raised:
        read_problems(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_gzipped_files_of_very_large_content_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "q.gz"
    path.write_bytes(gzip.compress(GOOD.encode() + b"\n" * 100_000))
    assert len(read_problems(path)) == 1
    monkeypatch.setattr(rows, "MIN_BOMB", 50_000)
    with pytest.raises(UserError, match=r"q.gz: its content is more than 100 times as large as the gzipped file. Corr"):
        read_problems(path)


def test_a_csv_file_may_have_long_fields(tmp_path):
    (tmp_path / "q.csv").write_text("question,answer,solution\nq,1," + "x" * 200_000 + "\n")
    assert len(read_problems(tmp_path / "q.csv")[0].metadata["solution"]) == 200_000


def test_errors_list_some_field_names_and_some_rows(tmp_path):
    with pytest.raises(UserError) as raised:
        read_one(tmp_path, {f"{i}" + "c" * 1000: 1 for i in range(100)})
    assert "the fields are 0ccc" in str(raised.value) and len(str(raised.value)) < 1200
    bad = [{"question": "q", "answer": f"{i} " + "word " * 9} for i in range(50) for _ in range(2)]
    with pytest.raises(UserError, match=r"found 100 of 100 rows: line 1, line 2: no .*; and 94 more rows\. Correct"):
        read_problems(write(tmp_path / "q.jsonl", *bad))


def test_unreadable_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"could not be read from .*none.jsonl: .*No such file"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"could not be read from data/none.csv: .*No such file"):
        read_problems("data/none.csv")
    (tmp_path / "questions.jsonl").write_text("")
    with pytest.raises(UserError, match=r"question.json: No such file or directory; the folder has questions.jsonl\."):
        read_problems(tmp_path / "question.json")


@pytest.mark.parametrize(
    "written, text",
    [
        ("72", "72"),
        ("-3", "-3"),
        ("3.5", "3.5"),
        ('"72"', "72"),
        ('"x = 1"', "x = 1"),
        ("0.00001", "0.00001"),  # not 1e-05
    ],
)
def test_numeric_answers_become_text(tmp_path, written, text):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"question": "q", "answer": {written}}}\n')
    assert read_problems(path)[0].answer == text


def test_lines_end_at_newlines_only(tmp_path):
    """JSON strings may contain line and paragraph separators and NEL, at which str.splitlines would split."""
    text = "a\N{LINE SEPARATOR}b\N{PARAGRAPH SEPARATOR}c\N{NEXT LINE}d"
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": text, "answer": "1"}, ensure_ascii=False) + "\n" + GOOD, encoding="utf-8")
    assert [problem.question for problem in read_problems(path)] == [text, "q"]


def test_values_of_parquet_that_json_lacks_become_text(tmp_path):
    import datetime
    import decimal

    row = {"question": "q", "answer": decimal.Decimal("7.5"), "day": datetime.date(2026, 1, 2), "image": b"12345"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    ((place, read),) = read_rows(str(tmp_path / "q.parquet"))
    assert (place, read) == ("row 1", {"question": "q", "answer": "7.5", "day": "2026-01-02", "image": "<5 bytes>"})


def test_datasets_are_read_from_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data.select([2, 0]), "test": data}).save_to_disk(tmp_path / "splits")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text(LINES)
    answers = {name: [p.answer for p in read_problems(tmp_path / name)] for name in ("saved", "splits", "lines")}
    assert answers == {"saved": ["2", "4", "6", "8"], "splits": ["6", "2"], "lines": ["2", "4", "6", "8"]}
    assert read_problems(tmp_path / "saved")[2].id == "saved row 3"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"could not be read from .*empty: it is a folder, .* `datasets` raised"):
        read_problems(tmp_path / "empty")


def test_a_dataset_of_the_hub_is_named_with_config_and_split(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        if names[0] == "no/network":
            raise ConnectionError("Couldn't reach\n the Hub")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("openai/gsm8k", "openai/gsm8k:main", "openai/gsm8k:main:test", "openai/gsm8k::test"):
        assert read_problems(path)[0].answer == "2"
    assert asked == [
        ("openai/gsm8k", None, "train"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", None, "test"),
    ]
    with pytest.raises(
        UserError,
        match=r"no/network: there is no such file .* the package `datasets` raised ConnectionError: Couldn't reach the",
    ):
        read_problems("no/network")


def test_a_dataset_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="from owner/name: reading a dataset needs `pip install datasets`"):
        read_problems("owner/name")


def test_a_task_knows_the_digests_of_its_files(tmp_path):
    import hashlib

    (tmp_path / "q.jsonl").write_text(LINES)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "e.jsonl").write_text(GOOD)
    task = file_task(TaskSection(name="file", path=str(tmp_path / "q.jsonl"), eval_path=str(tmp_path / "folder")))
    assert task.digests == {
        str(tmp_path / "q.jsonl"): hashlib.sha256(LINES.encode()).hexdigest(),
        str(tmp_path / "folder" / "e.jsonl"): hashlib.sha256(GOOD.encode()).hexdigest(),
    }


@pytest.mark.parametrize(
    "answer", ["5", "-5.25", "9" * 20, r"\frac{1}{2}", r"-\dfrac{10}{7}", r"\tfrac{0}{21}", "(A) 133", "(J) word " * 30]
)
def test_answers_that_are_accepted_without_parsing_can_be_parsed(answer):
    assert READABLE.fullmatch(answer) and read_expected(answer)
    assert not any(READABLE.fullmatch(text) for text in ("", "9" * 300, r"\frac{1}{0}", "5 or 6", "()", "1e5.5", "x x"))


def test_sums_that_are_accepted_without_parsing_can_be_parsed():
    draw = random.Random(0)
    terms = [
        "0",
        "12",
        "3.50",
        "9" * 20,
        "x",
        "3i",
        "12z",
        r"\pi",
        r"2\pi",
        r"\sqrt{5}",
        r"7\sqrt{12}",
        r"3\frac{1}{2}",
    ]
    terms += [r"\frac{0}{9}", r"\dfrac{3}{40}", r"2\tfrac{7}{3}"]
    for _ in range(300):
        signs = [draw.choice(["", "-"]), *draw.choices(["+", " + ", "-", " - ", " -"], k=draw.randrange(5))]
        answer = "".join(sign + draw.choice(terms) for sign in signs)
        assert READABLE.fullmatch(answer) and read_expected(answer), answer
