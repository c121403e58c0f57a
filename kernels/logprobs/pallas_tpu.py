"""Log-probabilities from hidden states as two Pallas kernels for TPU: one pass forward, one pass backward.

Neither kernel ever writes a logit to HBM. The forward kernel walks the vocabulary for a block of rows and keeps a
running maximum, sum and mean (online softmax). The backward kernel computes a tile of logits once more, from it the
tile of their gradients, and uses that tile twice: for the hidden states' gradient and for the unembedding's.

**Which sum lives where.** The backward grid walks vocabulary tiles and, inside, row blocks. A tile's gradient of the
unembedding stays in VMEM in float32 until all rows have added to it. The hidden states' gradient is visited once a
tile: its block is read from HBM, added to and written back, while the neighbouring blocks' matmuls run. It is kept as
two bfloat16 halves (the sum rounded, and what rounding lost), together 16 bits of mantissa: the first half is the
result itself, so no float32 copy of it has to exist.

**Two cores.** The chips v4 and v5p run a kernel on two TensorCores. They take alternate vocabulary tiles and walk the
same row blocks half a lap apart, so that they never work on the same block; a semaphore counts the blocks that each
has put back, and a core waits when it would overtake the other.

Shape letters: N rows, D width, V vocabulary, Z candidate sets.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mer_r1_jax.kernels.logprobs.tiles import LANES, Tiles

F32 = jnp.float32
COLUMNS = 8  # scalars a row brings into a kernel or takes out of it; HBM stores 128 lanes either way
LOWEST = -1e30  # below every logit; finite, so that differences of two of them are no NaN
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def columns_of(size: int) -> int:
    """Columns of a tile that are scored at once: a loop, so that its code stays small."""
    return next((step for step in (256, LANES) if size % step == 0), size)


def _dot(a, b, dims):
    # The matrix unit would otherwise take float32 operands rounded to bfloat16.
    precision = lax.Precision.HIGHEST if a.dtype == F32 else None
    return lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=F32, precision=precision)


def _columns(*values):
    """[rows, COLUMNS] from column vectors [rows, 1]."""
    lane = lax.broadcasted_iota(jnp.int32, (values[0].shape[0], COLUMNS), 1)
    out = jnp.zeros(lane.shape, F32)
    for number, value in enumerate(values):
        out = jnp.where(lane == number, value, out)
    return out


def _at(start, size):
    return pl.ds(pl.multiple_of(start, LANES) if size % LANES == 0 else start, size)


def _weights(w_ref, start, size, *, vocab_first):
    """Columns start .. start + size of a block of the unembedding."""
    return w_ref[_at(start, size), :] if vocab_first else w_ref[:, _at(start, size)]


def _logits(x_ref, w, *, scale, vocab_first):
    logits = _dot(x_ref[...], w, NT if vocab_first else NN)
    return logits if scale == 1.0 else logits * scale


def _before(column, V, x):
    """x where column < V, 0 behind: a ragged last block holds anything there, NaN included."""
    return jnp.where(column < V, x, jnp.zeros_like(x))


def _halves(x):
    """A float32 array as a sum of two bfloat16 ones, 16 bits of it."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(F32)).astype(jnp.bfloat16)


