"""Models: each module has `build(shape, **options) -> Bijection`; the signature is the schema of
its options.

`build` raises `flowtrain.errors.UserError` where the options do not fit the shape.
"""
