"""Conditioner networks: from the kept part of a coupling, and context, to parameters.

Every last layer starts at zero, so that every coupling starts as the identity (Glow, section 3.3).
They are called through `flowtrain.bijections.precision`, and know nothing of precision themselves.
"""
