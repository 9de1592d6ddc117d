"""Reading the directories of finished and running runs: comparisons and reports.

Reading never runs code that a configuration names. Only `report.py` needs torch.
"""
