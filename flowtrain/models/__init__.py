"""Models, one module each: `model.name: glow` is `flowtrain.models.glow`.

A module's `build(shape, *, **options) -> Bijection` makes the flow for one example of `shape`
(C, H, W). Its keyword options, with the descriptions in its docstring, are the schema of
`model.<option>`. `build` raises `UserError` if the options do not fit the shape.
"""
