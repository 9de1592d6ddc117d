"""Suggestions in messages."""

from flowtrain.errors import did_you_mean


def test_did_you_mean():
    assert did_you_mean("train.lrr", ["train.lr", "seed"]) == "; did you mean train.lr?"
    assert did_you_mean("zzz", ["train.lr", "seed"]) == ""
