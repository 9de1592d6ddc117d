"""Evaluation of a trained flow: likelihoods, the health of its layers, out-of-distribution tests.

`score.py` gives the likelihood of every image, which `evaluate.py` and `ood.py` build on.
Everything is computed in float32 or wider.
"""
