"""Operations of matrix products, counted in three ways that share nothing, so that the counts check each other.

From the architecture alone: what a program is there for, which a model-FLOP utilisation divides. One forward pass, and
twice as much for the backward pass of what is trained; nothing that is computed a second time to save memory, and of
attention only the pairs that a mask lets see each other. Padding counts as tokens: a plan takes every row to be full.

From the trace: what a program asks for before any compiler has seen it. Beside what the compiled program does, summed
over chips, this shows work that several chips do in common.

From an instruction of the compiled program, or a call of a GPU's library: what one chip does, padding and the holes of
dilations left out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.omni.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig
from mer_r1_jax.planning.hlo import Computation, Instruction

# Passes' worth of operations; of a layer whose adapters alone are trained no gradient of its weights is made. The
# adapters' own products, below a hundredth at usual ranks, are not counted.
FORWARD, ADAPTED, TRAINED = 1, 2, 3
_AUDIO_FRAMES_PER_UNIT = 100  # of a unit of two seconds, after the second convolution


def text_flops(text: TextConfig, *, prompt: int, sets: tuple[tuple[int, int], ...], scored: int) -> float:
    """Forward pass of the decoder over one packed row.

    Args:
        text: the decoder.
        prompt: tokens of the prompt.
        sets: (continuations, tokens of each); each sees the prompt and itself.
        scored: positions that are multiplied with the unembedding.
    """
    D, h = text.hidden_size, text.head_dim
    H, K = text.num_attention_heads, text.num_key_value_heads
    weights = 2 * D * h * (H + K) + 3 * D * text.intermediate_size
    tokens = prompt + sum(count * length for count, length in sets)
    products = text.num_hidden_layers * 2 * weights * tokens + 2 * D * text.vocab_size * scored
    return products + pair_flops(text, prompt=prompt, sets=sets)


def pair_flops(text: TextConfig, *, prompt: int, sets: tuple[tuple[int, int], ...]) -> float:
    """Of these, what attention does between tokens. It has no weights: adapters save nothing of its backward pass."""
    pairs = prompt * (prompt + 1) // 2 + sum(
        count * (length * prompt + length * (length + 1) // 2) for count, length in sets
    )
    return float(text.num_hidden_layers * 4 * text.num_attention_heads * text.head_dim * pairs)


def tower_flops(thinker: ThinkerConfig, shape: BatchShape) -> float:
    """Forward pass of both towers over the clips of one row."""
    total = 0.0
    if shape.vision_clips:
        total += shape.vision_clips * _vision_flops(thinker.vision, shape.frame_pairs, shape.patches)
    if shape.audio_clips:
        total += shape.audio_clips * _audio_flops(thinker.audio, shape.audio_units)
    return total


def _vision_flops(vision: VisionConfig, pairs: int, patches: int) -> float:
    d, tokens = vision.hidden_size, pairs * patches
    window = min(patches, vision.window_cells**2 * vision.merge_unit)
    full = len(vision.fullatt_block_indexes)
    seen = full * patches + (vision.depth - full) * window
    layers = vision.depth * 2 * (4 * d * d + 3 * d * vision.intermediate_size) * tokens + 4 * d * tokens * seen
    merged = vision.merge_unit * d
    merger = 2 * (merged * merged + merged * vision.out_hidden_size) * (tokens // vision.merge_unit)
    return float(2 * vision.patch_values * d * tokens + layers + merger)


def _audio_flops(audio: AudioConfig, units: int) -> float:
    d, frames = audio.d_model, units * _AUDIO_FRAMES_PER_UNIT
    convolutions = 2 * 3 * audio.num_mel_bins * d * 2 * frames + 2 * 3 * d * d * frames
    layer = 2 * (4 * d * d + 2 * d * audio.encoder_ffn_dim) * frames + 4 * d * frames * _AUDIO_FRAMES_PER_UNIT
    return float(convolutions + audio.encoder_layers * layer + 2 * d * audio.output_dim * (frames // 2))


def traced_flops(jaxpr: Any, longest_loop: int = 1) -> float:
    """Multiplications and additions of all matrix products, forward passes done again included.

    Args:
        jaxpr: of `jax.jit(...).trace(...)`, for the whole mesh.
        longest_loop: trips of a `while`, whose end depends on data.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "scan":
            total += params["length"] * traced_flops(params["jaxpr"], longest_loop)
        elif name == "while":
            total += longest_loop * traced_flops(params["body_jaxpr"], longest_loop)
        elif name == "cond":
            total += max(traced_flops(branch, longest_loop) for branch in params["branches"])
        elif fused := re.fullmatch(r"dot_product_attention_(fwd|bwd)\w*", name):
            query, key, *_ = (one.aval.shape for one in equation.invars)
            total += _fused_attention_flops(query, key, fused.group(1) == "bwd")
        elif name == "pallas_call":
            total += _kernel_flops(params, longest_loop)
        elif name == "shard_map":  # what it holds is one chip's share
            mesh = params["mesh"]
            chips = math.prod(mesh.shape[axis] for axis in params.get("manual_axes", mesh.axis_names))
            total += chips * traced_flops(params["jaxpr"], longest_loop)
        else:
            total += sum(traced_flops(inner, longest_loop) for inner in _inner(params))
    return total


