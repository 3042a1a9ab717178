"""Learning: from a rollout and its advantages to new parameters.

Modules, in reading order:

    advantages  turns rewards into advantages
    grpo        the loss: ratios, KL estimators and token weights
    packing     packs completions into rows after the prompts they share
    logprobs    log-probs and entropies without materializing full logits
    optimizer   update rules, schedules and the sharded train state
    update      the jitted update: micro-batches, gradients, one optimizer step
"""
