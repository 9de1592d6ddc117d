"""Lossless archives of images, coded with a flow (local bits-back coding in whole numbers).

`compress.py` and `decompress.py` are the entries, `format.py` is the file, and `codec.py` is the
exact map between images and bits. A new kind of layer needs a rule in `rules.py`.
"""
