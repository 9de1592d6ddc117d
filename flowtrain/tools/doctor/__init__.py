"""Checks whether a model is numerically sound."""
