"""The parts of the small run, as fixtures."""

from support.small_fixtures import compiled, sft_phase, small, small_folder, trained  # noqa: F401
