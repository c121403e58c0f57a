"""Measures how much of another wheel folder's vocabulary has a category on the wheels shipped here.

mer-r1 wheel-coverage --wheel_dir=DIR [--show=20]
"""

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.emotion.wheels import Wheels, load_wheels

_WHEELS = flags.DEFINE_string("wheel_dir", None, "The other wheel folder, such as the official one.", required=True)
_SHOW = flags.DEFINE_integer("show", 20, "Missing words of each kind to print.", lower_bound=0)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --wheel_dir=DIR")
    with explained():
        ours, other = load_wheels(), load_wheels(_WHEELS.value)
    kinds = {
        "wheel words": {word for words in other.wheel_words.values() for word in words},
        "base words": {word for words in other.base_words.values() for word in words},
        "listed forms": set(other.base_words),
    }
    for name, words in kinds.items():
        _report(name, sorted(words), ours)
    return 0


def _report(name: str, words: list[str], ours: Wheels) -> None:
    missing = [word for word in words if not ours.is_known(word)]
    share = 1 - len(missing) / len(words)
    screen.say(f"{name:13} {share:6.1%} of {len(words)}   missing: {', '.join(missing[: _SHOW.value]) or 'none'}")
