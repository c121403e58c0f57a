"""Tests on what the released model brings that a small one has not. None of them runs unless it is asked for:

.venv-test/bin/python -m pytest --lane=released -s tests/released

`-s` shows what was measured. pip fetches what they need once a run; MER_R1_TESTS_PACKAGES=FOLDER keeps it.
"""

import pytest
from support.released_tokenizer import released_tokenizer_folder

from mer_r1_jax.media.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def released_tokenizer():
    """Qwen2.5-Omni's tokenizer, as the product loads it."""
    return load_tokenizer(released_tokenizer_folder())
