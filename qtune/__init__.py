"""qtune: QLoRA fine-tuning on one consumer GPU."""

__version__ = "0.1.0"
