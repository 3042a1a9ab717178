"""Text and token ids: prompts, stop strings and answers.

Modules, in reading order:

    problem      `Problem` and `Prompts`, the values that tasks and encoding produce
    notation     rewrites answers into one notation
    expressions  parses mathematical expressions
    equality     compares a parsed answer with the expected one
    answers      extracts and judges answers
    prompt       prompt templates, and the encoding of prompts
    decoding     decodes completions into text
    stops        stop strings as a transition table over tokens
    terminal     makes text of a model or a file safe to print

No module of this package imports JAX.
"""
