"""The command line, one file per command: parse, call one function, print its result.

Nothing here imports torch before a command runs, so that `--help` is instant.
"""