def _fused_attention_flops(query_BTHh: Sequence[int], key_BSKh: Sequence[int], backward: bool) -> float:
    """Of cuDNN's attention, masked scores included: two products forward, five backward."""
    return (5 if backward else 2) * 2.0 * math.prod(query_BTHh) * key_BSKh[1]


def _kernel_flops(params: dict[str, Any], longest_loop: int) -> float:
    """What a kernel states, or else its body at every place of its grid."""
    if estimate := params.get("cost_estimate"):
        return float(estimate.flops)
    return math.prod(params["grid_mapping"].grid) * traced_flops(params["jaxpr"], longest_loop)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Programs an equation holds: those of jit, checkpoint, shard_map, custom derivatives."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if hasattr(params.get(name), "eqns") or hasattr(params.get(name), "jaxpr"):
            yield params[name]


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """Multiplications and additions of a matrix product, padding left out."""
    result = instruction.arrays[0].sizes
    left, right = (computation[name].arrays[0].sizes for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        (contracted,) = instruction.attribute(r"lhs_contracting_dims=\{([0-9,]*)\}")
        return 2.0 * math.prod(result) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    lhs, rest = instruction.attribute(r"dim_labels=(\w+)_(\w+->\w+)")
    rhs, out = rest.split("->")
    groups = {
        name: int(match.group(1)) if (match := re.search(rf"\b{name}_group_count=(\d+)", instruction.attributes)) else 1
        for name in ("feature", "batch")
    }
    outputs = result[out.index("f")] * left[lhs.index("b")] // groups["batch"]
    inputs = left[lhs.index("f")] // groups["feature"]
    pairs = 1.0
    windows = _windows(instruction, len(rhs) - 2)
    for number, window in enumerate(windows):
        size_in, size_out = left[lhs.index(str(number))], result[out.index(str(number))]
        pairs *= _valid_pairs(size_in, right[rhs.index(str(number))], size_out, window)
    return 2.0 * outputs * inputs * pairs


_FUSED_ATTENTION = re.compile(r"__cudnn\$fmha\w*?Softmax(Backward)?\"")
_GEMM = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')


def library_flops(call: Instruction, computation: Computation) -> float | None:
    """Multiplications and additions of a product that a GPU's library makes; None for a call that is no such product.

    cuBLAS names the contracted axes in its own way. A convolution of cuDNN has the attributes of an ordinary one; its
    gradients, in which input and output change places, are not counted.
    """
    if match := _GEMM.search(call.attributes):
        left = computation[call.operands[0]].arrays[0].sizes
        axes = [int(axis.strip('" ')) for axis in match.group(1).split(",") if axis]
        return 2.0 * math.prod(call.arrays[0].sizes) * math.prod(left[axis] for axis in axes)
    if fused := _FUSED_ATTENTION.search(call.attributes):
        query, key = (computation[name].arrays[0].sizes for name in call.operands[:2])
        return _fused_attention_flops(query, key, bool(fused.group(1)))
    if "__cudnn$convForward" in call.attributes or "__cudnn$convBiasActivationForward" in call.attributes:
        return product_flops(call, computation)
    return None


@dataclasses.dataclass(frozen=True)
class _Window:
    stride: int = 1
    low: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1
    reverse: int = 0


def _windows(instruction: Instruction, count: int) -> list[_Window]:
    match = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in match.group(1).split()) if match else {}
    listed = {name: value.split("x") for name, value in fields.items()}

    def number(name: str, place: int, default: int) -> int:
        return int(listed[name][place].split("_")[0]) if name in listed else default

    return [
        _Window(
            stride=number("stride", place, 1),
            low=number("pad", place, 0),
            lhs_dilate=number("lhs_dilate", place, 1),
            rhs_dilate=number("rhs_dilate", place, 1),
            reverse=number("rhs_reversal", place, 0),
        )
        for place in range(count)
    ]


def _valid_pairs(size_in: int, kernel: int, size_out: int, window: _Window) -> int:
    """Pairs of an output place and a kernel place that meet a real input, not padding or a hole of a dilation."""
    total = 0
    reach = (size_in - 1) * window.lhs_dilate
    for place in range(kernel):
        offset = (kernel - 1 - place if window.reverse else place) * window.rhs_dilate - window.low
        if window.lhs_dilate == 1:
            first = max(0, -(offset // window.stride))
            last = min(size_out - 1, (reach - offset) // window.stride)
            total += max(0, last - first + 1)
        else:
            at = [out * window.stride + offset for out in range(size_out)]
            total += sum(0 <= one <= reach and one % window.lhs_dilate == 0 for one in at)
    return total
