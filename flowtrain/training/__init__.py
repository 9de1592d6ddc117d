"""Training: the loop, its step, resuming, and what a run directory holds while it is written.

`loop.fit` is the entry. A run that is killed goes on from its last checkpoint, bit for bit on a
CPU.
"""
