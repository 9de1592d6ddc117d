"""What a flow shows: samples, paths between images, and the picture files that hold them.

Pictures are uint8 `(3, H, W)`; `lossless.py` has the ordinary lossless formats of single images.
"""
