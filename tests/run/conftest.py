"""The parts of the small run, as fixtures, and what a run is refused with."""

from support.refusals import refusal  # noqa: F401
from support.small_fixtures import compiled, sft_phase, small, small_folder, trained  # noqa: F401
