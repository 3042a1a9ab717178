"""Makes text of a model or a file safe to print."""

import re

# Control characters except tab and newline, characters that change the direction of text, and lone surrogates, which
# cannot be encoded.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Returns the text with its control characters, such as those of escape sequences, as visible escapes (`\x1b`)."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
