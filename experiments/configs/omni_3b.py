"""MER-R1's recipe on Qwen2.5-Omni-3B: as `omni_7b.py`, for the smaller model."""

import importlib.util
import pathlib


def get_config():
    """The settings of `omni_7b.py` with the 3B architecture."""
    file = pathlib.Path(__file__).with_name("omni_7b.py")
    spec = importlib.util.spec_from_file_location("omni_7b", file)
    omni_7b = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(omni_7b)
    config = omni_7b.get_config()
    config.name = "omni_3b"
    config.model.preset = "3b"
    return config
