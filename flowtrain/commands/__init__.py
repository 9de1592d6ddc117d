"""One file a command: each parses, then calls one function."""
