"""Devices and processes: the mesh, and how processes join.

Modules, in reading order:

    mesh       the device mesh, and helpers that shard arrays over it
    processes  detects and joins the processes of a multi-host run
"""
