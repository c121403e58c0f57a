"""Measures how much of another wheel folder's vocabulary has a category on the wheels shipped here.

python -m tools.wheels.coverage DIR [--show=20]
"""

from __future__ import annotations

import argparse

from mer_r1_jax.emotion.wheels import load_wheels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel_dir", help="the other wheel folder, such as the official one")
    parser.add_argument("--show", type=int, default=20, help="missing words of each kind to print")
    arguments = parser.parse_args()
    ours, other = load_wheels(), load_wheels(arguments.wheel_dir)
    kinds = {
        "wheel words": {word for words in other.wheel_words.values() for word in words},
        "base words": {word for words in other.base_words.values() for word in words},
        "listed forms": set(other.base_words),
    }
    for name, words in kinds.items():
        missing = sorted(word for word in words if not ours.is_known(word))
        share = 1 - len(missing) / len(words)
        shown = ", ".join(missing[: arguments.show]) or "none"
        print(f"{name:13} {share:6.1%} of {len(words)}   missing: {shown}")


if __name__ == "__main__":
    main()
