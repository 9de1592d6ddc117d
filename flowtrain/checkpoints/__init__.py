"""Trained models as files: the file format, the flow that a configuration describes, and loading.

A checkpoint is a safetensors file with a JSON description and a checksum over every byte. Nothing
in it runs code.
"""
