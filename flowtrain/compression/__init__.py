"""Lossless archives of images, coded with a flow (local bits-back coding in whole numbers).

`compress.py` and `decompress.py` are the entries; `format.py` is the file, `codec.py` the exact
map.
"""
