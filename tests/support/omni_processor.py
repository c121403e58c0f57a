"""transformers' own Qwen2_5OmniProcessor as an oracle, in a process of its own.

The processor needs torchvision, whose wheels cannot stand beside a CPU torch. It uses four functions of it, and the two
that compute anything are one-line calls of torch: `resize` of its uint8 kernel, `normalize` of a subtraction and a
division. So the process gets a module of these four and runs transformers' code unchanged on top.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

SAMPLING_RATE = 16_000


def run_processor(
    folder: Path, tokenizer, chat_template: str, cases: dict[str, dict]
) -> dict[str, dict[str, np.ndarray]]:
    """Runs the processor on chats with media.

    Args:
        folder: scratch folder.
        tokenizer: saved into it for the process.
        chat_template: jinja source.
        cases: name -> {"messages": chat in transformers' form, "videos": [uint8[n, h, w, 3]], "images":
            [uint8[h, w, 3]], "audio": [float32[samples]], "options": further arguments of the processor's call}.

    Returns:
        name -> {"text": the rendered chat before expansion, and every array the processor makes}.
    """
    tokenizer.save_pretrained(folder / "tokenizer")
    arrays, described = {}, {}
    for name, case in cases.items():
        described[name] = {"messages": case["messages"], "options": case.get("options", {})}
        for kind in ("videos", "images", "audio"):
            keys = [f"{name}-{kind}-{number}" for number in range(len(case.get(kind, ())))]
            arrays |= dict(zip(keys, case.get(kind, ()), strict=True))
            described[name][kind] = keys
    np.savez(folder / "inputs.npz", **arrays)
    (folder / "cases.json").write_text(json.dumps({"chat_template": chat_template, "cases": described}))
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: dict(np.load(folder / f"{name}.npz")) for name in cases}


def _provide_torchvision() -> None:
    """Puts the four functions where transformers imports them from."""
    import enum
    import importlib.machinery
    import importlib.metadata
    import types

    import torch

    class InterpolationMode(enum.Enum):
        NEAREST = "nearest"
        NEAREST_EXACT = "nearest-exact"
        BILINEAR = "bilinear"
        BICUBIC = "bicubic"
        BOX = "box"
        HAMMING = "hamming"
        LANCZOS = "lanczos"

    def resize(pictures, size, interpolation, antialias):
        flat = pictures.reshape(-1, *pictures.shape[-3:])
        mode = interpolation.value
        new = torch.nn.functional.interpolate(flat, size=size, mode=mode, align_corners=False, antialias=antialias)
        return new.reshape(*pictures.shape[:-2], *size)

    def normalize(pictures, mean, std, inplace=False):
        return (pictures - mean[:, None, None]) / std[:, None, None]

    def grayscale_to_rgb(pictures):
        return pictures if pictures.shape[-3] == 3 else pictures.expand(*pictures.shape[:-3], 3, *pictures.shape[-2:])

    def pil_to_tensor(picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    modules = {}
    for name in ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional"):
        module = types.ModuleType(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
        module.__path__ = []
        modules[name] = sys.modules[module.__name__] = module
        if name:
            setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    modules[""].__version__ = "0.28.0"
    for name in (".transforms", ".transforms.v2", ".transforms.functional", ".transforms.v2.functional"):
        modules[name].InterpolationMode = InterpolationMode
        modules[name].pil_to_tensor = pil_to_tensor
    for function in (resize, normalize, grayscale_to_rgb):
        setattr(modules[".transforms.v2.functional"], function.__name__, function)
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: modules[""].__version__ if name == "torchvision" else version(name)


def main(folder: Path) -> None:
    """Runs the cases described in the folder."""
    _provide_torchvision()
    from transformers import AutoTokenizer, WhisperFeatureExtractor
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    described = json.loads((folder / "cases.json").read_text())
    inputs = np.load(folder / "inputs.npz")
    mel = WhisperFeatureExtractor(feature_size=128, sampling_rate=SAMPLING_RATE, chunk_length=300)
    # The NumPy path in double precision; the one through torch is float32 and strays from it by 2.6e-5.
    mel._torch_extract_fbank_features = mel._np_extract_fbank_features
    processor = Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(),
        Qwen2VLVideoProcessor(cap_pixels_per_frame=False),
        mel,
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        chat_template=described["chat_template"],
    )
    for name, case in described["cases"].items():
        text = processor.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
        media = {kind: [inputs[key] for key in case[kind]] or None for kind in ("videos", "images", "audio")}
        if media["videos"]:
            media["videos"] = [np.moveaxis(video, -1, 1) for video in media["videos"]]
        if media["images"]:
            media["images"] = [np.moveaxis(image, -1, 0) for image in media["images"]]
        out = processor(text=[text], **media, **case["options"], return_tensors="np")
        np.savez(folder / f"{name}.npz", text=np.array(text), **{key: np.asarray(value) for key, value in out.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
