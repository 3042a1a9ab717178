"""Learning: from a rollout and its advantages to new parameters.

Modules, in reading order:

    grpo       the mathematics: advantages, the KL estimator and the loss
    packing    packs completions into rows after the prompts they share
    logprobs   log-probs and entropies without materializing full logits
    optimizer  update rules, schedules and the sharded train state
    update     the jitted update: micro-batches, gradients, one optimizer step
"""
