"""Evaluation of a trained flow: likelihoods, and a look at its layers.

`score.py` gives the likelihood of every image. Everything is computed in float32 or wider.
"""
