"""The vision tower: patches of images and videos to one feature row per 2x2 patches.

Letters besides those of `omni.batch`: N = B * V * P frame pairs, d tower width, f width of its feed-forward layer,
E = e = 4 d width of a merged block, s = S / 4 merged blocks of a frame pair.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mer_r1_jax.kernels.attention.api import attention
from mer_r1_jax.omni.batch import VisionClips
from mer_r1_jax.omni.config import VisionConfig
from mer_r1_jax.omni.layers import (
    Linear,
    RMSNorm,
    Settings,
    constrain,
    gelu,
    inverse_frequencies,
    placement,
    rotate,
    scan_layers,
    stack_layers,
)


class Attention(nnx.Module):
    """Bidirectional attention within segments, positions rotated in float32."""

    def __init__(self, config: VisionConfig, *, settings: Settings, rngs: nnx.Rngs) -> None:
        sizes = dict(d=config.hidden_size, H=config.num_heads, h=config.head_dim)
        heads = ("vision_embed", "vision_heads", "head_dim")
        self.q = Linear("NSd,dHh->NSHh", sizes, heads, bias=True, settings=settings, rngs=rngs)
        self.k = Linear("NSd,dHh->NSHh", sizes, heads, bias=True, settings=settings, rngs=rngs)
        self.v = Linear("NSd,dHh->NSHh", sizes, heads, bias=True, settings=settings, rngs=rngs)
        self.o = Linear("NSHh,Hhd->NSd", sizes, heads[1:] + heads[:1], bias=True, settings=settings, rngs=rngs)

    def __call__(self, x_NSd: jax.Array, cos: jax.Array, sin: jax.Array, segment_NS: jax.Array) -> jax.Array:
        query = rotate(self.q(x_NSd).astype(jnp.float32), cos, sin).astype(x_NSd.dtype)
        key = rotate(self.k(x_NSd).astype(jnp.float32), cos, sin).astype(x_NSd.dtype)
        place = placement("batch", "vision_heads")
        return self.o(attention(query, key, self.v(x_NSd), segment_NS, segment_NS, placement=place))


class MLP(nnx.Module):
    """SwiGLU with biases."""

    def __init__(self, config: VisionConfig, *, settings: Settings, rngs: nnx.Rngs) -> None:
        sizes = dict(d=config.hidden_size, f=config.intermediate_size)
        axes = ("vision_embed", "vision_mlp")
        self.gate = Linear("NSd,df->NSf", sizes, axes, bias=True, settings=settings, rngs=rngs)
        self.up = Linear("NSd,df->NSf", sizes, axes, bias=True, settings=settings, rngs=rngs)
        self.down = Linear("NSf,fd->NSd", sizes, axes[::-1], bias=True, settings=settings, rngs=rngs)

    def __call__(self, x_NSd: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_NSd)) * self.up(x_NSd))


class VisionLayer(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: VisionConfig, *, settings: Settings, rngs: nnx.Rngs) -> None:
        norm: dict[str, Any] = dict(eps=config.rms_norm_eps, settings=settings, rngs=rngs)
        self.norm1 = RMSNorm(config.hidden_size, "vision_embed", **norm)
        self.attn = Attention(config, settings=settings, rngs=rngs)
        self.norm2 = RMSNorm(config.hidden_size, "vision_embed", **norm)
        self.mlp = MLP(config, settings=settings, rngs=rngs)

    def __call__(self, x_NSd: jax.Array, cos: jax.Array, sin: jax.Array, segment_NS: jax.Array) -> jax.Array:
        with jax.named_scope("attention"):
            x_NSd = x_NSd + self.attn(self.norm1(x_NSd), cos, sin, segment_NS)
        with jax.named_scope("mlp"):
            x_NSd = x_NSd + self.mlp(self.norm2(x_NSd))
        return constrain(x_NSd, ("batch", "length", None))


class Merger(nnx.Module):
    """Normalises patches, joins the four of a merge block and projects them to the decoder."""

    def __init__(self, config: VisionConfig, *, settings: Settings, rngs: nnx.Rngs) -> None:
        d, D = config.hidden_size, config.out_hidden_size
        self.width = config.merge_unit * d
        self.norm = RMSNorm(d, "vision_embed", eps=config.rms_norm_eps, settings=settings, rngs=rngs)
        sizes = dict(E=self.width, e=self.width, D=D)
        self.up = Linear("NsE,Ee->Nse", sizes, ("vision_embed", "merged"), bias=True, settings=settings, rngs=rngs)
        self.down = Linear("Nse,eD->NsD", sizes, ("merged", "embed"), bias=True, settings=settings, rngs=rngs)

    def __call__(self, x_NSd: jax.Array) -> jax.Array:
        x_NsE = self.norm(x_NSd).reshape(x_NSd.shape[0], -1, self.width)
        return self.down(gelu(self.up(x_NsE)))


class VisionTower(nnx.Module):
    """Patch embedding, window-attention transformer and merger, all frame pairs of the batch at once."""

    def __init__(self, config: VisionConfig, *, settings: Settings, remat: str, rngs: nnx.Rngs) -> None:
        self.config, self.remat, self.dtype = config, remat, settings.compute_dtype
        self.patch = Linear(
            "NSX,Xd->NSd",
            dict(X=config.patch_values, d=config.hidden_size),
            ("patch", "vision_embed"),
            bias=False,
            settings=settings,
            rngs=rngs,
        )
        self.layers = stack_layers(lambda rngs: VisionLayer(config, settings=settings, rngs=rngs), config.depth, rngs)
        self.merger = Merger(config, settings=settings, rngs=rngs)

    @jax.named_scope("vision_tower")
    def __call__(self, clips: VisionClips) -> jax.Array:
        """Features of every clip.

        Windows are masks instead of a permutation: a frame pair attends to itself only, so nothing has to be packed.

        Args:
            clips: patches, padded per clip.

        Returns:
            feature_BVRD in the compute dtype, R = P * S / 4 rows a clip, in the order of the clip's merge blocks; rows
            of padding are finite and mean nothing.
        """
        B, V, P, S, X = clips.patches_BVPSX.shape
        if X != self.config.patch_values or S % self.config.merge_unit:
            raise ValueError(
                f"patches of shape {clips.patches_BVPSX.shape}: expected {self.config.patch_values} values a patch and "
                f"a multiple of {self.config.merge_unit} patches a frame pair"
            )
        N = B * V * P
        real_BVPS = (jnp.arange(P)[:, None] < clips.pairs_BV[..., None, None]) & (clips.window_BVS >= 0)[:, :, None]
        real_NS = real_BVPS.reshape(N, S)
        window_NS = jnp.broadcast_to(clips.window_BVS[:, :, None], (B, V, P, S)).reshape(N, S) + 1
        # Segment 0 is padding; a full-attention layer sees one segment, the others one per window.
        whole_NS, window_NS = real_NS.astype(jnp.int32), jnp.where(real_NS, window_NS, 0)
        cos_NSh, sin_NSh = self._rotary(clips.position_BVS2, P)
        full_L = np.isin(np.arange(self.config.depth), self.config.fullatt_block_indexes)

        def step(layer: VisionLayer, x_NSd, full):
            return layer(x_NSd, cos_NSh, sin_NSh, jnp.where(full, whole_NS, window_NS)), None

        patches_NSX = clips.patches_BVPSX.reshape(N, S, X)
        x_NSd = self.patch(jnp.where(real_NS[..., None], patches_NSX, 0.0).astype(self.dtype))
        x_NSd, _ = scan_layers(self.layers, step, x_NSd, jnp.asarray(full_L), remat=self.remat)
        return self.merger(x_NSd).reshape(B, V, P * S // self.config.merge_unit, -1)

    def _rotary(self, position_BVS2: jax.Array, P: int) -> tuple[jax.Array, jax.Array]:
        """float32 cos and sin of [N, S, h / 2] angles: the row's frequencies, then the column's."""
        B, V, S, _ = position_BVS2.shape
        quarter = self.config.head_dim // 4
        frequency = inverse_frequencies(quarter, self.config.rope_theta)
        angle = (position_BVS2[..., None].astype(jnp.float32) * frequency).reshape(B, V, 1, S, 2 * quarter)
        angle_NSh = jnp.broadcast_to(angle, (B, V, P, S, 2 * quarter)).reshape(B * V * P, S, 2 * quarter)
        return jnp.cos(angle_NSh), jnp.sin(angle_NSh)
