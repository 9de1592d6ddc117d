"""Training: the loop, its step, resuming, and writing the run directory.

`loop.fit` is the entry. A run that is killed goes on from its last checkpoint, on a CPU bit for
bit.
"""
