"""The report of one or more runs: a single HTML page that needs neither a network nor the package.

Modules, in reading order:

    runs         reads the files of a workdir, whose run may still be going
    curves       reduces metrics to curves of a size that a browser draws quickly
    samples      chooses recorded completions within a budget of bytes, and compares evaluations
    summary      describes a run: a sentence, its key numbers, where its time goes, how its config differs
    utilization  which fraction of the devices' peak the products of a run reach
    page         puts the data, page.html, page.css and the scripts into one file
"""
