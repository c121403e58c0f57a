"""What a run will take of TPU chips nobody has yet: its programs compiled by the real compiler, and their sheet.

`environment` comes first: jax looks for a TPU host the moment it is imported.
"""

from mer_r1_jax.planning import environment as environment
