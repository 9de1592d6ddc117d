"""From a data set to batches: splits, the seeded order, augmentation, data named in a command.

Nothing is read or downloaded before a split is asked for.
"""
