"""Runs: training, evaluation, generation and export, with their checkpoints and logs.

Modules, in reading order:

    progress          shows what a process is doing
    checkpoint        saves and restores a run with Orbax
    context           builds what a run needs from its config: model, tokenizer, mesh, rollout plan
    prompt_limit      the longest prompt of a run, and the problems that exceed it
    state             everything that changes while a run trains, and where it comes from
    metrics           metrics.jsonl, samples/ and the lines of the console
    sinks             where metrics and completions go: files, TensorBoard, trackers
    rollout_progress  says how far a rollout is
    console           reports on a run while it trains
    stages            the stages of a rollout, from prompts to experience
    evaluation        evaluates a policy on held-out problems
    policy            loads the policy of a run for the entry points that read it
    generation        streams one completion of a policy
    export            writes a policy as a Hugging Face folder
    train             the training loop
"""
