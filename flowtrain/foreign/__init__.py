"""Flows of other libraries, and of the user's own code, as flows of flowtrain.

`contract.Foreign` is what a user gives: a flow, and how integers become its input. `adapters`
finds the two directions of the flow by its type, `state` its tensors and modules, `model` makes a
`Flow` of them, and `file` finds the flow in a file of the user.
"""
