"""Conditioner networks: `net(kept, context)` maps a coupling's kept part to parameters.

Every last layer starts at zero, so that every coupling starts as the identity (Glow, section 3.3).
`flowtrain.bijections.precision` calls them: under autocast they, and nothing else, run in bf16.
"""
