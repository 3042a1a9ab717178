"""The report of one or more runs: a single HTML page that needs neither a network nor this package.

Modules, in reading order:

    runs         reads the files of a workdir, whose run may still be training
    curves       reduces metrics to curves of a size that a browser draws quickly
    samples      chooses recorded completions within a budget of bytes, and compares evaluations
    summary      describes a run: in a sentence, its key numbers, where its time goes, how its config differs
    utilization  estimates the model FLOPs utilization of a run
    page         puts the data, page.html, page.css and the scripts into one file
"""
