"""One side of `mer-r1 bench --platform=gpu`, measured in a process of its own: each side fills most of a card's memory.

    python -m mer_r1_jax.peers.one_side ours|theirs SIZE REPEATS FOLDER

writes FOLDER/SIDE.json, anew after every figure, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from mer_r1_jax import screen
from mer_r1_jax.storage import atomic_files

SIDES = ("ours", "theirs")
ANYWHERE = "tiny"  # the one size that a CPU may try the command out with
_FEW = 8  # tokens of the sampling whose time is taken off, so that prefill does not count as decoding
_GIB = 2**30


class Figures:
    """What has been measured so far; kept on disk and said on the screen."""

    def __init__(self, path: pathlib.Path):
        self._path, self._start = path, time.perf_counter()
        self.values: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        """Keeps a figure."""
        self.values[name] = value
        atomic_files.write_json(self._path, self.values)
        screen.say(f"[{time.perf_counter() - self._start:6.1f} s] {self._path.stem}: {name} = {value}")


def measure_ours(figures: Figures, size_name: str, repeats: int, folder: pathlib.Path) -> Any:
    """Measures whole steps of ours with their parts, tokens decoded, memory, and the operations of an update.

    Args:
        figures: is given device, prompt_tokens, tokens_in_loss, update_flops and peak_flops (operations,
            and operations a second), first_step and steps (seconds by part), metrics, memory (GiB), and decode_ms (a
            token of all completions, for each chunk after the first).
        size_name: one of `real_size.SIZES`.
        repeats: steps after the first.
        folder: for the world's few clips.

    Returns:
        The side, for whoever wants to look further (a profile).

    Raises:
        SystemExit: no card, and a size that only a card holds.
    """
    import jax

    from mer_r1_jax.parallel import set_gpu_memory
    from mer_r1_jax.peers.omni import OmniSide
    from mer_r1_jax.peers.real_size import SIZES, real_job, useful_flops
    from mer_r1_jax.training.device_metrics import PEAK_FLOPS, memory_metrics

    set_gpu_memory()
    device = jax.devices()[0]
    require_card(size_name, device.platform)
    figures.add("device", f"{device.device_kind}, jax {jax.__version__}")
    job = real_job(SIZES[size_name], folder, devices=[device])
    figures.add("prompt_tokens", [len(prompt.ids) for prompt in job.prompts])
    figures.add("tokens_in_loss", job.tokens)
    figures.add("update_flops", useful_flops(job))
    figures.add("peak_flops", PEAK_FLOPS.get(device.device_kind, 0.0))
    side = OmniSide(job)
    figures.add("memory_ready", memory_metrics([device]))
    laps = []
    for number in range(1 + repeats):
        laps.append(side.step())
        figures.add("first_step" if number == 0 else "steps", laps[0] if number == 0 else laps[1:])
        figures.add("metrics", side.metrics)
    figures.add("memory", memory_metrics([device]))
    # What is sampled is shown after every chunk, of which all but the first are decoding alone.
    marks: list[float] = []

    def mark(sampled: Any) -> None:
        jax.block_until_ready(sampled)
        marks.append(time.perf_counter())

    for _ in range(2):
        marks.clear()
        start = time.perf_counter()
        jax.block_until_ready(side.sampled(mark))
    tokens = job.setup.config.rl.decode_chunk
    figures.add("encode_cast_prefill_and_first_chunk_s", marks[0] - start if marks else None)
    figures.add("decode_ms", [1e3 * (b - a) / tokens for a, b in zip(marks, marks[1:], strict=False)])
    return side


def measure_theirs(figures: Figures, size_name: str, repeats: int, folder: pathlib.Path) -> None:
    """Measures the same of the torch loop: encode_s, update_of_a_part, sample_few_s, steps as `measure_ours` has them.

    Raises:
        SystemExit: as there.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers

    from mer_r1_jax.peers.omni_torch import OmniPeer, random_thinker
    from mer_r1_jax.peers.real_size import SIZES, real_job

    size = SIZES[size_name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_card(size_name, "gpu" if device.type == "cuda" else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    figures.add("device", f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, sdpa")
    job = real_job(size, folder)
    torch.manual_seed(0)
    policy, reference = (random_thinker(job, getattr(torch, size.dtype), device) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    peer = OmniPeer(job, policy, reference, size.torch_rows)

    def seconds(work: Callable[[], Any]) -> float:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - start

    warmed_up(peer, figures, seconds)
    steps = []
    for _ in range(repeats):
        steps.append(peer.step())
        figures.add("steps", steps)
        figures.add("metrics", peer.metrics)
        few, tokens = figures.values["sample_few_s"], size.completion - _FEW
        figures.add("decode_ms", [1e3 * (one["sample"] - few) / tokens for one in steps])
        if device.type == "cuda":
            figures.add("memory", {"perf/peak_memory_gib": torch.cuda.max_memory_allocated() / _GIB})


def require_card(size_name: str, platform: str) -> None:
    """Ends the process where there is no card for a size that takes one: a CPU would fill its memory and never end."""
    if platform != "gpu" and size_name != ANYWHERE:
        raise SystemExit(
            f"error: got a {platform} for --size={size_name}, expected a GPU; install jax's or torch's CUDA build, "
            f"look at nvidia-smi and JAX_PLATFORMS, or try the command out with --size={ANYWHERE}"
        )


def warmed_up(peer: Any, figures: Figures, seconds: Callable[[Callable[[], Any]], float]) -> None:
    """Runs parts of the torch step once for its libraries to be ready, and adds the seconds of their second calls."""
    import torch

    whole, parts = peer.rows(), peer.parts()
    with torch.no_grad():
        figures.add("first_encode_s", seconds(lambda: [peer.encode(part.rows) for part in parts]))
        figures.add("encode_s", seconds(lambda: [peer.encode(part.rows) for part in parts]))
    figures.add("update_of_a_part", update_of_a_part(peer, parts[0], seconds))
    figures.add("first_sample_few_s", seconds(lambda: peer.sampled_ids(whole, _FEW)))
    figures.add("sample_few_s", seconds(lambda: peer.sampled_ids(whole, _FEW)))


def update_of_a_part(peer: Any, part: Any, seconds: Callable[[Callable[[], Any]], float]) -> dict[str, Any]:
    """Seconds of one micro-batch's forward pass (with and without gradient) and of its backward pass."""
    import torch

    advantage = torch.ones(part.at.stop - part.at.start)[: len(part.rows["input_ids"])]
    with torch.no_grad():
        reference = peer.logprobs(part)
        without = seconds(lambda: peer.logprobs(part))
    peer.policy.train(True)
    losses: list[Any] = []

    def forward() -> None:
        losses.append(peer.loss(part, advantage, reference)[0])

    def backward() -> None:
        losses.pop().backward()

    figures: dict[str, Any] = {"forward_without_gradient_s": without}
    for name in ("first", "second"):
        figures[f"{name}_forward_s"], figures[f"{name}_backward_s"] = seconds(forward), seconds(backward)
    for weight in peer.policy.parameters():
        weight.grad = None
    peer.policy.eval()
    return figures


def synchronize(device: Any) -> None:
    """Waits for the card."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    side, size_name, repeats, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), pathlib.Path(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    measure = {"ours": measure_ours, "theirs": measure_theirs}[side]
    measure(Figures(folder / f"{side}.json"), size_name, repeats, folder / side)