def _forward_kernel(x_ref, w_ref, token_ref, *refs, V, bv, step, scale, vocab_first, sets):
    if sets:
        member_ref, out_ref, set_ref, max_s, sum_s, mean_s, picked_s, set_s = refs
    else:
        out_ref, max_s, sum_s, mean_s, picked_s = refs
    # The grid is (row block, vocabulary tile): sums of a row block stay in VMEM until its last tile.
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        max_s[...] = jnp.full_like(max_s, LOWEST)
        for ref in (sum_s, mean_s, picked_s) + ((set_s,) if sets else ()):
            ref[...] = jnp.zeros_like(ref)

    def columns(number, _):
        start = number * step
        logits = _logits(
            x_ref, _weights(w_ref, start, step, vocab_first=vocab_first), scale=scale, vocab_first=vocab_first
        )
        column = lax.broadcasted_iota(jnp.int32, logits.shape, 1) + (j * bv + start)
        if V % bv:
            # p is 0 there, and so is p * logits, since LOWEST is finite.
            logits = jnp.where(column < V, logits, LOWEST)
        picked_s[...] += jnp.sum(jnp.where(column == token_ref[...], logits, 0.0), 1, keepdims=True)
        before = max_s[...]
        top = jnp.maximum(before, jnp.max(logits, 1, keepdims=True))
        decay = jnp.exp(before - top)
        p = jnp.exp(logits - top)
        sum_s[...] = decay * sum_s[...] + jnp.sum(p, 1, keepdims=True)
        mean_s[...] = decay * mean_s[...] + jnp.sum(p * logits, 1, keepdims=True)
        max_s[...] = top
        if sets:
            member = member_ref[:, _at(start, step)]
            if V % bv:
                member = _before(lax.broadcasted_iota(jnp.int32, member.shape, 1) + (j * bv + start), V, member)
            # Membership is 0 or 1, exact in bfloat16; two halves of the probability keep 16 bits of it.
            high, low = _halves(p)
            set_s[...] = decay * set_s[...] + (_dot(high, member, NT) + _dot(low, member, NT))

    lax.fori_loop(0, bv // step, columns, None)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        total = sum_s[...]
        out_ref[...] = _columns(max_s[...] + jnp.log(total), picked_s[...], mean_s[...] / total)
        if sets:
            set_ref[...] = set_s[...] / total


def forward(x_ND, w, token_N1, member_ZV, *, scale, vocab_first, tiles: Tiles, interpret=False):
    """Statistics of softmax(scale * x w), row by row.

    Args:
        x_ND: hidden states; N a multiple of tiles.rows.
        w: unembedding of the same dtype, [D, V], or [V, D] with vocab_first.
        token_N1: int32 token whose logit is wanted; outside 0..V-1 for none.
        member_ZV: bfloat16, 1 where a token is in a candidate set; None for no sets.
        scale: factor on the logits (1 / temperature).
        tiles: sizes.
        interpret: False, True or pltpu.InterpretParams, as pallas_call takes it.

    Returns:
        log of the sum of exponentials [N], the token's logit [N] (0 for none), the mean logit under the softmax [N],
        and the probability of each set [N, Z], or None.
    """
    N, D = x_ND.shape
    V = w.shape[0] if vocab_first else w.shape[1]
    bn, bv = tiles.rows, tiles.vocab
    grid = (N // bn, pl.cdiv(V, bv))
    w_spec = pl.BlockSpec((bv, D), lambda i, j: (j, 0)) if vocab_first else pl.BlockSpec((D, bv), lambda i, j: (0, j))
    in_specs = [pl.BlockSpec((bn, D), lambda i, j: (i, 0)), w_spec, pl.BlockSpec((bn, 1), lambda i, j: (i, 0))]
    out_specs = [pl.BlockSpec((bn, COLUMNS), lambda i, j: (i, 0))]
    out_shape = [jax.ShapeDtypeStruct((N, COLUMNS), F32)]
    # Maximum, sum of exponentials, sum of p * logits, and the logit of the token.
    scratch = [pltpu.VMEM((bn, 1), F32)] * 4
    arguments = [x_ND, w, token_N1]
    Z = 0
    if member_ZV is not None:
        Z = member_ZV.shape[0]
        arguments.append(member_ZV)
        in_specs.append(pl.BlockSpec((Z, bv), lambda i, j: (0, j)))
        out_specs.append(pl.BlockSpec((bn, Z), lambda i, j: (i, 0)))
        out_shape.append(jax.ShapeDtypeStruct((N, Z), F32))
        scratch.append(pltpu.VMEM((bn, Z), F32))
    out = pl.pallas_call(
        functools.partial(
            _forward_kernel, V=V, bv=bv, step=columns_of(bv), scale=scale, vocab_first=vocab_first, sets=Z > 0
        ),
        out_shape=out_shape,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * N * V * (D + 2 * Z),
            transcendentals=N * V,
            bytes_accessed=x_ND.dtype.itemsize * (N * D + grid[0] * D * V) + 2 * grid[0] * Z * V,
        ),
        interpret=interpret,
        name="logprobs_forward",
    )(*arguments)
    stats = out[0]
    return stats[:, 0], stats[:, 1], stats[:, 2], out[1] if Z else None


def _backward_kernel(x_ref, w_ref, row_ref, *refs, V, bv, R, T, step, chunk, scale, vocab_first, sets, halves, cores):
    if sets:
        member_ref, weight_ref, *refs = refs
    dx_refs, refs = refs[:halves], refs[halves:]
    dw_ref, dw_s, d_s, *refs = refs
    dx_bufs, (read_sem, write_sem, turn_sem) = refs[:halves], refs[halves:]
    core, j, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    bn, D = x_ref.shape
    lead = R // 2 if cores == 2 else 0
    # This core comes to a block `lag` steps after the other one left it (to its own, one lap later, on a single core).
    lag = jnp.where(core == 0, lead, R - lead) if cores == 2 else R
    # t counts this core's steps, T in all: R row blocks for each of its vocabulary tiles.
    t = j * R + i

    def block(step):
        at = lax.rem(step, R)
        return lax.rem(at + core * lead, R) if cores == 2 else at

    def copies(step, outward):
        # A copy is waited for by a descriptor with the same ends and semaphore as the one that started it, so that
        # both are built here. Two slots let a block arrive while the other is worked on.
        slot, at = lax.rem(step, 2), block(step)
        sem = write_sem if outward else read_sem
        for n, (ref, buf) in enumerate(zip(dx_refs, dx_bufs, strict=True)):
            in_hbm, in_vmem = ref.at[pl.ds(at * bn, bn)], buf.at[slot]
            ends = (in_vmem, in_hbm) if outward else (in_hbm, in_vmem)
            yield pltpu.make_async_copy(*ends, sem.at[slot, n])

    def pass_on():
        if cores == 2:
            pl.semaphore_signal(turn_sem, 1, core_index=1 - core)

    first_column = (j * cores + core) * bv
    row = row_ref[...]
    lse, on_token, constant, slope, token = (row[:, n : n + 1] for n in range(5))

    def tile_gradient(number, _):
        start = number * step
        logits = _logits(
            x_ref, _weights(w_ref, start, step, vocab_first=vocab_first), scale=scale, vocab_first=vocab_first
        )
        column = lax.broadcasted_iota(jnp.int32, logits.shape, 1) + (first_column + start)
        factor = constant - slope * logits
        if sets:
            member = member_ref[:, _at(start, step)]
            if V % bv:
                member = _before(lax.broadcasted_iota(jnp.int32, member.shape, 1) + (first_column + start), V, member)
            high, low = _halves(weight_ref[...])
            factor += _dot(high, member, NN) + _dot(low, member, NN)
        d = jnp.where(column == token.astype(jnp.int32), on_token, 0.0) + jnp.exp(logits - lse) * factor
        if scale != 1.0:
            d = d * scale
        if V % bv:
            d = _before(column, V, d)
        # Kept as a whole tile in the operands' dtype: dx sums over its columns and dw over its rows.
        d_s[:, _at(start, step)] = d.astype(d_s.dtype)

    lax.fori_loop(0, bv // step, tile_gradient, None)

    # The next block can be fetched once its buffer is free and the other core has put it back.
    @pl.when(t > 0)
    def _():
        for copy in copies(t - 1, True):
            copy.wait()
        pass_on()

    @pl.when((t + 1 < T) & (t + 1 >= lag))
    def _():
        if cores == 2:
            pl.semaphore_wait(turn_sem, 1)
        for copy in copies(t + 1, False):
            copy.start()

    # Started a step ago, this copy had that step's products and this step's logits to run behind.
    @pl.when(t >= lag)
    def _():
        for copy in copies(t, False):
            copy.wait()

    @pl.when(i == 0)
    def _():
        dw_s[...] = jnp.zeros_like(dw_s)

    slot, fresh = lax.rem(t, 2), t < lag

    def add(number, _):
        at = _at(number * chunk, chunk)
        w = w_ref[:, at] if vocab_first else w_ref[at, :]
        if V % bv:
            w = _before(lax.broadcasted_iota(jnp.int32, w.shape, 0 if vocab_first else 1) + first_column, V, w)
        dx = _dot(d_s[...], w, NN if vocab_first else NT)
        # The first visit of a block fetched nothing: its buffer may hold NaN, which where() drops and 0 x would not.
        dx += jnp.where(fresh, 0.0, sum(buf[slot, :, at].astype(F32) for buf in dx_bufs))
        for buf, part in zip(dx_bufs, _halves(dx) if halves == 2 else (dx,), strict=True):
            buf[slot, :, at] = part
        if vocab_first:
            dw_s[:, at] += _dot(d_s[...], x_ref[:, at], TN)
        else:
            dw_s[at, :] += _dot(x_ref[:, at], d_s[...], TN)

    lax.fori_loop(0, D // chunk, add, None)
    for copy in copies(t, True):
        copy.start()

    @pl.when(i == R - 1)
    def _():
        dw_ref[...] = dw_s[...].astype(dw_ref.dtype)

    @pl.when(t == T - 1)
    def _():
        for copy in copies(t, True):
            copy.wait()
        pass_on()
        if cores == 2:
            pl.semaphore_wait(turn_sem, lag)  # a semaphore has to be left at zero


def backward(x_ND, w, row_NC, member_ZV, weight_NZ, *, scale, vocab_first, tiles: Tiles, interpret=False):
    """Gradients of a function of the forward pass's results.

    The gradient of row n's scaled logits z is onehot(token) on_token + p (constant - slope z + weight . member) with
    p = exp(z - lse).

    Args:
        x_ND, w, member_ZV, scale, vocab_first, tiles, interpret: as `forward`; N a multiple of tiles.grad_rows, and
            at least tiles.fewest_grad_blocks times as many.
        row_NC: float32 [N, COLUMNS]: lse, on_token, constant, slope, token (a whole number), rest unused.
        weight_NZ: float32 weight of each set's tokens; None for no sets.

    Returns:
        dx_ND and dw in the dtypes of x and w; both summed in float32 (see the head of this file) over this device's
        rows and vocabulary. Sums over devices, which `one_pass` takes, are of arrays in those dtypes.
    """
    N, D = x_ND.shape
    V = w.shape[0] if vocab_first else w.shape[1]
    bn, bv, cores = tiles.grad_rows, tiles.grad_vocab, tiles.cores
    R, J = N // bn, pl.cdiv(V, bv)
    if N % bn or R < tiles.fewest_grad_blocks or J % cores or D % tiles.chunk:
        raise ValueError(f"{N} rows, width {D} and vocabulary {V} cannot be cut by {tiles}")
    halves = 2 if x_ND.dtype == jnp.bfloat16 else 1
    lead = R // 2

    def at_row(c, j, i):
        return (lax.rem(i + c * lead, R), 0)

    def at_vocab(c, j, i):
        tile = j * cores + c
        return (tile, 0) if vocab_first else (0, tile)

    w_block = (bv, D) if vocab_first else (D, bv)
    in_specs = [
        pl.BlockSpec((bn, D), at_row),
        pl.BlockSpec(w_block, at_vocab),
        pl.BlockSpec((bn, COLUMNS), at_row),
    ]
    arguments = [x_ND, w, row_NC]
    Z = 0
    if member_ZV is not None:
        Z = member_ZV.shape[0]
        arguments += [member_ZV, weight_NZ]
        in_specs += [pl.BlockSpec((Z, bv), lambda c, j, i: (0, j * cores + c)), pl.BlockSpec((bn, Z), at_row)]
    dx_shape = jax.ShapeDtypeStruct((N, D), x_ND.dtype)
    kernel = functools.partial(
        _backward_kernel,
        V=V,
        bv=bv,
        R=R,
        T=R * (J // cores),
        step=columns_of(bv),
        chunk=tiles.chunk,
        scale=scale,
        vocab_first=vocab_first,
        sets=Z > 0,
        halves=halves,
        cores=cores,
    )
    itemsize = x_ND.dtype.itemsize
    out = pl.pallas_call(
        kernel,
        out_shape=[dx_shape] * halves + [jax.ShapeDtypeStruct(w.shape, w.dtype)],
        grid=(cores, J // cores, R),
        in_specs=in_specs,
        # The pipeline only writes output blocks; dx, a sum over tiles, has to be read back too and so stays in HBM.
        out_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * halves + [pl.BlockSpec(w_block, at_vocab)],
        scratch_shapes=[
            pltpu.VMEM(w_block, F32),
            pltpu.VMEM((bn, bv), x_ND.dtype),
            *[pltpu.VMEM((2, bn, D), x_ND.dtype)] * halves,
            pltpu.SemaphoreType.DMA((2, halves)),
            pltpu.SemaphoreType.DMA((2, halves)),
            pltpu.SemaphoreType.REGULAR,
        ],
        compiler_params=pltpu.CompilerParams(
            # Both inner axes add to sums and keep their order; the outer one has a step for each core that shares them.
            dimension_semantics=("parallel" if cores == 2 else "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * N * V * (3 * D + 2 * Z),
            transcendentals=N * V,
            bytes_accessed=J * N * D * itemsize * (1 + 2 * halves) + 2 * D * V * itemsize,
        ),
        interpret=interpret,
        name="logprobs_backward",
    )(*arguments)
    return out[0], out[halves]
