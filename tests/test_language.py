"""Tests the fraction of words in a language's script against counts by hand."""

# ruff: noqa: RUF001 (letters that look alike are the subject)

import numpy as np
import pytest

from grpo_jax.config.schema import LANGUAGES
from grpo_jax.rewards import language
from grpo_jax.rewards.script import LANGUAGE_CODES

ENGLISH = "The sum is twelve"
TEXTS = {
    "de": "Die Lösung heißt fünf",
    "el": "Το άθροισμα είναι δώδεκα",
    "ru": "Сумма и есть двенадцать",
    "ar": "مَجْمُوعُهُمَا اثنا عشر",
    "he": "הַסְּכוּם הוא שתים עשרה",
    "hi": "योग बारह है और उत्तर सही",
    "ko": "합은 열둘 입니다",
    "ja": "カタカナとひらがな",
    "zh": "总和是十二",
    "th": "ผลรวมคือสิบสอง",
    "vi": "Tổng là mười hai",
}


@pytest.mark.parametrize("target", sorted(TEXTS))
def test_text_in_a_script_counts_for_its_language_and_not_for_others(target):
    latin = target in ("de", "vi")
    assert language([TEXTS[target], ENGLISH], target).tolist() == [1, latin]
    assert language([TEXTS[target]], "en").tolist() == [latin]
    assert language([TEXTS[target]], "ru").tolist() == [target == "ru"]


def test_every_language_of_the_config_has_a_script_and_english_is_the_default():
    assert sorted(LANGUAGE_CODES) == sorted(LANGUAGES)
    assert language([ENGLISH]).tolist() == [1]
    with pytest.raises(ValueError, match=r"must be one of ar, de, el, .*, zh; found 'tlh'"):
        language([], "tlh")


def test_languages_that_share_a_script_are_not_distinguished():
    for target in ("de", "en", "es", "fr", "it", "pt", "vi"):
        assert language([TEXTS["de"], TEXTS["zh"]], target).tolist() == [1, 0]


@pytest.mark.parametrize(
    "text, target, right, words",
    [
        ("hello world, привет", "en", 2, 3),
        ("hello world, привет", "ru", 1, 3),
        ("hello世界", "en", 1, 3),  # split where the script changes
        ("hello世界", "zh", 2, 3),
        ("helloпривет", "ru", 1, 2),
        ("日本語のテスト", "ja", 7, 7),  # three Chinese characters, four kana
        ("日本語のテスト", "zh", 3, 7),
        ("人々 データ", "ja", 5, 5),  # the iteration mark and the long vowel are letters
        ("서울 大學校", "ko", 1, 4),
        ("ไทย and English", "th", 3, 5),
        ("שלום and שלום", "he", 2, 3),
        ("Հայերեն ქართული not", "en", 1, 3),  # words of any other script count as words
        ("One, two; (three)-four_five... six!", "en", 6, 6),
        ("it is 12monkeys or r2d2", "en", 4, 4),  # digits end a word: monkeys is one, r and d are none
    ],
)
def test_words_are_runs_of_letters_of_one_script(text, target, right, words):
    assert language([text], target)[0] == np.float32(right / words)


@pytest.mark.parametrize(
    "text, target, right, words",
    [
        ("<think>да</think> <answer>нет</answer>", "ru", 2, 2),  # the tags are no English words
        ("да<answer>нет yes", "ru", 2, 3),  # a tag separates words
        ("<thought> да", "en", 1, 2),  # no tag of the template
        (r"\frac{a}{b} да \sqrt{x} \alpha\beta", "en", 0, 1),
        (r"да \text{yes} \mathrm{mod}", "en", 2, 3),  # only the command is left out
        (r"\begin{align*} x \end{align*} да", "en", 0, 1),
        (r"\begin{align да", "en", 1, 2),  # not an environment
        ("x + y = 2z и α·β", "ru", 1, 1),  # variables
        ("x + y = 2z и α·β", "el", 0, 1),
        ("xy да", "en", 1, 2),  # two letters are a word
        ("I am a man", "en", 2, 2),
        ("x\u0302 + e\u0301 да", "en", 0, 1),  # a letter with a mark is one letter
        ("12 ≤ 3.5 × 10² → ∑∫∞ да", "ru", 1, 1),
        ("№ ㎏ Ⅷ ™ да", "en", 0, 1),  # symbols that normalize to letters
    ],
)
def test_markup_symbols_and_variables_are_not_words(text, target, right, words):
    assert language([text], target)[0] == np.float32(right / words)


@pytest.mark.parametrize(
    "text, target, right, words",
    [
        ("Ｈｅｌｌｏ ｗｏｒｌｄ", "en", 2, 2),
        ("𝐇𝐞𝐥𝐥𝐨 да", "en", 1, 2),
        ("𝑥 + 𝛼 ∈ ℝ да", "en", 0, 1),  # mathematical letters are variables too
        ("ﾃﾞｰﾀ", "ja", 3, 3),  # half-width: te with a voiced sound mark, long vowel, ta
        ("ﬁnd да", "en", 1, 2),  # a ligature
        ("ﻣﺮﺣﺒﺎ yes", "ar", 1, 2),  # presentation forms
        ("हिन्दी में no", "hi", 2, 3),  # vowel signs and virama do not split a word
        ("क्\u200dष no no", "hi", 1, 3),  # nor does a zero-width joiner
        ("cafe\u0301 да", "en", 1, 2),
        ("п\u20ddять one two", "ru", 1, 3),  # an enclosing circle
        ("soft\u00adware да да", "en", 1, 3),
        ("п\u02bcять one two", "ru", 1, 3),  # a modifier apostrophe
        ("\ud83d \ue000 \U000e0041 да", "ru", 1, 1),  # a lone surrogate, a private and an invisible character
    ],
)
def test_letters_are_normalized_and_marks_belong_to_them(text, target, right, words):
    assert language([text], target)[0] == np.float32(right / words)


@pytest.mark.parametrize(
    "text", ["", " \n", "12 + 30 = 42", "<think></think> <answer>42</answer>", "x", "\u0301", "🙂"]
)
@pytest.mark.parametrize("target", ["en", "zh"])
def test_a_text_without_words_gets_0(text, target):
    assert language([text], target).tolist() == [0]


def test_the_result_is_float32_with_one_number_per_text():
    assert language([]).dtype == np.float32 and language([]).shape == (0,)
    fractions = language(["one два три", ENGLISH, ""])
    assert fractions.dtype == np.float32 and fractions.tolist() == [np.float32(1 / 3), 1, 0]


@pytest.mark.parametrize(
    "text, fraction",
    [
        ("hello да " * 100_000, 0.5),
        ("世x" * 200_000, 0),
        ("a" + "\u0315\u0300\u0327" * 500_000 + "b", 1),  # normalizing this as a whole would take hours
        ("<think" * 100_000, 1),
        ("\\begin{" * 100_000, 0),
        ("\\begin{" + "a" * 1_000_000, 1),
        ("<" * 1_000_000, 0),
        ("".join(map(chr, range(0x3000))), None),
    ],
    ids=["words", "mixed", "marks", "half tags", "half environments", "half environment", "brackets", "all characters"],
)
def test_long_texts_take_linear_time(text, fraction):
    """Quadratic time would take minutes to hours here."""
    (returned,) = language([text])
    assert 0 < returned < 1 if fraction is None else returned == fraction
