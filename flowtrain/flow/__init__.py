"""The model: dequantization, a bijection and a base density, with a likelihood or a bound on it.

`flow.py` adds up the parts. `dequantize.py` alone computes with the number of levels, `kinds.py`
answers what depends on the kind of data, `class_prior.py` what depends on the class, and
`variational.py` the learned noise.
"""

from flowtrain.flow.flow import Flow, initialize

__all__ = ["Flow", "initialize"]
