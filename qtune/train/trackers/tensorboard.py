"""TensorBoard, whose event files lie in the run folder."""

from qtune.train.trackers import Tracker

TRACKER = Tracker(name="tensorboard", package="tensorboard", order=1)
