"""Rewards: accuracy and format of hand-written completions."""

import numpy as np
import pytest

from grpo_jax.rewards.parts import reward_parts
from grpo_jax.rewards.verify import accuracy, format, is_well_formed

RIGHT = "<think> 1 + 1 = 2 </think> <answer> 2 </answer>"


@pytest.mark.parametrize(
    "text, fine",
    [
        (RIGHT, True),
        (f" \n\t{RIGHT}\n\n ", True),  # white space at both ends
        ("<think>a</think><answer>2</answer>", True),
        ("<think>a</think>\n\n<answer>2</answer>", True),
        ("<think></think><answer>2</answer>", True),  # the content is free
        ("<think>a</think><answer></answer>", True),
        ("<think> a < b > c {x} <b>2</b> </think> <answer> nothing </answer>", True),
        ("", False),
        ("2", False),
        (f"So: {RIGHT}", False),
        (f"{RIGHT} Done.", False),
        (f"{RIGHT}<|endoftext|>", False),
        ("<think> a </think> so <answer> 2 </answer>", False),
        (f"{RIGHT} {RIGHT}", False),
        ("<think> <think> a </think> <answer> 2 </answer>", False),
        ("<think> a </think> </think> <answer> 2 </answer>", False),
        ("<think> a </think> <answer> 2 </answer> </answer>", False),
        ("<think> a </think> <answer> <answer> 2 </answer>", False),
        ("<think> a <answer> 2 </answer>", False),
        ("a </think> <answer> 2 </answer>", False),
        ("<think> a </think> <answer> 2", False),
        ("<think> a </think> 2 </answer>", False),
        ("<answer> 2 </answer> <think> a </think>", False),
        ("<think> <answer> 2 </answer> </think>", False),
        ("<think> a <answer> 2 </think> </answer>", False),
        ("</think> a <think> <answer> 2 </answer>", False),
        ("<think> a </think> </answer> 2 <answer>", False),
        ("<Think> a </Think> <Answer> 2 </Answer>", False),
        ("<think > a </think> <answer> 2 </answer>", False),
    ],
)
def test_format(text, fine):
    assert is_well_formed(text) is fine
    np.testing.assert_array_equal(format([text]), [float(fine)])


@pytest.mark.parametrize(
    "text, expected, parts",
    [
        (RIGHT, "2", (1, 1)),
        (RIGHT, "3", (0, 1)),
        ("I say <answer> 2 </answer>, no doubt", "2", (1, 0)),  # malformed and right
        ("<think> hm <answer> 2.0 </answer>", "2", (1, 0)),
        ("<think> 2 </think> <answer> 3 </answer>", "2", (0, 1)),  # thoughts are no answer
        ("<think> 2 </think> 2", "2", (0, 0)),
        ("", "2", (0, 0)),
        ("<think></think><answer></answer>", "", (0, 1)),  # an empty answer is never right
    ],
)
def test_accuracy_and_format_are_independent(text, expected, parts):
    got = reward_parts([text], [expected])
    assert (got["accuracy"][0], got["format"][0], got["total"][0]) == (*parts, sum(parts))


def test_rewards_are_columns_of_float32_and_total_is_their_sum():
    texts = [RIGHT, "<answer> 2 </answer>", RIGHT, "nothing"]
    got = reward_parts(texts, ["2", "2", "5", "2"])
    np.testing.assert_array_equal(got["accuracy"], [1, 1, 0, 0])
    np.testing.assert_array_equal(got["format"], [1, 0, 1, 0])
    np.testing.assert_array_equal(got["total"], [2, 1, 1, 0])
    assert sorted(got) == ["accuracy", "format", "total"]
    assert all(column.dtype == np.float32 and column.shape == (4,) for column in got.values())


def test_no_rows_are_columns_of_length_0():
    assert all(column.dtype == np.float32 and column.shape == (0,) for column in reward_parts([], []).values())


@pytest.mark.parametrize("answers", [[], ["2"], ["2", "2", "2"]])
def test_texts_and_answers_of_different_lengths_raise(answers):
    with pytest.raises(ValueError):
        accuracy([RIGHT, RIGHT], answers)
    with pytest.raises(ValueError):
        reward_parts([RIGHT, RIGHT], answers)
