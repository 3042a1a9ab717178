"""Plans: compiles a run's programs for accelerators that this machine does not have, and estimates what they take.

Modules, in reading order:

    topology   the slices and cards that programs can be compiled for
    models     architectures of the presets' models, without a download
    programs   the programs of a training run, with the arguments that training passes
    inputs     a run's config, model and meshes on devices that need not be there
    hlo        reads the text of a compiled program: computations, instructions, how often each runs
    flops      the products of a compiled program
    counts     the work of a compiled program on one device: FLOPs, bytes, collectives, copies, kernels
    needs      what a run needs by formula: memory, FLOPs, and the least bytes of decoding
    estimate   seconds and cost of a run, from what a chip can do
    remedies   settings that would make a run fit
    suggest    searches for the settings that make a run fast
    report     the report of a plan, as plain values and as text
    checks     what a plan must not show: whole gathers and sums, copies of the cache, repeated work
    compiling  compiles programs in processes of their own
    planner    makes plans: of a config, or of the settings that are expected to be the fastest
"""
