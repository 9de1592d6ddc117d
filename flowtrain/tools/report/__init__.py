"""Runs compared in a table and curves, and a page about one run."""
