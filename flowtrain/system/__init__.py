"""The machine and the operating system: console, devices, random numbers, memory, processes, files.

Nothing here knows about flows, data or configurations.
"""
