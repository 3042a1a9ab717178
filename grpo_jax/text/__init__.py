"""Text and token ids: prompts, stop strings and answers. Imports no JAX.

problem  `Problem` and `Prompts`, the values that tasks and encoding produce
answers  extracts, parses and compares answers
prompt   R1-Zero's template, encoding of prompts, decoding of completions
stops    stop strings as a transition table over tokens
"""
