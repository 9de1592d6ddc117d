"""Data sets, one module each: `data.name: mnist` is `flowtrain.datasets.mnist`.

A module's `build(root, split, *, seed=0, **options) -> Images` describes one split, "train" or
"test". It reads and downloads nothing, so that an impossible geometry is found first.
`Images.read()` then fetches the pixels. The keyword options of `build` are the schema of
`data.<option>`. `seed` fixes the test split of a source that has none of its own.
"""
