"""Every test runs on the CPU with eight emulated devices, so that sharded programs are really sharded.

Those of the lane `gpu` alone run on a card."""

import atexit
import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from support.compile_flags import QUICK_COMPILES  # noqa: E402

from mer_r1_jax.planning import without_devices  # noqa: E402

EMULATED_DEVICES = 8

# Read here, since jax is told before pytest has read its options; workers of pytest-xdist are told by their parent.
_ON_A_CARD = "MER_R1_TESTS_ON_A_CARD"
if "--lane=gpu" in sys.argv or ("--lane", "gpu") in itertools.pairwise(sys.argv):
    os.environ[_ON_A_CARD] = "1"
ON_A_CARD = _ON_A_CARD in os.environ
os.environ["JAX_PLATFORMS"] = "cuda,cpu" if ON_A_CARD else "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={EMULATED_DEVICES}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What one test compiles the next one loads, also in commands of their own; none writes to the home of whoever runs it.
# Workers of pytest-xdist, whose parent came by here, have its folder.
COMPILED = "MER_R1_TESTS_COMPILED"
if COMPILED not in os.environ:
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="mer-r1-tests-compiled-")
    atexit.register(shutil.rmtree, os.environ[COMPILED], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ[COMPILED]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not ON_A_CARD:
    without_devices()  # libtpu, installed for ahead-of-time compiles, would look for a TPU host when jax is imported

# On a busy machine any example can take longer than hypothesis' 200 ms.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")


def pytest_sessionstart(session):
    """Fails the run, rather than skipping tests, when the emulated devices, or the card, are missing."""
    import jax

    if ON_A_CARD:
        if jax.devices()[0].platform != "gpu":
            raise RuntimeError(
                f"the lane gpu needs a GPU and got {jax.devices()[0]}; look at nvidia-smi, JAX_PLATFORMS"
            )
        return
    if jax.device_count() != EMULATED_DEVICES:
        raise RuntimeError(
            f"the tests need {EMULATED_DEVICES} emulated CPU devices and got {jax.device_count()}: "
            "jax was imported before tests/conftest.py set XLA_FLAGS"
        )


def pytest_make_parametrize_id(val):
    """Names bytes by their number among a test's parameters: they may hold a time or an address, and two workers that
    share the tests between them must find them under the same names."""
    return "bytes" if isinstance(val, bytes) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Makes what tests logged fit to be sent by a worker: some log half surrogates on purpose."""
    report = yield
    report.sections = [
        (name, content.encode("utf-8", "backslashreplace").decode()) for name, content in report.sections
    ]
    return report


# Markers by folder or file below tests/, so that lanes leave tests out without importing them. Single tests of other
# files carry their marker themselves, and import an oracle where they need it.
MARKED = {
    # Training runs, several processes, or many seconds.
    "slow": (
        *("run", "storage", "parallel", "mme", "speed", "training", "evaluation", "judge", "omni", "hf", "kernels"),
        *("planning", "synthetic", "test_process_pool.py", "media/test_opening.py", "media/test_pool.py"),
        *("rl/test_rollout.py", "rl/test_compaction.py", "rl/test_packing.py", "rl/test_reward_funcs.py"),
        *("rl/test_sampling.py", "rl/test_text_to_advantage.py", "rl/test_other_tokenizers.py"),
        *("lab", "data/test_prefetch.py", "emotion/test_score.py", "serving/test_page.py", "serving/test_ending.py"),
        *("media/test_clip_times.py", "media/test_clip_sound.py"),
        *("media/test_loader.py", "media/test_cache.py", "media/test_decode.py"),
    ),
    "tpu_compiler": ("planning",),
    # PyTorch, TRL or a second transformers as an oracle.
    "torch": (
        *("omni", "hf", "speed", "evaluation/test_export_cases.py", "media/test_frames.py", "media/test_mel.py"),
        *("media/test_resize.py", "media/test_vision.py", "media/test_processor_parity.py"),
        *("media/test_media_tokenizer.py",),
    ),
    # What an index of packages has of the released model, and sizes that ask for a machine's memory: never in CI.
    "released": ("released",),
    # What needs a GPU, which CI has not.
    "gpu": ("gpu",),
}


LANES = {
    "fast": "no test with a marker, with programs compiled quickly",
    "torch": "those that compare with PyTorch, with programs compiled as users' are",
    "rest": "all others, with programs compiled quickly",
    "released": "those on the released tokenizer, real clips and true sizes, whose files pip brings",
    "gpu": "those on a GPU",
}
OPT_IN = {"released", "gpu"}  # lanes that run only where somebody asks for them
# Markers that keep a test out of a lane; out of none, where everything else runs, those of lanes that are asked for.
LEFT_OUT = {None: OPT_IN, "fast": set(MARKED), "rest": {"torch"} | OPT_IN, "released": set(), "gpu": set()}


def pytest_addoption(parser):
    told = "; ".join(f"{lane}: {tests}" for lane, tests in LANES.items())
    parser.addoption("--lane", choices=LANES, help=f"{told}. Others are left out without importing them")


def pytest_configure(config):
    # Early enough: XLA reads its flags when the first device is asked for.
    if config.getoption("--lane") in ("fast", "rest"):
        os.environ["XLA_FLAGS"] += f" {QUICK_COMPILES}"


def markers_of(path: Path) -> list[str]:
    """The markers of a test file, or of a folder of them."""
    place = path.relative_to(Path(__file__).parent).as_posix()
    return [
        marker for marker, places in MARKED.items() if any(f"{place}/".startswith(f"{listed}/") for listed in places)
    ]


def pytest_ignore_collect(collection_path, config):
    markers, lane = set(markers_of(collection_path)), config.getoption("--lane")
    if lane == "torch":
        if collection_path.suffix != ".py" or "torch" in markers:
            return None
        return None if "@pytest.mark.torch" in collection_path.read_text() else True
    if lane in OPT_IN:
        return None if collection_path.suffix != ".py" or lane in markers else True
    return True if markers & LEFT_OUT[lane] else None


def pytest_collection_modifyitems(config, items):
    for item in items:
        for marker in markers_of(item.path):
            item.add_marker(marker)
    lane = config.getoption("--lane")
    left_out = LEFT_OUT.get(lane, set())
    kept, rest = [], []
    for item in items:
        markers = {marker.name for marker in item.iter_markers()}
        fits = lane in markers if lane in {"torch"} | OPT_IN else not markers & left_out
        (kept if fits else rest).append(item)
    if rest:
        config.hook.pytest_deselected(items=rest)
        items[:] = kept
