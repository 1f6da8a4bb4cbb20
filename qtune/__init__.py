"""qtune: QLoRA fine-tuning on one consumer GPU."""

import os
import sys

__version__ = "0.1.0"

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# With the package `kernels` installed, bitsandbytes and transformers fetch native code from the hub and run it, the
# first while it is imported. Nobody asked for that, and no setting turns it off: they are not to find the package.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
