"""Latents: files of them, directions of attributes, and paths between images.

Latents are float32 `(N, D)`, as `Flow.encode` gives them. `Flow.split_latents` gives their levels.
"""
