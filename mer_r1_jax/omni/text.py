"""The text decoder: grouped-query attention with a three-axis rotary embedding, whole rows and cached tokens alike.

Letters besides those of `omni.batch`: Y = h / 2 rotation angles of a head, f width of the feed-forward layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mer_r1_jax.kernels.attention.api import attention, choose, shared_prompt_attention
from mer_r1_jax.kernels.decode_attention.api import decode_attention, seen_tokens
from mer_r1_jax.kernels.logprobs.api import Partition, Scores, gather_logprobs
from mer_r1_jax.kernels.placement import device
from mer_r1_jax.omni.batch import PADDING, PROMPT, Array
from mer_r1_jax.omni.config import TextConfig
from mer_r1_jax.omni.layers import (
    Embedding,
    Linear,
    RMSNorm,
    Settings,
    active_mesh,
    constrain,
    inverse_frequencies,
    mesh_axes,
    placement,
    rotate,
    scan_layers,
    stack_layers,
)

BTD = ("batch", "length", "embed")
BTF = ("batch", "length", "mlp")
BGCD = ("batch", "group", "length", "embed")
# Rows as the feed-forward layers of completions have them: a table may cut them less, and the layers' width more.
MLP_BGCD = ("mlp_batch", "group", "length", None)
MLP_BGCF = ("mlp_batch", "group", "length", "mlp")


def one_a_layer(stacked: Array) -> tuple[Array, ...]:
    """An array [L, ...] as L arrays."""
    return tuple(jax.lax.index_in_dim(stacked, number, keepdims=False) for number in range(stacked.shape[0]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptCache:
    """Keys and values of every layer for the prompts of a batch, shared by all completions of a row.

    Attributes:
        k_LBTKh, v_LBTKh: compute dtype, keys already rotated.
        valid_BT: bool, False for padding.
    """

    k_LBTKh: Array
    v_LBTKh: Array
    valid_BT: Array

    def unstacked(self) -> PromptCache:
        """With a tuple of arrays, one a layer, in place of each stacked one."""
        return dataclasses.replace(self, k_LBTKh=one_a_layer(self.k_LBTKh), v_LBTKh=one_a_layer(self.v_LBTKh))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of every layer for the completions' own tokens, C slots each.

    Attributes:
        k_LBGCKh, v_LBGCKh: compute dtype, keys already rotated.
    """

    k_LBGCKh: Array
    v_LBGCKh: Array

    def unstacked(self) -> Cache:
        """With a tuple of arrays, one a layer, in place of each stacked one."""
        return Cache(k_LBGCKh=one_a_layer(self.k_LBGCKh), v_LBGCKh=one_a_layer(self.v_LBGCKh))

    def stacked(self) -> Cache:
        """What `unstacked` was made of, or this cache itself."""
        if not isinstance(self.k_LBGCKh, tuple):
            return self
        return Cache(k_LBGCKh=jnp.stack(self.k_LBGCKh), v_LBGCKh=jnp.stack(self.v_LBGCKh))


# (token_BG, position_BG, slot, prompt cache, cache) -> (h_BGD, the cache with the token): see `Thinker.decode`.
Decode = Callable[[Array, Array, Array, PromptCache, Cache], tuple[Array, Cache]]


