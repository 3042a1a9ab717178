"""Text and token ids: prompts, stop strings and answers.

Modules, in reading order:

    problem      `Problem` and `Prompts`, the values that tasks and encoding produce
    notation     rewrites an answer in one notation
    expressions  parses mathematical expressions
    equality     compares a parsed answer with the expected one
    answers      extracts and judges answers
    prompt       R1-Zero's template, encoding of prompts
    decoding     turns the tokens of completions into text
    stops        stop strings as a transition table over tokens

No module of this package imports JAX.
"""
