"""Samples of a flow, and the picture files of samples and paths.

Pictures are uint8 `(3, H, W)`; `lossless.py` has the ordinary lossless formats of single images.
"""
