"""A training run: its loop, its files and what is done with them.

Modules, in reading order:

    checkpoint  Orbax checkpoints of the policy, optimizer and reference
    context     what entry points share: model, tokenizer, mesh and memory plan
    metrics     metrics.jsonl, TensorBoard, samples/ and the console
    evaluation  evaluates a policy on held-out problems
    generation  streams a single completion
    export      writes a policy as a Hugging Face folder
    train       the training loop
"""
