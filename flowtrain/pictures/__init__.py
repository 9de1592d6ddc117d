"""What a flow shows: samples, and the picture files that hold them and paths.

Pictures are uint8 `(3, H, W)`; `lossless.py` has the ordinary lossless formats of single images.
"""