class Attention(nnx.Module):
    """Projections of grouped-query attention: biases on q, k and v, none on o."""

    def __init__(self, config: TextConfig, *, settings: Settings, rngs: nnx.Rngs) -> None:
        sizes = dict(
            D=config.hidden_size, H=config.num_attention_heads, K=config.num_key_value_heads, h=config.head_dim
        )
        heads, kv_heads = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.q = Linear("...D,DHh->...Hh", sizes, heads, bias=True, settings=settings, rngs=rngs)
        self.k = Linear("...D,DKh->...Kh", sizes, kv_heads, bias=True, settings=settings, rngs=rngs)
        self.v = Linear("...D,DKh->...Kh", sizes, kv_heads, bias=True, settings=settings, rngs=rngs)
        self.o = Linear("...Hh,HhD->...D", sizes, heads[1:] + heads[:1], bias=False, settings=settings, rngs=rngs)

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [..., H, h], rotated keys and values [..., K, h] of x[..., D]."""
        return rotate(self.q(x), cos, sin), rotate(self.k(x), cos, sin), self.v(x)


class MLP(nnx.Module):
    """SwiGLU without biases."""

    def __init__(self, config: TextConfig, *, settings: Settings, rngs: nnx.Rngs) -> None:
        sizes = dict(D=config.hidden_size, f=config.intermediate_size)
        axes = ("embed", "mlp")
        self.gate = Linear("...D,Df->...f", sizes, axes, bias=False, settings=settings, rngs=rngs)
        self.up = Linear("...D,Df->...f", sizes, axes, bias=False, settings=settings, rngs=rngs)
        self.down = Linear("...f,fD->...D", sizes, axes[::-1], bias=False, settings=settings, rngs=rngs)

    def __call__(self, x: jax.Array, inner: Sequence[str]) -> jax.Array:
        """Of x[..., D]; `inner` names the axes of what lies between the two products, [..., f]."""
        return self.down(constrain(jax.nn.silu(self.gate(x)) * self.up(x), inner))


class TextLayer(nnx.Module):
    """Pre-norm attention and feed-forward; the three ways it is run differ only in what attention looks at."""

    def __init__(self, config: TextConfig, *, settings: Settings, rngs: nnx.Rngs) -> None:
        norm: dict[str, Any] = dict(eps=config.rms_norm_eps, settings=settings, rngs=rngs)
        self.attn_norm = RMSNorm(config.hidden_size, "embed", **norm)
        self.attn = Attention(config, settings=settings.adapted("attn"), rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, "embed", **norm)
        self.mlp = MLP(config, settings=settings.adapted("mlp"), rngs=rngs)

    def rows(self, x_BTD, cos_BTY, sin_BTY, segment_BT) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Whole rows: (x_BTD, (k_BTKh, v_BTKh))."""
        with jax.named_scope("attention"):
            q_BTHh, k_BTKh, v_BTKh = self.attn.project(self.attn_norm(x_BTD), cos_BTY, sin_BTY)
            q_BTHh = constrain(q_BTHh, ("batch", "length", "heads", "head_dim"))
            k_BTKh = constrain(k_BTKh, ("batch", "length", "kv_heads", "head_dim"))
            v_BTKh = constrain(v_BTKh, ("batch", "length", "kv_heads", "head_dim"))
            options = dict(causal=True, shared_segment=PROMPT, placement=placement("batch", "kv_heads"))
            out_BTHh = attention(q_BTHh, k_BTKh, v_BTKh, segment_BT, segment_BT, **options)
            x_BTD = constrain(x_BTD + self.attn.o(out_BTHh), BTD)
        with jax.named_scope("mlp"):
            x_BTD = constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD), BTF), BTD)
        return x_BTD, (k_BTKh, v_BTKh)

    def completions(self, x_BGCD, cos_BGCY, sin_BGCY, attend) -> jax.Array:
        """Tokens of completions: `attend(q_BGCHh, k_BGCKh, v_BGCKh) -> out_BGCHh` owns the caches."""
        with jax.named_scope("attention"):
            out_BGCHh = attend(*self.attn.project(self.attn_norm(x_BGCD), cos_BGCY, sin_BGCY))
            x_BGCD = constrain(x_BGCD + self.attn.o(out_BGCHh), BGCD)
        with jax.named_scope("mlp"):
            normed_BGCD = constrain(self.mlp_norm(x_BGCD), MLP_BGCD)
            # Summed over all chips at once, before rows are parted again; left alone, over one axis after the other.
            out_BGCD = constrain(self.mlp(normed_BGCD, MLP_BGCF), MLP_BGCD)
            return constrain(x_BGCD + constrain(out_BGCD, BGCD), BGCD)


