"""Data sets, one module each: `data.name: mnist` is `flowtrain.datasets.mnist`.

A module's `build(root, split, *, seed=0, **options) -> Images` describes one split ("train" or
"test") without reading a pixel or downloading anything, so that an impossible geometry is found
first; `Images.read()` then fetches the pixels. Its keyword options are the schema of
`data.<option>`, and `seed` fixes the test split of a source that has none of its own.
"""
