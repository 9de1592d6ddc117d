"""Trained models as files: the format, the flow that a configuration describes, and loading both.

A file is safetensors with a JSON description and a checksum over every byte; nothing in it runs
code.
"""
