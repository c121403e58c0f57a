"""How large the tiles of the TPU kernels are, from the shapes and the chip.

The forward kernel reads the unembedding once for every block of rows, so its blocks are tall. The backward kernel reads
and writes the gradient of a row block once for every vocabulary tile, so its tiles are wide. Both are as large as VMEM
allows, weighed by what a smaller or a ragged tile costs.
"""

from __future__ import annotations

import dataclasses
import itertools

LANES = 128
ROW_MULTIPLE = 16  # rows of one bfloat16 register tile
FEWEST_TOKENS = 1024  # a smaller vocabulary is not worth a kernel
MIB = 2**20
COMPILER_MIB = 2  # of VMEM, left to the compiler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What of a chip decides about tiles: VMEM of one TensorCore, and TensorCores that run one kernel together."""

    vmem_mib: int
    cores: int


# Keyed by jax's device_kind; sizes as jax.experimental.pallas.tpu.get_tpu_info gives them.
CHIPS = {
    "TPU v4": Chip(vmem_mib=16, cores=2),
    "TPU v5 lite": Chip(vmem_mib=128, cores=1),
    "TPU v5e": Chip(vmem_mib=128, cores=1),
    "TPU v5": Chip(vmem_mib=64, cores=2),
    "TPU v5p": Chip(vmem_mib=64, cores=2),
    "TPU v6 lite": Chip(vmem_mib=128, cores=1),
    "TPU v6e": Chip(vmem_mib=128, cores=1),
    "TPU7x": Chip(vmem_mib=64, cores=1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the two kernels are cut.

    Attributes:
        rows, vocab: rows and vocabulary of a forward tile.
        grad_rows, grad_vocab: the same of a backward tile.
        chunk: width D is walked in steps of this size when gradients are added up; divides D.
        cores: TensorCores that share the backward kernel (2 on v4 and v5p).
        vmem_bytes: VMEM that a kernel may use.
    """

    rows: int
    vocab: int
    grad_rows: int
    grad_vocab: int
    chunk: int
    cores: int
    vmem_bytes: int

    @property
    def fewest_grad_blocks(self) -> int:
        """Row blocks without which the backward kernel does not run: padding makes them up where rows are few."""
        # A core adds to one block of dx while the next is fetched, so that it needs two.
        return 2 * self.cores


def padded_sets(Z: int) -> int:
    """Candidate sets of the table that the kernels are given: whole tiles of 128, 0 for none."""
    return -(-Z // LANES) * LANES


def tiles_for(N: int, D: int, V: int, Z: int, itemsize: int, device_kind: str) -> Tiles | None:
    """Tiles for N rows of width D, a vocabulary (or a shard of it) of V tokens and Z candidate sets.

    Returns:
        None where the kernels do not apply: an unknown chip, a width that is no multiple of 128, a tiny vocabulary, or
        no tile that fits.
    """
    chip = CHIPS.get(device_kind)
    if chip is None or D % LANES or V < FEWEST_TOKENS:
        return None
    chunk = next(size for size in (512, 256, LANES) if D % size == 0)
    limit = (chip.vmem_mib - COMPILER_MIB) * MIB
    Z = padded_sets(Z)

    def forward_bytes(rows: int, vocab: int) -> int:
        # Blocks of x and the unembedding, two each because the pipeline fetches ahead. Then 8 columns [rows, 1], which
        # take 128 lanes of float32 in VMEM: four scratches, and token and result twice.
        blocks = 2 * itemsize * D * (rows + vocab) + rows * LANES * 4 * 8
        return blocks + rows * 256 * 4 * 4 + (2 * 2 * Z * vocab + 3 * 4 * rows * Z)

    def backward_bytes(rows: int, vocab: int) -> int:
        # Of w and of its gradient two blocks each, and between them the float32 sum.
        unembedding = D * vocab * (2 * itemsize + 4 + 2 * itemsize)
        # dx takes 4 bytes a number in each of its two slots, as two bfloat16 halves or as one float32.
        hidden = rows * D * (2 * itemsize + 2 * 4) + rows * LANES * 4 * 2
        work = rows * vocab * itemsize + rows * 256 * 4 * 3 + chunk * (rows + vocab) * 4
        return unembedding + hidden + work + (2 * 2 * Z * vocab + 2 * 4 * rows * Z)

    forward = _cheapest(forward_bytes, limit, V, 1, row_cost=128, vocab_cost=32)
    backward = _cheapest(backward_bytes, limit, V, chip.cores, row_cost=64, vocab_cost=128)
    if forward is None or backward is None:
        return None
    return Tiles(
        rows=_block(N, forward[0], chip.cores),
        vocab=forward[1],
        grad_rows=_block(N, backward[0], 2 * chip.cores),  # as fewest_grad_blocks asks, as far as rows suffice
        grad_vocab=backward[1],
        chunk=chunk,
        cores=chip.cores,
        vmem_bytes=limit,
    )


def _cheapest(bytes_of, limit: int, V: int, cores: int, *, row_cost: int, vocab_cost: int) -> tuple[int, int] | None:
    """(rows, vocab) of least cost whose tile fits: padding, and what each tile of rows or vocabulary costs besides."""
    best = None
    for rows, lanes in itertools.product((1024, 512, 256, 128, 64), range(1, 17)):
        vocab = lanes * LANES
        count = -(-V // vocab)
        # Cores that share the backward pass take alternate tiles and need the same number of them.
        if count % cores or bytes_of(rows, vocab) > limit:
            continue
        cost = count * vocab / V * (1 + row_cost / rows + vocab_cost / vocab)
        if best is None or cost < best[0]:
            best = (cost, rows, vocab)
    return best and best[1:]


def _block(N: int, most: int, fewest_blocks: int) -> int:
    """Rows of a block: at most `most`, and N cut into blocks that are nearly full.

    They are `fewest_blocks` or more, unless blocks of 16 rows are too large for that.
    """
    blocks = max(-(-N // most), fewest_blocks)
    rows = -(-N // blocks)
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
