"""What the machine and the operating system give: console, devices, memory, processes, files.

Knows nothing of flows, data or configurations.
"""
