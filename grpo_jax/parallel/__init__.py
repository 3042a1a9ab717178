"""Devices and processes: the mesh, how processes join, and where compiled programs are kept.

Modules, in reading order:

    mesh         the device mesh, and helpers that shard arrays over it
    connections  ends a process when another one of the run is lost
    processes    detects and joins the processes of a multi-host run
    compilation  the persistent compilation cache
"""
