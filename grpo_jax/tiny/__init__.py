"""The tiny base model that the package carries (`base/`), and how it was made.

Modules, in reading order:

    corpus       the synthetic corpus and its tokenizer
    pretrain     pretrains the tiny base model

`configs/pretrain_tiny.py` is the config that made it.
"""
