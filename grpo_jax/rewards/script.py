"""Identifies the language of completions by their script (DeepSeek-R1, arXiv 2501.12948v1, section 2.3.2)."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from grpo_jax.rewards.verify import TAGS

# The code of each script, by the first word of the Unicode names of its letters; all other scripts have the code "o".
# With a lowercase code, a word is a run of letters; with a capital code, each letter counts as a word.
SCRIPT_CODES = {"LATIN": "l", "GREEK": "g", "CYRILLIC": "c", "ARABIC": "a", "HEBREW": "h", "DEVANAGARI": "d"}
SCRIPT_CODES |= {"HANGUL": "k", "CJK": "H", "IDEOGRAPHIC": "H", "HIRAGANA": "K", "KATAKANA": "K", "THAI": "T"}

# The codes of the scripts that each language is written in.
LANGUAGE_CODES = dict.fromkeys(("de", "en", "es", "fr", "it", "pt", "vi"), "l")
LANGUAGE_CODES |= {"ar": "a", "el": "g", "he": "h", "hi": "d", "ja": "HK", "ko": "k", "ru": "c", "th": "T", "zh": "H"}

_MARKUP = re.compile("|".join((*TAGS, r"\\(?:begin|end)\{[A-Za-z]*\*?\}", r"\\[A-Za-z]+")))
_WORD = re.compile("l{2,}|g{2,}|c+|a+|h+|d+|k+|o+|[HKT]")  # a single Latin or Greek letter is a variable


def language(texts: Sequence[str], language: str = "en") -> Float[np.ndarray, " N"]:
    r"""Returns the fraction of each text's words that are written in the script of a language, as float32.

    DeepSeek-R1 rewards the fraction of words in the target language, but does not say how the language of a word is
    identified. This function uses the script, which needs no model, over the whole text. Therefore

    - languages that share a script cannot be distinguished: German counts as English, Persian as Arabic, and Ukrainian
      as Russian;
    - Chinese characters count for both `zh` and `ja`, so Japanese text counts partly as Chinese, and Chinese text fully
      as Japanese;
    - for `ko`, only Hangul counts, not Chinese characters.

    A word is a run of letters of one script. Chinese, Japanese and Thai are written without spaces, so each of their
    letters counts as a word: "hello世界" has three words. Combining marks belong to the letter before them. Full-width
    and mathematical letters count as plain ones (NFKC). Digits, symbols, the template's tags, LaTeX commands (`\frac`)
    and single Latin or Greek letters (variables, but also "a" and "I") are not words.

    A text without words gets 0, so that neither an empty completion nor a bare formula is rewarded. The time is linear
    in the length of the text.

    Args:
        texts: The text of each completion.
        language: The two-letter code of a language, a key of `LANGUAGE_CODES`.

    Raises:
        ValueError: The language is unknown.
    """
    if language not in LANGUAGE_CODES:
        raise ValueError(f"language must be one of {', '.join(sorted(LANGUAGE_CODES))}; found {language!r}. Pass one.")
    return np.asarray([word_fraction(text, LANGUAGE_CODES[language]) for text in texts], np.float32)


def word_fraction(text: str, codes: str) -> float:
    """Returns the fraction of a text's words whose script has one of the codes, or 0 if the text has no words."""
    text = _MARKUP.sub(" ", text)
    words = _WORD.findall(text.translate({ord(char): encode_character(char) for char in set(text)}))
    return sum(word[0] in codes for word in words) / max(len(words), 1)


def encode_character(char: str) -> str:
    """Returns the script codes of a letter, "" for a combining mark or an invisible character, or a space otherwise.

    Each character is encoded by itself, because normalizing a whole text takes quadratic time if it has a long run of
    combining marks.
    """
    if not char.isalpha():
        return "" if unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf") else " "
    normal = unicodedata.normalize("NFKC", char)
    if normal != char:
        return "".join(map(encode_character, normal))
    script = re.split("[ -]", unicodedata.name(char, ""))[0]
    return "" if script == "MODIFIER" else SCRIPT_CODES.get(script, "o")  # modifier letters, such as apostrophes
