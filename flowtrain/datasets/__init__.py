"""Data sets by name: `data.name: folder` is `build` of `flowtrain.datasets.folder`. A module with
several data sets, such as MNIST and CIFAR-10, lists them in a table `BUILDS`.

`build(root, split, *, seed=0, **options) -> Images` describes one split, "train" or "test". It
reads and downloads nothing, so impossible geometry is an error at once. `Images.read()` then
fetches the pixels. The keyword options of `build` are the schema of `data.<option>`. `seed` fixes
the test split of a source without an official one.
"""
