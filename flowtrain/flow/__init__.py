"""The model: data made real, a bijection, a base density; together an exact likelihood or a bound.

`flow.py` adds the parts up, `dequantize.py` alone knows the number of levels, `class_prior.py` the
classes, and `variational.py` the learned noise.
"""

from flowtrain.flow.flow import Flow, initialize

__all__ = ["Flow", "initialize"]
