r"""Makes a problem from a row, by the field names of known data sets.

Field names are compared in lower case with "_" for a blank, so `correct_answer` also matches `Correct Answer`. Dots
separate the names of nested fields. From each table, the first field that a row has and that is not empty is used:

    question.stem, question_stem   the original ARC, OpenBookQA
    question   GSM8K, AIME, OlympiadBench, ASDiv, SVAMP, multiple choice, reasoning-gym
    problem    MATH, MATH-500, NuminaMath, OpenR1, DeepScaleR, Big-Math, Polaris, Omni-MATH, AMC
    prompt     DAPO, verl and TRL: a text or messages
    query      AGIEval, as evaluation harnesses publish it

    reward_model.ground_truth   DAPO, verl
    final_answer                OlympiadBench: a list
    answer                      most; the last line of GSM8K's, after `####`
    solution                    MATH, NuminaMath-CoT: the last `\boxed`; TRL: the answer itself

    choices   MMLU: an answer is an index; ARC: texts and labels, `answerKey` is a label
    options   MMLU-Pro, AQuA, AGIEval (SAT, Gaokao): an answer is a letter
"""

import hashlib
import json
import math
import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from grpo_jax.config.schema import TaskSection
from grpo_jax.foreign import parse_json
from grpo_jax.text.answers import MAX_WORDS, find_boxes
from grpo_jax.text.problem import Problem, read_messages

QUESTIONS = ("question.stem", "question_stem", "question", "problem", "prompt", "query")
CONTEXTS = {"body": " ", "passage": "\n\n", "context": "\n\n"}  # fields put before the question, and the separator
ANSWERS = ("reward_model.ground_truth", "final_answer", "answer", "expected_answer", "ground_truth", "solution")
SOLUTIONS = ("solution", "rationale", "explanation")
CHOICES = ("choices", "options", "question.choices")
CHOICE_ANSWERS = ("correct_answer", "answerkey", "answer_index", "answer_idx", "correct", "label", "gold", *ANSWERS)
GPQA = ("correct_answer", "incorrect_answer_1", "incorrect_answer_2", "incorrect_answer_3")

# Tasks of reasoning-gym whose questions have several correct answers, or that have their own scores.
OWN_VERIFIERS = """
    arc_1d arc_agi binary_matrix boxnet codeio countdown cryptarithm emoji_mystery figlet_font futoshiki game_of_life
    graph_color group_anagrams intermediate_integration jugs kakurasu knight_swap manipulate_matrix mini_sudoku n_queens
    number_sorting palindrome_generation palindrome_partitioning polynomial_equations polynomial_multiplication
    pool_matrix propositional_logic puzzle24 quantum_lock rearc rotate_matrix rubiks_cube rush_hour shortest_path
    simple_integration sokoban spiral_matrix sudoku survo tower_of_hanoi word_ladder
""".split()

MAX_LISTED = 400  # characters of the field names that an error lists

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_ANSWER = ("", "proof", "notfound")  # what NuminaMath-1.5 writes where a problem has no answer

CALCULATIONS = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations, such as <<48/2=24>>

_BARE_BOX = re.compile(r"\\boxed\s+([^{}$]+)")
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
_LETTERED = re.compile(r"\s*\(?([A-Z])[).:]\s*(\S.*)", re.DOTALL)


