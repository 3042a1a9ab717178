"""Devices and processes: the mesh, where each parameter lives on it, and how processes join.

Modules, in reading order:

    mesh       the device mesh, the partition table, and sharding helpers
    processes  detects and joins the processes of a multi-host run
"""
