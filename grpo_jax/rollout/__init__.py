"""Sampling: completions drawn from the policy with continuous batching.

Modules, in reading order:

    draws    draws tokens from logits
    slots    the compiled decode loop and its slots
    sampler  `sample`: divides sequences among shards and resizes the KV cache
    memory   plans how many decode slots fit in device memory
"""
