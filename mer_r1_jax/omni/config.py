"""Architecture of the Qwen2.5-Omni Thinker: one frozen, validated, hashable dataclass per part.

Field names are those of Hugging Face's `config.json` wherever it has one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mer_r1_jax.omni.architecture_checks import ints, is_int, require, require_positive, require_real
from mer_r1_jax.omni.batch import MEL_FRAMES_PER_UNIT
from mer_r1_jax.omni.lora import AdapterConfig

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("nothing", "attention", "dots", "everything")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The Whisper-like audio tower.

    Attributes:
        d_model: width d of the tower.
        encoder_layers, encoder_attention_heads, encoder_ffn_dim: its transformer.
        num_mel_bins: M, mel bins of the input.
        n_window: half of the mel frames convolved and attended to at once; the batch layout fixes it to 100.
        max_source_positions: longest the sinusoid may become, in frames after the second convolution.
        output_dim: D, width of the text decoder.
    """

    d_model: int = 1280
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    num_mel_bins: int = 128
    n_window: int = 100
    max_source_positions: int = 1500
    output_dim: int = 3584

    def __post_init__(self) -> None:
        require_positive(self, *(field.name for field in dataclasses.fields(self)))
        require(
            self.d_model % self.encoder_attention_heads == 0,
            "AudioConfig.d_model",
            self.d_model,
            f"a multiple of encoder_attention_heads={self.encoder_attention_heads}",
        )
        require(
            self.d_model % 2 == 0 and self.d_model > 2,
            "AudioConfig.d_model",
            self.d_model,
            "an even number above 2, half of it sines and half cosines",
        )
        require(
            2 * self.n_window == MEL_FRAMES_PER_UNIT,
            "AudioConfig.n_window",
            self.n_window,
            f"{MEL_FRAMES_PER_UNIT // 2}, the unit a batch is cut into",
        )
        require(
            self.max_source_positions >= self.n_window,
            "AudioConfig.max_source_positions",
            self.max_source_positions,
            f"at least n_window={self.n_window}",
        )

    @property
    def head_dim(self) -> int:
        """Width h of one attention head."""
        return self.d_model // self.encoder_attention_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The window-attention vision tower.

    Attributes:
        depth, hidden_size, num_heads, intermediate_size: its transformer; hidden_size is its width d.
        in_channels, patch_size, temporal_patch_size: what a patch covers.
        spatial_merge_size: patches along each side of the block that becomes one feature row; 2.
        window_size: side of an attention window in pixels.
        fullatt_block_indexes: layers that attend to the whole frame pair instead of a window.
        out_hidden_size: D, width of the text decoder.
        rms_norm_eps, rope_theta: constants of transformers' code, not fields of its config.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        object.__setattr__(self, "fullatt_block_indexes", ints(self, "fullatt_block_indexes"))
        require_positive(
            self,
            *("depth", "hidden_size", "intermediate_size", "num_heads", "in_channels", "patch_size"),
            *("temporal_patch_size", "window_size", "out_hidden_size"),
        )
        require_real(self, "rms_norm_eps", "rope_theta")
        require(
            self.spatial_merge_size == 2,
            "VisionConfig.spatial_merge_size",
            self.spatial_merge_size,
            "2, the block a batch's patches come in",
        )
        require(
            self.hidden_size % (4 * self.num_heads) == 0,
            "VisionConfig.hidden_size",
            self.hidden_size,
            f"a multiple of 4 * num_heads={4 * self.num_heads}: a head holds row and column rotations",
        )
        require(
            self.window_size >= self.spatial_merge_size * self.patch_size,
            "VisionConfig.window_size",
            self.window_size,
            f"at least one merged cell of {self.spatial_merge_size * self.patch_size} pixels",
        )
        require(
            all(0 <= index < self.depth for index in self.fullatt_block_indexes),
            "VisionConfig.fullatt_block_indexes",
            self.fullatt_block_indexes,
            f"layer numbers from 0 to depth - 1 = {self.depth - 1}",
        )

    @property
    def head_dim(self) -> int:
        """Width h of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """X, values of one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one feature row."""
        return self.spatial_merge_size**2

    @property
    def window_cells(self) -> int:
        """Feature rows along each side of an attention window."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text decoder.

    Attributes:
        vocab_size: N. hidden_size: D. intermediate_size, num_hidden_layers, num_attention_heads (H),
            num_key_value_heads (K): its transformer.
        rms_norm_eps: epsilon of every norm.
        rope_theta, mrope_section: rotary base, and how many frequencies follow the time, height and width position.
        max_position_embeddings: longest sequence it was trained for (carried for the export, not enforced).
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        object.__setattr__(self, "mrope_section", ints(self, "mrope_section"))
        require_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "max_position_embeddings"),
        )
        require_real(self, "rms_norm_eps", "rope_theta")
        require(
            self.hidden_size % (2 * self.num_attention_heads) == 0,
            "TextConfig.hidden_size",
            self.hidden_size,
            f"a multiple of 2 * num_attention_heads={2 * self.num_attention_heads}",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "TextConfig.num_attention_heads",
            self.num_attention_heads,
            f"a multiple of num_key_value_heads={self.num_key_value_heads}",
        )
        require(
            len(self.mrope_section) == 3
            and min(self.mrope_section) >= 0
            and 2 * sum(self.mrope_section) == self.head_dim,
            "TextConfig.mrope_section",
            self.mrope_section,
            f"three numbers that add up to head_dim / 2 = {self.head_dim // 2}",
        )

    @property
    def head_dim(self) -> int:
        """Width h of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkerConfig:
    """The whole Thinker: three parts, the special tokens, and how it is computed.

    Attributes:
        audio, vision, text: the parts.
        *_token_id: ids of the special tokens; `audio`, `image` and `video` are the placeholders that media features
            replace, the others their brackets. eos_token_ids end a completion. user_token_id is only carried.
        position_id_per_seconds: positions per second of media on the time axis.
        seconds_per_chunk: length of the pieces in which a video and its own audio alternate.
        tie_word_embeddings: the output head is the embedding table.
        initializer_range: standard deviation of random weights.
        param_dtype, compute_dtype: dtype the parameters are kept in, and of activations and matrix products.
        remat: what the backward pass keeps of a layer: nothing | attention | dots | everything.
        adapters: of the text decoder (`omni/lora.py`); None has none.
    """

    audio: AudioConfig = dataclasses.field(default_factory=AudioConfig)
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    audio_token_id: int = 151646
    image_token_id: int = 151655
    video_token_id: int = 151656
    audio_start_token_id: int = 151647
    audio_end_token_id: int = 151648
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    pad_token_id: int = 151643
    eos_token_ids: tuple[int, ...] = (151645,)
    user_token_id: int = 872
    position_id_per_seconds: int = 25
    seconds_per_chunk: int = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "nothing"
    adapters: AdapterConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_token_ids", ints(self, "eos_token_ids"))
        width = self.text.hidden_size
        require(
            self.audio.output_dim == width, "AudioConfig.output_dim", self.audio.output_dim, f"text hidden_size={width}"
        )
        require(
            self.vision.out_hidden_size == width,
            "VisionConfig.out_hidden_size",
            self.vision.out_hidden_size,
            f"text hidden_size={width}",
        )
        for name, token_id in self.special_token_ids.items():
            require(
                is_int(token_id) and 0 <= token_id < self.text.vocab_size,
                f"ThinkerConfig.{name}",
                token_id,
                f"an id below vocab_size={self.text.vocab_size}",
            )
        require(len(self.eos_token_ids) > 0, "ThinkerConfig.eos_token_ids", self.eos_token_ids, "at least one id")
        require_positive(self, "position_id_per_seconds", "seconds_per_chunk")
        require_real(self, "initializer_range")
        require(is_int(self.user_token_id), "ThinkerConfig.user_token_id", self.user_token_id, "an integer")
        tied = self.tie_word_embeddings
        require(isinstance(tied, bool), "ThinkerConfig.tie_word_embeddings", tied, "true or false")
        for name in ("param_dtype", "compute_dtype"):
            require(
                getattr(self, name) in DTYPES,
                f"ThinkerConfig.{name}",
                getattr(self, name),
                f"one of {', '.join(DTYPES)}",
            )
        require(self.remat in REMAT, "ThinkerConfig.remat", self.remat, f"one of {', '.join(REMAT)}")

    @property
    def base(self) -> ThinkerConfig:
        """The architecture without adapters, which is what a Hugging Face directory holds."""
        return dataclasses.replace(self, adapters=None) if self.adapters else self

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Field name -> id of every special token the model or a sampler acts on."""
        singles = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name.endswith("_token_id") and field.name != "user_token_id"
        }
        return singles | {f"eos_token_ids[{i}]": token_id for i, token_id in enumerate(self.eos_token_ids)}

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for media or bracket it; a completion must never contain them."""
        return (
            self.audio_token_id,
            self.image_token_id,
            self.video_token_id,
            self.audio_start_token_id,
            self.audio_end_token_id,
            self.vision_start_token_id,
            self.vision_end_token_id,
        )

    @classmethod
    def qwen2_5_omni_3b(cls, **overrides) -> ThinkerConfig:
        """The released 3B Thinker."""
        text = TextConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
        )
        parts: dict[str, Any] = dict(
            audio=AudioConfig(output_dim=2048), vision=VisionConfig(out_hidden_size=2048), text=text
        )
        return cls(**(parts | overrides))

    @classmethod
    def qwen2_5_omni_7b(cls, **overrides) -> ThinkerConfig:
        """The released 7B Thinker."""
        return cls(**overrides)

    @classmethod
    def tiny(cls, *, vocab_size: int = 512, hidden_size: int = 64, **overrides) -> ThinkerConfig:
        """A Thinker of three text, four vision and two audio layers, for tests and the synthetic world.

        Args:
            vocab_size: N. Special ids that are not given become its last ids.
            hidden_size: D, a multiple of 32; four heads, two key heads.
            **overrides: any field of this class; `text`, `vision` and `audio` are complete configs.
        """
        pairs = hidden_size // 8
        text = TextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            mrope_section=(pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8),
        )
        vision = VisionConfig(
            depth=4,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=hidden_size,
            fullatt_block_indexes=(1, 3),
        )
        audio = AudioConfig(
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=128,
            output_dim=hidden_size,
        )
        names = ("pad", "eos", "audio", "audio_start", "audio_end", "vision_start", "vision_end", "image", "video")
        ids: dict[str, Any] = {f"{name}_token_id": vocab_size - len(names) + i for i, name in enumerate(names)}
        ids["eos_token_ids"] = (ids.pop("eos_token_id"),)
        defaults: dict[str, Any] = (
            dict(audio=audio, vision=vision, text=text, user_token_id=min(872, vocab_size - 1)) | ids
        )
        return cls(**(defaults | overrides))
