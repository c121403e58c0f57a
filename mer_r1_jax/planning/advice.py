"""What a plan advises where a program does not fit, and where the compiler refuses it.

Of the one it says what is too big, by how much, and which settings make it smaller; of the other what the compiler's
message means, and what gets around it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.planning.chips import GIB, MOST_GPUS, Chip
from mer_r1_jax.planning.compilation import TRITON
from mer_r1_jax.planning.sheet import ProgramSheet
from mer_r1_jax.planning.workload import ANSWERING
from mer_r1_jax.training.backbone import Backbone


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A kind of message with which a compiler refuses a program.

    Attributes:
        pattern: of its text, upper and lower case alike.
        reason: what it means.
        cures: what to try, the likeliest first; () where the settings that save memory are the cure.
    """

    pattern: str
    reason: str
    cures: tuple[str, ...] = ()


# The first one that matches counts: what is special comes before what is general.
REFUSALS = (
    Refusal(
        r"scoped vmem|memory space vmem",
        "a kernel or fusion needs more vector memory than it is given",
        (
            "LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=65536, four times what the compiler gives by itself",
            "a shorter data.max_prompt_length or a smaller rl.num_generations, which make a chip's rows shorter",
        ),
    ),
    Refusal(
        r"mosaic",
        "a Pallas kernel cannot be built for this chip at these shapes",
        (
            "data.prompt_buckets and rl.max_completion_length that are multiples of 128",
            "another mesh.tensor, which cuts its heads otherwise",
        ),
    ),
    Refusal(
        r"ptxas|nvlink|libdevice|ptx compilation",
        "a tool of CUDA that the compiler calls is missing or too old on this machine",
        ("pip install 'nvidia-cuda-nvcc>=13'", "the versions of jax and its CUDA plugin that setup.cfg names"),
    ),
    Refusal(
        r"cudnn",
        "cuDNN is not on this machine, or not in a version that this jax takes",
        ("pip install 'nvidia-cudnn-cu13>=9.12'", "model.compute_dtype=float32, which does not use its attention"),
    ),
    Refusal(
        TRITON,
        "no kernel of Triton's fits one of its products or fusions, and cuBLAS in their place did not help",
        (
            "an even rl.prompts_per_step and a data.max_prompt_length that is a multiple of 128",
            "another model.remat, which fuses other operations",
        ),
    ),
    Refusal(
        r"resource_exhausted|out of memory|exceeded hbm|larger than the available memory",
        "it takes more memory than the chip has",
    ),
    Refusal(
        r"shard|partition|replica",
        "its arrays cannot be cut over the mesh like this",
        ("mesh.tensor=1, mesh.decode_tensor=1, mesh.fsdp=-1, which cut parameters alone", "mesh.data=-1, mesh.fsdp=1"),
    ),
)
STATE = "state"  # in place of a program's name: parameters, optimizer and reference
UNKNOWN = Refusal(
    "",
    "in words this package does not know, so the fault may be the compiler's or ours",
    (
        "another model.remat or mesh.tensor, which make another program",
        "the versions that requirements.txt names",
        "XLA_FLAGS=--xla_dump_to=DIR, whose files belong to a report of the fault",
    ),
)


class Place(NamedTuple):
    """What a run is laid out on.

    Attributes:
        gpu: whether its devices are GPUs.
        devices: how many there are.
        tensor, decode_tensor: devices along these axes of the mesh.
        key_heads: of the model; so many devices can share the heads at most, by both axes together.
    """

    gpu: bool
    devices: int
    tensor: int
    decode_tensor: int
    key_heads: int

    @classmethod
    def of(cls, backbone: Backbone, gpu: bool) -> Place:
        """That of a model."""
        mesh = backbone.mesh
        tensor, decode_tensor = (mesh.shape.get(axis, 1) for axis in ("tensor", "decode_tensor"))
        return cls(gpu, mesh.size, tensor, decode_tensor, backbone.config.text.num_key_value_heads)

    @property
    def most(self) -> int:
        """Devices that can share the heads."""
        return min(self.devices, self.key_heads)


def refusal_of(message: str) -> Refusal:
    """What a compiler's message means; UNKNOWN where nothing is like it."""
    return next((one for one in REFUSALS if re.search(one.pattern, message, re.IGNORECASE)), UNKNOWN)


def advise(config: RunConfig, programs: Sequence[ProgramSheet], chip: Chip, place: Place) -> tuple[str, ...]:
    """One line for each program that does not fit: what is wrong, by how much, and what would mend it."""
    return tuple(_line(config, program, chip, place) for program in programs if not program.fits)


