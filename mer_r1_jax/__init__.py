"""MER-R1 (multimodal emotion reasoning by slow-fast thinking synergy) in JAX for Cloud TPU."""

__version__ = "0.1.0"
