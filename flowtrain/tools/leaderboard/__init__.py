"""Verified rows for the leaderboard, `docs/leaderboard.md`."""
