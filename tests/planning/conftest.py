"""The parts of the small run, as fixtures."""

from support.small_fixtures import compiled, sft_phase, small, small_folder  # noqa: F401
