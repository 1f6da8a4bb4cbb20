"""Supervised fine-tuning: the cross-entropy of every answer, a mean over trained tokens."""

from qtune.train.objectives import Objective

SFT = Objective("sft", "learns every answer", order=10)