def _line(config: RunConfig, program: ProgramSheet, chip: Chip, place: Place) -> str:
    cures = cures_of(config, program.phase, program.name, program.held, place)
    if program.error and not program.over:
        refusal = refusal_of(program.error)
        said = program.error.rstrip(".")
        return (
            f"{program.name}: the compiler refuses it: {refusal.reason}. {tried(refusal.cures or cures)}. "
            f"It says: {said}"
        )
    held = sum(program.held.values())
    over, hbm = program.over / GIB, program.hbm / GIB
    if program.error:
        # The compiler counts the program's own arguments; what is held besides them comes on top.
        size = f"{program.name}: more than {hbm:.1f} GiB, {over:.2f} GiB or more too many"
        cause = f"{held / GIB:.2f} GiB are held ({largest(program.held)}), the rest is temporary"
    else:
        size = f"{program.name}: {program.total / GIB:.2f} GiB of {hbm:.1f} GiB, {over:.2f} GiB too many"
        cause = f"largest: {largest({**program.held, 'cache': program.cache, 'temp': program.temp})}"
    return f"{size}; {cause}. {tried(cures)}"


def tried(cures: Sequence[str]) -> str:
    """What to try, as a sentence without its full stop."""
    return "Try " + "; or ".join(cures)


def largest(parts: Mapping[str, int], count: int = 3) -> str:
    """The largest parts of a memory, GiB each."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in ordered)


def cures_of(config: RunConfig, phase: str, name: str, held: Mapping[str, int], place: Place) -> list[str]:
    """Settings that would make up for too much memory, those that change nothing else first.

    Args:
        config: the configuration.
        phase, name: of the program that does not fit; `STATE` where the phase's state alone does not.
        held: bytes a chip that live while it runs, by part.
        place: what it is laid out on.
    """
    if phase == ANSWERING:
        return _answering_cures(config, place)
    section, cures = getattr(config, phase), []
    if config.mesh.data > 1:
        cures.append(f"mesh.fsdp={config.mesh.data * max(config.mesh.fsdp, 1)} and mesh.data=1, which cut what is held")
    if place.gpu and config.model.packed_rows and name in ("sft_step", "score", "reference", "update"):
        cures.append("model.packed_rows=False, as without a TPU's kernel a packed row scores every token against all")
    rows = section.prompts_per_step // section.gradient_accumulation_steps
    cut = place.devices // place.tensor
    trains = name in ("sft_step", "update")
    if trains and rows > cut and rows % (2 * cut) == 0:
        more = 2 * section.gradient_accumulation_steps
        cures.append(f"{phase}.gradient_accumulation_steps={more}, which about halves the temporary memory")
    if trains and config.model.remat != "nothing":
        cures.append("model.remat=nothing, which keeps nothing of a layer")
    steps = section.steps_per_generation if phase == "rl" else 1
    if not trains and name != STATE and steps > 1:
        cures.append(f"rl.steps_per_generation={steps // 2}, which makes rollouts of fewer prompts")
    if not trains and name != STATE and section.prompts_per_step > cut and section.prompts_per_step % (2 * cut) == 0:
        cures.append(f"{phase}.prompts_per_step={section.prompts_per_step // 2}, which halves the rows of a chip")
    tensor = 2 * place.tensor
    if name in ("cast", "sample", "decode"):
        if tensor * place.decode_tensor <= place.most:
            cures.append(f"mesh.decode_tensor={2 * place.decode_tensor}, which cuts the weights that decoding takes")
    elif rows <= cut and tensor <= place.most:
        fewer = place.most // tensor
        instead = f" and mesh.decode_tensor={fewer}" if place.decode_tensor > fewer else ""
        cures.append(f"mesh.tensor={tensor}{instead}, as one row a chip cannot be cut further otherwise")
    if section.optimizer.dtype == "float32":
        saved = held.get("optimizer", 0) / 2 / GIB
        cures.append(f"{phase}.optimizer.dtype=bfloat16, which saves {saved:.2f} GiB")
    own = config.model.frozen_dtype == "param_dtype"  # what is not trained is held as the rest is
    frozen = ("base", "towers")
    if (config.model.param_dtype if own else config.model.frozen_dtype) == "float32":
        saved = sum(held.get(part, 0) for part in frozen) / 2 / GIB
        if saved:
            cures.append(f"model.frozen_dtype=bfloat16, which saves {saved:.2f} GiB and rounds no update")
    if config.model.param_dtype == "float32":
        parts = ("parameters", "reference", *(frozen if own else ()))
        saved = sum(held.get(part, 0) for part in parts) / 2 / GIB
        cures.append(f"model.param_dtype=bfloat16, which saves {saved:.2f} GiB and rounds every update")
    cures.append(_more(place))
    return cures


def _answering_cures(config: RunConfig, place: Place) -> list[str]:
    cures = []
    if (rows := config.eval.prompts_per_batch) > 1:
        cures.append(f"eval.prompts_per_batch={rows // 2}, which halves the rows of a batch")
    if config.model.compute_dtype == "float32":
        cures.append("model.compute_dtype=bfloat16, in which weights are kept then")
    if 2 * place.tensor * place.decode_tensor <= place.most:
        cures.append(f"mesh.tensor={2 * place.tensor}, which cuts the weights that decoding takes")
    return [*cures, _more(place)]


def _more(place: Place) -> str:
    if not place.gpu:
        return f"a larger slice: {2 * place.devices} chips halve what is held"
    if 2 * place.devices <= MOST_GPUS:
        return f"more cards: {2 * place.devices} halve what is held"
    return "cards with more memory"
