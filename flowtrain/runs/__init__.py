"""Finished and running run directories: reading them, comparing them, reports.

Reading runs no code that a configuration names; only `report.py` needs torch.
"""
