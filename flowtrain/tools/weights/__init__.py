"""Models that other projects trained, as checkpoints of flowtrain."""
