"""The command line, one file per command: it parses, calls one function, and prints its result.

Nothing here imports torch before a command runs, so that `--help` is instant.
"""
