"""Learning: from a rollout and its advantages to new parameters.

Modules, in reading order:

    advantages  how much better a completion is than the others of its group
    grpo        the mathematics of the loss: ratios, KL estimators and token weights
    packing     packs completions into rows after the prompts they share
    logprobs    log-probs and entropies without materializing full logits
    optimizer   update rules, schedules and the sharded train state
    update      the jitted update: micro-batches, gradients, one optimizer step
"""
