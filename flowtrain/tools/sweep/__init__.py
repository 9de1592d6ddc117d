"""Sweeps: settings compared at an equal budget, with errors over seeds and images."""