def read_problem(row: dict[str, Any], fields: TaskSection, *, graded: bool) -> tuple[Problem, str]:
    """Makes a problem from a row.

    Args:
        row: The row.
        fields: The config's `task` section, whose `question`, `answer` and `choices` name fields or are empty.
        graded: Whether the accuracy reward compares completions with the answer. If not, the answer may be missing or
            any JSON value.

    Returns:
        (problem, phrase): The problem without its id, and a phrase that says which fields it was read from.

    Raises:
        ValueError: The row has no usable question or answer.
    """
    verifier = needed_verifier(row)
    if graded and verifier:
        raise ValueError(
            f"it needs the verifier {verifier!r}, because its question has several correct answers; accuracy must not "
            "be a reward part"
        )
    field, value = find(row, *([fields.question] if fields.question else QUESTIONS))
    require_field(field, "question", fields.question, QUESTIONS, row)
    question = value if isinstance(value, str) else read_messages(value)
    used, said = [field], [f"question from `{field}`"]
    for name, space in {} if fields.question else CONTEXTS.items():
        name, context = find(row, name)
        if isinstance(context, str) and isinstance(question, str):
            question, used, said = context + space + question, [name, *used], [f"question from `{name}` and `{field}`"]
    texts, labels, names = find_choices(row, fields.choices, question) if isinstance(question, str) else ([], [], [])
    names_of_answers = CHOICE_ANSWERS if texts else ANSWERS
    field, value = find(row, *([fields.answer] if fields.answer else names_of_answers))
    if graded or texts:
        require_field(field, "answer", fields.answer, names_of_answers, row)
    how = ""
    if texts and isinstance(question, str):
        correct = [pick_choice(named, texts, labels) for named in (value if isinstance(value, list) else [value])]
        answer = ", ".join(f"({LETTERS[index]})" for index in correct)
        answer += f" {texts[correct[0]]}" if len(correct) == 1 else ""
        question = "\n".join([question, *(f"({LETTERS[i]}) {text}" for i, text in enumerate(texts))])
        said += [f"choices from `{'`, `'.join(names)}`"]
    elif graded:
        answer, how = read_answer(value, field)
        if field.lower() == "solution" and not how and spell_names(tuple(row), ("answer",)):
            raise ValueError("no final answer: the field 'answer' is empty and `solution` has no box")
    else:
        answer = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    used += [field, *names]
    metadata = {name: value for name, value in row.items() if name not in used}
    problem = Problem(question, answer, metadata, solution=read_solution(row, value))
    return problem, ", ".join([*said, f"answer from `{field}`{how}"])


def read_solution(row: dict[str, Any], answer: Any) -> str:
    """Returns the worked solution of a row, given the value of its answer field; "" if the row has none."""
    text = answer.rpartition("####")[0] if isinstance(answer, str) else ""
    for value in (find(row, name)[1] for name in SOLUTIONS if not text.strip()):
        if isinstance(value, str) and len(value.split()) > MAX_WORDS:  # a shorter one is an answer
            text = text or value
    return " ".join(CALCULATIONS.sub("", text).split())


def find(row: dict[str, Any], *names: str) -> tuple[str, Any]:
    """Returns the first of the named fields that a row has and that is not empty, as (name, value), or ("", None)."""
    for path in spell_names(tuple(row), names):
        value = lookup(row, path)
        if value not in (None, []) and str(value).strip():
            return path, value
    return "", None