class TextDecoder(nnx.Module):
    """Embedding table, decoder layers, final norm and, unless tied, the output head."""

    def __init__(self, config: TextConfig, *, tied: bool, settings: Settings, remat: str, rngs: nnx.Rngs) -> None:
        self.config, self.remat, self.dtype = config, remat, settings.compute_dtype
        N, D = config.vocab_size, config.hidden_size
        self.embed = Embedding((N, D), ("vocab", "embed"), settings=settings, rngs=rngs)
        self.layers = stack_layers(
            lambda rngs: TextLayer(config, settings=settings, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.norm = RMSNorm(D, "embed", eps=config.rms_norm_eps, settings=settings, rngs=rngs)
        axes = ("embed", "vocab")
        head = Linear("...D,DN->...N", dict(D=D, N=N), axes, bias=False, settings=settings, rngs=rngs)
        self.head = None if tied else head

    def rotary(self, position_3: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin [..., Y] of int32 positions [3, ...].

        The head's frequencies are cut into contiguous sections that follow the time, height and width position; angles
        are float32 and only their cosine and sine are rounded to the compute dtype.
        """
        angle_3Y = position_3[..., None].astype(jnp.float32) * inverse_frequencies(
            self.config.head_dim // 2, self.config.rope_theta
        )
        time, height, _ = self.config.mrope_section
        angle_Y = jnp.concatenate(
            [
                angle_3Y[0, ..., :time],
                angle_3Y[1, ..., time : time + height],
                angle_3Y[2, ..., time + height :],
            ],
            axis=-1,
        )
        return jnp.cos(angle_Y).astype(self.dtype), jnp.sin(angle_Y).astype(self.dtype)

    @jax.named_scope("text_decoder")
    def rows(self, x_BTD: jax.Array, segment_BT, position_3BT, *, keep: bool) -> tuple[jax.Array, PromptCache | None]:
        """Runs whole rows.

        Args:
            x_BTD: embeddings.
            segment_BT, position_3BT: as in `Tokens`.
            keep: whether to return the keys and values.

        Returns:
            (h_BTD after the final norm, the cache or None).
        """
        cos_BTY, sin_BTY = self.rotary(position_3BT)

        def step(layer: TextLayer, x_BTD, _):
            x_BTD, kv = layer.rows(x_BTD, cos_BTY, sin_BTY, segment_BT)
            return x_BTD, kv if keep else None

        h_BTD, kv = scan_layers(self.layers, step, constrain(x_BTD, BTD), remat=self.remat)
        cache = PromptCache(k_LBTKh=kv[0], v_LBTKh=kv[1], valid_BT=segment_BT != PADDING) if keep else None
        return self.norm(h_BTD), cache

    @jax.named_scope("text_decoder")
    def token(self, x_BGD: jax.Array, position_BG, slot, prompt: PromptCache, cache: Cache) -> tuple[jax.Array, Cache]:
        """One token of every completion, written to `slot` of the cache; earlier slots are its own past.

        The stacked cache is carried through the layer scan and only the token is written, so it is never copied.
        """
        position_BG1 = position_BG[..., None]
        cos_BGCY, sin_BGCY = self.rotary(jnp.broadcast_to(position_BG1, (3, *position_BG1.shape)))
        B, G, C = cache.k_LBGCKh.shape[1:4]
        past_BGCS = jnp.broadcast_to(jnp.arange(C) <= slot, (B, G, 1, C))
        place = placement("batch", "kv_heads")
        in_place = choose(None, place) == "pallas"
        prompt_k_LBKTh, prompt_v_LBKTh = prompt.k_LBTKh.swapaxes(2, 3), prompt.v_LBTKh.swapaxes(2, 3)
        own_length_BG = jnp.full((B, G), slot + 1)
        # Found once a token: the compiler leaves it in the loop over layers, five small operations in each.
        seen = seen_tokens(prompt.valid_BT, own_length_BG, cache.k_LBGCKh.swapaxes(3, 4), placement=place)

        def step(layer: TextLayer, carry, per_layer):
            x_BGCD, k_LBGCKh, v_LBGCKh = carry
            number, prompt_k_BTKh, prompt_v_BTKh = per_layer

            def attend(q_BGCHh, k_BGCKh, v_BGCKh):
                nonlocal k_LBGCKh, v_LBGCKh
                start = (number, 0, 0, slot, 0, 0)
                k_LBGCKh = jax.lax.dynamic_update_slice(k_LBGCKh, k_BGCKh[None].astype(k_LBGCKh.dtype), start)
                v_LBGCKh = jax.lax.dynamic_update_slice(v_LBGCKh, v_BGCKh[None].astype(v_LBGCKh.dtype), start)
                if in_place:
                    # The kernel reads the stacked caches where they lie; the compiler lays them out head by head.
                    prompts = (prompt_k_LBKTh, prompt_v_LBKTh, prompt.valid_BT)
                    own = (k_LBGCKh.swapaxes(3, 4), v_LBGCKh.swapaxes(3, 4), own_length_BG)
                    options = dict(seen=seen, placement=place)
                    return decode_attention(q_BGCHh[:, :, 0], *prompts, *own, number, **options)[:, :, None]
                own_k = jax.lax.dynamic_index_in_dim(k_LBGCKh, number, keepdims=False).astype(k_BGCKh.dtype)
                own_v = jax.lax.dynamic_index_in_dim(v_LBGCKh, number, keepdims=False).astype(v_BGCKh.dtype)
                return shared_prompt_attention(
                    q_BGCHh, prompt_k_BTKh, prompt_v_BTKh, prompt.valid_BT, own_k, own_v, past_BGCS
                )

            x_BGCD = layer.completions(x_BGCD, cos_BGCY, sin_BGCY, attend)
            return (x_BGCD, k_LBGCKh, v_LBGCKh), None

        numbers = jnp.arange(self.config.num_hidden_layers)
        carry = (x_BGD[:, :, None], cache.k_LBGCKh, cache.v_LBGCKh)
        per_layer = (numbers, prompt.k_LBTKh, prompt.v_LBTKh)
        (h_BGCD, k_LBGCKh, v_LBGCKh), _ = scan_layers(self.layers, step, carry, per_layer)
        return self.norm(h_BGCD[:, :, 0]), Cache(k_LBGCKh=k_LBGCKh, v_LBGCKh=v_LBGCKh)

    def slices_are_copied(self) -> bool:
        """Whether the platform copies a layer's slice of a stacked array before it multiplies with it, as GPUs do."""
        return device(placement("batch", "kv_heads")).platform == "gpu"

    def unstacked_layers(self) -> tuple[TextLayer, ...]:
        """The layers one by one, each with arrays of its own, which takes a copy of them all."""
        graphdef: Any  # what it merges to is a TextLayer, which nnx's types do not know
        graphdef, params = nnx.split(self.layers)
        arrays, structure = jax.tree.flatten(params)
        by_layer = zip(*map(one_a_layer, arrays), strict=True)
        return tuple(nnx.merge(graphdef, jax.tree.unflatten(structure, of_layer)) for of_layer in by_layer)

    @jax.named_scope("text_decoder")
    def token_by_layers(
        self, layers: Sequence[TextLayer], x_BGD: jax.Array, position_BG, slot, prompt: PromptCache, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """`token` with layers (`unstacked_layers`) and caches (`unstacked`) that are not stacked, one by one."""
        position_BG1 = position_BG[..., None]
        cos_BGCY, sin_BGCY = self.rotary(jnp.broadcast_to(position_BG1, (3, *position_BG1.shape)))
        B, G, C = cache.k_LBGCKh[0].shape[:3]
        past_BGCS = jnp.broadcast_to(jnp.arange(C) <= slot, (B, G, 1, C))
        x_BGCD, kept = x_BGD[:, :, None], []
        arrays = (prompt.k_LBTKh, prompt.v_LBTKh, cache.k_LBGCKh, cache.v_LBGCKh)
        for layer, prompt_k, prompt_v, own_k, own_v in zip(layers, *arrays, strict=True):

            def attend(q_BGCHh, k_BGCKh, v_BGCKh, prompt_kv=(prompt_k, prompt_v), own=(own_k, own_v)):
                # Each layer's cache is an array of its own, so the token is written where it lies.
                own_k, own_v = (
                    jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, slot, 0, 0))
                    for old, new in zip(own, (k_BGCKh, v_BGCKh), strict=True)
                )
                kept.append((own_k, own_v))
                own_k, own_v = own_k.astype(k_BGCKh.dtype), own_v.astype(v_BGCKh.dtype)
                return shared_prompt_attention(q_BGCHh, *prompt_kv, prompt.valid_BT, own_k, own_v, past_BGCS)

            x_BGCD = layer.completions(x_BGCD, cos_BGCY, sin_BGCY, attend)
        k_LBGCKh, v_LBGCKh = zip(*kept, strict=True)
        return self.norm(x_BGCD[:, :, 0]), Cache(k_LBGCKh=k_LBGCKh, v_LBGCKh=v_LBGCKh)

    @jax.named_scope("text_decoder")
    def contexts(self, x_BGCD: jax.Array, segment_BGC, position_BGC, prompt: PromptCache) -> jax.Array:
        """Whole completions at once against a finished prompt cache: h_BGCD after the final norm.

        Args:
            x_BGCD: embeddings of the completions' tokens.
            segment_BGC: int32, PADDING where there is no token; a token sees earlier ones of its segment.
            position_BGC: int32, the same on all three axes.
            prompt: the cache of the rows' prompts.
        """
        C = x_BGCD.shape[2]
        cos_BGCY, sin_BGCY = self.rotary(jnp.broadcast_to(position_BGC, (3, *position_BGC.shape)))
        alike_BGCS = segment_BGC[..., :, None] == segment_BGC[..., None, :]
        past_BGCS = (jnp.arange(C)[:, None] >= jnp.arange(C)) & alike_BGCS & (segment_BGC != PADDING)[..., None, :]

        place = placement("batch", "kv_heads")

        def step(layer: TextLayer, x_BGCD, prompt_kv):
            def attend(q_BGCHh, k_BGCKh, v_BGCKh):
                own = (k_BGCKh, v_BGCKh, past_BGCS)
                return shared_prompt_attention(q_BGCHh, *prompt_kv, prompt.valid_BT, *own, placement=place)

            return layer.completions(x_BGCD, cos_BGCY, sin_BGCY, attend), None

        per_layer = (prompt.k_LBTKh, prompt.v_LBTKh)
        h_BGCD, _ = scan_layers(self.layers, step, constrain(x_BGCD, BGCD), per_layer, remat=self.remat)
        return self.norm(h_BGCD)

    @jax.named_scope("logits")
    def logits(self, h: jax.Array) -> jax.Array:
        """float32 logits[..., N] of hidden states h[..., D]."""
        unembedding, vocab_first = self.unembedding()
        kernel_DN = unembedding.T if vocab_first else unembedding
        return jnp.einsum("...D,DN->...N", h, kernel_DN, preferred_element_type=jnp.float32)

    def unembedding(self) -> tuple[jax.Array, bool]:
        """What hidden states are multiplied with, in the compute dtype: [D, N], or [N, D] and True when tied."""
        kernel = self.embed.embedding if self.head is None else self.head.kernel
        return kernel[...].astype(self.dtype), self.head is None

    @jax.named_scope("logprobs")
    def gather_logprobs(self, h: jax.Array, token: jax.Array | None, **settings: Any) -> Scores:
        """As `Thinker.gather_logprobs`."""
        unembedding, vocab_first = self.unembedding()
        partition = None
        if (mesh := active_mesh()) is not None:
            axes = {name: mesh_axes(name) for name in ("batch", "vocab", "embed")}
            fsdp = tuple(axis for axis in axes["embed"] if axis in axes["batch"])
            partition = Partition(mesh=mesh, rows=axes["batch"], vocab=axes["vocab"], width=fsdp)
        return gather_logprobs(h, unembedding, token, vocab_first=vocab_first, partition=partition, **settings)
