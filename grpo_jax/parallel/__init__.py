"""Devices and processes: the mesh, how processes join, and where compiled programs are kept.

Modules, in reading order:

    mesh         the device mesh, and helpers that shard arrays over it
    processes    detects and joins the processes of a multi-host run
    compilation  the persistent compilation cache
"""
