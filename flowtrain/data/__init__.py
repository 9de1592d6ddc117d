"""From a data set to batches: the splits, the seeded order, augmentation, data named on a command
line.

Nothing is read or downloaded before a split is asked for.
"""
