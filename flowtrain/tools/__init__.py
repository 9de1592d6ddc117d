"""Tools beside the core, one folder each: a command in `command.py`, and the code that it calls.

The command line finds the folders by itself (`cli/main.py`), so the core works without them. A tool
imports the core, and no other tool but those in `tests/test_layers.py`.
"""
