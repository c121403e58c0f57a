"""Clips, text and prompts as arrays."""

import os

# transformers, of which only tokenizers are used, would else advise to install torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
