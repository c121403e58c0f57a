"""The audio tower: mel frames to one feature row per 40 ms.

Letters besides those of `omni.batch`: N = B * A * U audio units, t = 100 frames of a unit after the second convolution,
d tower width, f width of its feed-forward layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mer_r1_jax.kernels.attention.api import attention
from mer_r1_jax.omni.batch import FEATURES_PER_UNIT, MEL_FRAMES_PER_UNIT, AudioClips
from mer_r1_jax.omni.config import AudioConfig
from mer_r1_jax.omni.layers import (
    Embedding,
    LayerNorm,
    Linear,
    Settings,
    constrain,
    gelu,
    parameter,
    placement,
    scan_layers,
    stack_layers,
)


def sinusoids(length: int, channels: int) -> np.ndarray:
    """Whisper's position embedding, float32 [length, channels]: sines in the first half, cosines in the second.

    Rounded to float32 where torch rounds, with the exponential itself taken in float64: one unit in its last place is
    multiplied by the frame number and would show in the features.
    """
    step = np.float32(-np.log(10000) / (channels // 2 - 1))
    exponent = step * np.arange(channels // 2, dtype=np.float32)
    inverse_time = np.exp(exponent.astype(np.float64)).astype(np.float32)
    time = np.arange(length, dtype=np.float32)[:, None] * inverse_time[None]
    return np.concatenate([np.sin(time), np.cos(time)], axis=1).astype(np.float32)


class Conv(nnx.Module):
    """A width-3 convolution over time, padded by one frame on both sides, as a matrix product of shifted frames."""

    def __init__(self, size_in: int, size_out: int, axis_in: str, *, stride: int, settings: Settings, rngs: nnx.Rngs):
        self.stride, self.dtype = stride, settings.compute_dtype
        normal = jax.nn.initializers.normal(settings.initializer_range)
        self.kernel = parameter(normal, (3, size_in, size_out), ("conv", axis_in, "audio_embed"), settings, rngs)
        self.bias = parameter(jax.nn.initializers.zeros, (size_out,), ("audio_embed",), settings, rngs)

    def __call__(self, x_NFM: jax.Array) -> jax.Array:
        frames = x_NFM.shape[1]
        padded = jnp.pad(x_NFM, ((0, 0), (1, 1), (0, 0)))
        shifted_NFcM = jnp.stack([padded[:, shift : shift + frames : self.stride] for shift in range(3)], axis=2)
        y_NFd = jnp.einsum("NFcM,cMd->NFd", shifted_NFcM, self.kernel[...].astype(self.dtype))
        return y_NFd + self.bias[...].astype(self.dtype)


class Attention(nnx.Module):
    """Bidirectional attention among the frames of one unit; keys have no bias."""

    def __init__(self, config: AudioConfig, *, settings: Settings, rngs: nnx.Rngs) -> None:
        sizes = dict(d=config.d_model, H=config.encoder_attention_heads, h=config.head_dim)
        heads = ("audio_embed", "audio_heads", "head_dim")
        self.q = Linear("Ntd,dHh->NtHh", sizes, heads, bias=True, settings=settings, rngs=rngs)
        self.k = Linear("Ntd,dHh->NtHh", sizes, heads, bias=False, settings=settings, rngs=rngs)
        self.v = Linear("Ntd,dHh->NtHh", sizes, heads, bias=True, settings=settings, rngs=rngs)
        self.o = Linear("NtHh,Hhd->Ntd", sizes, heads[1:] + heads[:1], bias=True, settings=settings, rngs=rngs)

    def __call__(self, x_Ntd: jax.Array, segment_Nt: jax.Array) -> jax.Array:
        place = placement("batch", "audio_heads")
        return self.o(attention(self.q(x_Ntd), self.k(x_Ntd), self.v(x_Ntd), segment_Nt, segment_Nt, placement=place))


class MLP(nnx.Module):
    """Two projections with an exact GELU between."""

    def __init__(self, config: AudioConfig, *, settings: Settings, rngs: nnx.Rngs) -> None:
        sizes = dict(d=config.d_model, f=config.encoder_ffn_dim)
        axes = ("audio_embed", "audio_mlp")
        self.up = Linear("Ntd,df->Ntf", sizes, axes, bias=True, settings=settings, rngs=rngs)
        self.down = Linear("Ntf,fd->Ntd", sizes, axes[::-1], bias=True, settings=settings, rngs=rngs)

    def __call__(self, x_Ntd: jax.Array) -> jax.Array:
        return self.down(gelu(self.up(x_Ntd)))


class AudioLayer(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: AudioConfig, *, settings: Settings, rngs: nnx.Rngs) -> None:
        self.attn_norm = LayerNorm(config.d_model, "audio_embed", settings=settings, rngs=rngs)
        self.attn = Attention(config, settings=settings, rngs=rngs)
        self.mlp_norm = LayerNorm(config.d_model, "audio_embed", settings=settings, rngs=rngs)
        self.mlp = MLP(config, settings=settings, rngs=rngs)

    def __call__(self, x_Ntd: jax.Array, segment_Nt: jax.Array) -> jax.Array:
        with jax.named_scope("attention"):
            x_Ntd = x_Ntd + self.attn(self.attn_norm(x_Ntd), segment_Nt)
        with jax.named_scope("mlp"):
            x_Ntd = x_Ntd + self.mlp(self.mlp_norm(x_Ntd))
        return constrain(x_Ntd, ("batch", "length", None))


class AudioTower(nnx.Module):
    """Two convolutions and a transformer over 200-frame units, then pairs averaged and projected to the decoder."""

    def __init__(self, config: AudioConfig, *, settings: Settings, remat: str, rngs: nnx.Rngs) -> None:
        self.config, self.remat, self.dtype = config, remat, settings.compute_dtype
        d, D = config.d_model, config.output_dim
        self.conv1 = Conv(config.num_mel_bins, d, "mel", stride=1, settings=settings, rngs=rngs)
        # The second convolution's input axis stays whole: naming both of its wide axes "audio_embed" would collide.
        self.conv2 = Conv(d, d, "mel", stride=2, settings=settings, rngs=rngs)
        # Never used in the forward pass, but part of every released checkpoint.
        self.bos_eos = Embedding((2, D), ("bos_eos", "embed"), settings=settings, rngs=rngs)
        self.layers = stack_layers(
            lambda rngs: AudioLayer(config, settings=settings, rngs=rngs), config.encoder_layers, rngs
        )
        self.out_norm = LayerNorm(d, "audio_embed", settings=settings, rngs=rngs)
        self.proj = Linear(
            "Ntd,dD->NtD", dict(d=d, D=D), ("audio_embed", "features"), bias=True, settings=settings, rngs=rngs
        )

    @jax.named_scope("audio_tower")
    def __call__(self, clips: AudioClips) -> jax.Array:
        """Features of every clip.

        Args:
            clips: mel frames, padded per clip.

        Returns:
            feature_BARD in the compute dtype, R = U * 50 rows a clip; the first ((F - 1) // 2 + 1) // 2 of a clip of F
            frames mean something, the rest are finite.
        """
        B, A, U, F, M = clips.mel_BAUFM.shape
        if F != MEL_FRAMES_PER_UNIT or M != self.config.num_mel_bins:
            raise ValueError(
                f"mel of shape {clips.mel_BAUFM.shape}: expected units of {MEL_FRAMES_PER_UNIT} frames and "
                f"{self.config.num_mel_bins} mel bins"
            )
        frames_BAU = jnp.clip(clips.frames_BA[..., None] - F * jnp.arange(U), 0, F)
        frames_N = frames_BAU.reshape(B * A * U)
        real_NF1 = (jnp.arange(F) < frames_N[:, None])[..., None]
        segment_Nt = (jnp.arange(F // 2) < (frames_N[:, None] + 1) // 2).astype(jnp.int32)

        # Frames beyond the end are zero for both convolutions, whatever the padding holds.
        mel_NFM = jnp.where(real_NF1, clips.mel_BAUFM.reshape(B * A * U, F, M), 0.0).astype(self.dtype)
        x_NFd = jnp.where(real_NF1, gelu(self.conv1(mel_NFM)), 0.0)
        x_Ntd = gelu(self.conv2(x_NFd)) + sinusoids(F // 2, self.config.d_model).astype(self.dtype)

        x_Ntd, _ = scan_layers(self.layers, lambda layer, x, _: (layer(x, segment_Nt), None), x_Ntd, remat=self.remat)

        # Pairs never straddle units: a unit that is not the last has 100 frames, and an odd tail is dropped.
        x_Ntd = x_Ntd.reshape(B * A * U, FEATURES_PER_UNIT, 2, -1).mean(axis=2)
        return self.proj(self.out_norm(x_Ntd)).reshape(B, A, U * FEATURES_PER_UNIT, -1)
