"""What a trained flow is worth: likelihoods, the health of its layers, and outliers.

`score.py` gives the likelihood of every image; the others build on it. All is float32 or wider.
"""
