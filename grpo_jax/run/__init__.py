"""Runs: training, evaluation, generation and export, with their checkpoints and logs.

Modules, in reading order:

    slowness          notices when a phase takes far longer than usual
    progress          shows what a process is doing
    lock              lets one job at a time use a workdir
    digests           digests of arrays, which tell whether a single bit has changed
    arrays            reads the arrays of a checkpoint and compares them with their digests
    checkpoint        restores checkpoints, and passes over those that are not sound
    saving            saves checkpoints, reads them back, and deletes old ones
    disk              notices that the disk is full, read-only or failing
    context           builds what a run needs from its config: model, tokenizer, mesh, rollout plan
    prompt_limit      the longest prompt of a run, and the problems that exceed it
    derivation        the inputs and results of deriving config keys
    derive_memory     derives precision, mesh and micro-batch
    derive            derives the keys that are not set from the model, the problems and the machine
    state             everything that changes while a run trains, and where it comes from
    metrics           metrics.jsonl, samples/ and the lines of the console
    sinks             writes metrics and completions to files, TensorBoard and trackers
    preparation       checks a run's config and inputs, and builds its context
    rollout_progress  reports the progress of a rollout
    drawn             keeps the completions that a stopped run had drawn of its next rollout
    preemption        decides at the safe points of a run whether it stops there
    stages            the stages of a rollout, from prompts to experience
    diagnosis         detects when something is wrong with a run, and says what to try
    console           reports on a run while it trains
    evaluation        evaluates a policy on held-out problems
    policy            loads the policy of a run for the entry points that read it
    generation        streams one completion of a policy
    redraw            draws a recorded completion again
    export            writes a policy as a Hugging Face folder
    dry_run           shows what a run would do, without writing anything
    train             the training loop
"""
