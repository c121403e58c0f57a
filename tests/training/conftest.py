"""The parts of the small run, as fixtures."""

from support.rl_rollouts import maker, rollout  # noqa: F401
from support.small_fixtures import compiled, sft_phase, small, small_folder, trained  # noqa: F401
