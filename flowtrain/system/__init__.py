"""The machine and the operating system: console, devices, random numbers, memory, processes, files.

Nothing here depends on flows, data or configurations.
"""
