"""Trackio, Hugging Face's own, on this machine."""

from qtune.train.trackers import Tracker

TRACKER = Tracker(name="trackio", package="trackio", order=3)