@lru_cache
def spell_names(fields: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    """Returns the names whose first part is a field of the row, in the row's own spelling."""
    spelled = spellings(fields)
    parts = [(name, "", "") if name in spelled else name.partition(".") for name in names]
    return [spelled[head] + dot + rest for head, dot, rest in parts if head in spelled]


@lru_cache(1)
def spellings(fields: tuple[str, ...]) -> dict[str, str]:
    """Returns the fields of a row by themselves and by their names in lower case with "_" for a blank."""
    return {field.strip().lower().replace(" ", "_"): field for field in fields} | {field: field for field in fields}


def lookup(value: Any, path: str) -> Any:
    """Returns the value at a dotted path of keys and list indices, or None if there is none."""
    if path in value:
        return value[path]
    for part in path.split("."):
        if isinstance(value, str) and value[:1] == "{":  # some data sets write objects as text
            value = parse_text(value)
        value = dict(enumerate(value)) if isinstance(value, list) else value
        value = value.get(int(part) if part.isdecimal() else part) if isinstance(value, dict) else None
    return value


def parse_text(text: str) -> Any:
    """Returns the value of JSON text, or the text itself if it is not JSON."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def require_field(found: str, role: str, named: str, known: tuple[str, ...], row: dict[str, Any]) -> None:
    """Raises a ValueError that lists the fields of a row if no known one was found for a role, or the named one."""
    if not found:
        nested = {name: value if isinstance(value, dict) else {"": value} for name, value in row.items()}
        names = [f"{name}.{part}".rstrip(".") for name, value in nested.items() for part in value]
        empty = [field for field in spell_names(tuple(row), known) if field in row]
        what = f"the field {empty[0]!r} is empty" if empty else f"no field is known to hold the {role}"
        what = f"the field {named!r} is missing or empty" if named else what
        raise ValueError(f"{what}; the fields are {', '.join(names[:30])[:MAX_LISTED]}")


def needed_verifier(row: dict[str, Any]) -> str:
    """Returns the name of the verifier that a row with several correct answers needs, or "" for any other row."""
    for place in ("", "reward_model.ground_truth."):
        if find(row, place + "target")[0] and find(row, place + "nums", place + "numbers")[0]:
            return "countdown"
    name = str(find(row, "metadata.source_dataset", "data_source")[1]).rpartition("/")[2]
    return name if name in OWN_VERIFIERS else ""


def find_choices(row: dict[str, Any], named: str, question: str) -> tuple[list[str], list[str], list[str]]:
    """Returns (choices, labels, fields): the choices of a row, their labels, and their fields; all empty if none."""
    columns = [find(row, name) for name in GPQA]
    if all(name for name, _ in columns) and not named:
        # The correct answer is the first column. Sorting by hashes hides that, and always gives the same order.
        texts = sorted(
            (write_choice(v) for _, v in columns), key=lambda text: hashlib.sha256((question + text).encode()).digest()
        )
        return texts, texts, [name for name, _ in columns]
    name, value = find(row, *([named] if named else CHOICES))
    names, labels = [name], []
    if isinstance(value, dict):
        labels, value = value.get("label", list(value)), value.get("text", list(value.values()))
    elif isinstance(value, list) and all(isinstance(choice, dict) for choice in value):
        labels, value = ([choice.get(name) for choice in value] for name in ("label", "text"))
    elif not name and all(row.get(letter) for letter in "ABCD"):
        names = [letter for letter in "ABCDE" if row.get(letter)]
        value = [row[letter] for letter in names]
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        if named:
            raise ValueError(f"the field {named!r} must hold 2 to {len(LETTERS)} choices; found {value!a:.40}")
        return [], [], []
    texts = [write_choice(choice) for choice in value]
    lettered = [_LETTERED.fullmatch(text) for text in texts]  # AQuA and AGIEval write "A)21" and "(A)21"
    if [match and match[1] for match in lettered] == list(LETTERS[: len(texts)]):
        texts = [match[2] for match in lettered if match]
    return texts, [str(label) for label in labels], names


def pick_choice(answer: Any, texts: list[str], labels: list[str]) -> int:
    """Returns the index of the choice that an answer names: by index, label, letter or text.

    Raises:
        ValueError: It names none, or two of them.
    """
    if isinstance(answer, int | float) and answer in range(len(texts)):
        return int(answer)
    written = write_choice(answer)
    letter = _LETTER.fullmatch(written)
    if written in labels:
        return labels.index(written)
    if letter and letter[1].upper() in LETTERS[: len(texts)]:
        return LETTERS.index(letter[1].upper())
    named = [index for index, text in enumerate(texts) if written in (text, str(index))]
    if len(named) != 1:
        raise ValueError(f"the answer must name one of the choices; found {written!a:.40}, which names {len(named)}")
    return named[0]


def write_choice(value: Any) -> str:
    """Returns a choice as text on one line, so that nothing but its content tells it from the others."""
    return " ".join(write_value(value).split())


def write_value(value: Any) -> str:
    """Returns a text or a finite number as text, without exponents; raises a ValueError for anything else."""
    if isinstance(value, bool | float | dict | list | None) and not (type(value) is float and math.isfinite(value)):
        raise ValueError(f"an answer or a choice must be a text or a number; found {value!a:.40}")
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)


def read_answer(value: Any, field: str) -> tuple[str, str]:
    r"""Returns the final answer in a field, and a phrase that says where it was found, such as " (last `\boxed`)".

    Raises:
        ValueError: There is none.
    """
    if isinstance(value, str) and value.lstrip()[:2] == '["':  # Skywork-OR1 writes lists as text
        value = parse_text(value)
    if isinstance(value, list):
        answers = [read_answer(element, field) for element in value]
        return ", ".join(answer for answer, _ in answers), answers[-1][1]
    text, how = write_value(value).strip(), ""
    boxes = find_boxes(text) or _BARE_BOX.findall(text)
    if "####" in text:
        text, how = text.rpartition("####")[2].strip(), " (after the last `####`)"
    elif boxes:
        text, how = boxes[-1].strip(), " (last `\\boxed`)"
    # A `solution` without a box that has more words is a proof rather than an answer.
    if text.lower() in NO_ANSWER or (field.lower() == "solution" and not how and len(text.split()) > MAX_WORDS):
        raise ValueError(f"no final answer in the field {field!r}{how}")
    return text, how
