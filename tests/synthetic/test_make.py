"""A whole small data set on disk: real clips, valid records, the same bytes again, completed when interrupted."""

import dataclasses
import hashlib
import json

import av
import numpy as np
import pytest

from mer_r1_jax import faults
from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.data.records import read_records
from mer_r1_jax.data.synthetic import make
from mer_r1_jax.data.synthetic.make import MAX_REASONING_TOKENS, WorldError, WorldSettings, make_world
from mer_r1_jax.data.synthetic.render import FPS, FRAMES, render_scene, write_clip
from mer_r1_jax.data.synthetic.world import CATEGORIES, DEFAULT, NEUTRAL, WORLDS, Scene, draw_scene, load_lexicon
from mer_r1_jax.emotion.rewards import answer_rewards
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.media.decode import read_audio_track, read_video
from mer_r1_jax.media.mel import log_mel
from mer_r1_jax.media.tokenizer import load_tokenizer

WORLD = WorldSettings(sft_clips=16, rl_clips=4, eval_clips=8)
MEDIA = MediaConfig(min_frames=4, max_frames=4, video_min_pixels=84 * 84, video_max_pixels=84 * 84)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), WORLD, workers=2)


def _hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _scene(eyes=NEUTRAL, mouth=NEUTRAL, colour=NEUTRAL, pitch=NEUTRAL, tempo=NEUTRAL, timbre=NEUTRAL, key=(0, 0, 0)):
    cues = (eyes, mouth, colour, pitch, tempo, timbre, NEUTRAL, NEUTRAL, NEUTRAL)
    return Scene("sft", 0, key, 0, (0,), cues, (0,), ("happy",), ("happy",), (False,) * 9)


def test_records_are_valid_and_name_existing_clips(world):
    for path, required, count in ((world.sft, "target", 64), (world.rl, "solution", 4), (world.eval, "solution", 8)):
        records = read_records(path, world.media_root, require=[required])
        assert len(records) == count
        assert all((world.root / record.videos[0]).stat().st_size > 1000 for record in records)
        assert all(record.videos == record.audios and record.subtitle for record in records)


def test_splits_share_no_clip(world):
    per_split = [{record.videos[0] for record in read_records(path)} for path in (world.sft, world.rl, world.eval)]
    names = [name for split in per_split for name in split]
    contents = {hashlib.sha256((world.root / name).read_bytes()).hexdigest() for name in names}
    assert len(set(names)) == len(names) == len(contents)


def test_sft_rows_carry_noisy_labels_and_others_the_truth(world):
    lexicon = load_lexicon()
    for path, split in ((world.rl, "rl"), (world.eval, "eval")):
        for index, record in enumerate(read_records(path)):
            assert record.solution == draw_scene(0, split, index, lexicon).truth_words
    for record in read_records(world.sft):
        _, index, annotator = record.id.split("-")
        scene = draw_scene(0, "sft", int(index), lexicon, annotator=int(annotator))
        assert record.solution == scene.label_words and record.videos == (f"clips/{scene.name}.mp4",)


def test_targets_stay_within_64_tokens(world):
    tokenizer = load_tokenizer(world.tokenizer)
    lengths = []
    for record in read_records(world.sft):
        reasoning = tokenizer(record.target_reasoning)["input_ids"]
        assert len(reasoning) <= MAX_REASONING_TOKENS
        lengths.append(len(reasoning) + len(tokenizer(record.target_answer)["input_ids"]) + 11)
    assert max(lengths) <= 64 and np.mean(lengths) > 35


def test_held_out_rows_carry_cues_and_the_oracles_answer(world):
    wheels, lexicon = load_wheels(), load_lexicon()
    records = read_records(world.eval)
    scores = [answer_rewards(record.extra["oracle"], record.solution, wheels) for record in records]
    written = json.loads(world.oracle.read_text())["oracle"]
    assert np.mean([score.f1 for score in scores]) == pytest.approx(written["f1"])
    assert [tuple(record.extra["cues"]) for record in records] == [
        draw_scene(0, "eval", index, lexicon).cues for index in range(len(records))
    ]


def test_clips_decode_to_the_promised_sizes(world):
    path = world.root / read_records(world.sft)[0].videos[0]
    with av.open(str(path)) as clip:
        video, audio = clip.streams.video[0], clip.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert sum(1 for _ in clip.decode(video)) == FRAMES and video.average_rate == FPS
    frames = read_video(path, MEDIA)
    assert frames.frames.shape == (4, 84, 84, 3) and frames.sampled_fps == 2.0
    samples = read_audio_track(path, MEDIA).samples
    assert log_mel(samples, 128).shape == (192, 128)


def test_encoding_keeps_picture_and_sound(tmp_path):
    frames, sound = render_scene(_scene(eyes=1, mouth=1, colour=1, pitch=1))
    write_clip(tmp_path / "clip.mp4", frames, sound)
    decoded = read_video(tmp_path / "clip.mp4", MEDIA).frames
    assert np.abs(decoded.astype(float) - frames[[0, 5, 10, 15]]).mean() < 6  # chroma is halved, edges are hard
    heard = read_audio_track(tmp_path / "clip.mp4", MEDIA).samples
    assert heard.shape == sound.shape and np.corrcoef(heard, sound)[0, 1] > 0.95


@pytest.mark.parametrize("slot", ["eyes", "mouth", "colour", "pitch", "tempo", "timbre"])
def test_displays_of_a_slot_differ_far_more_than_speakers_do(slot):
    """Nearest display by mean picture: told right from another clip's shape, colour, movement or sound."""
    part = {"eyes": slice(12, 52), "mouth": slice(56, 80), "colour": slice(None)}

    def seen(display, key):
        frames, sound = render_scene(_scene(**{slot: display}, key=key))
        picture = frames[[0, 5, 10, 15], part[slot]] if slot in part else log_mel(sound, 64)
        return picture.astype(float).reshape(-1)

    displays = range(NEUTRAL, len(CATEGORIES))
    means = np.stack([np.mean([seen(d, (9, d + 1, k)) for k in range(8)], axis=0) for d in displays])
    tries = [(row, seen(display, (7, row, k))) for row, display in enumerate(displays) for k in range(2)]
    right = [np.argmin(((means - picture) ** 2).sum(1)) == row for row, picture in tries]
    assert np.mean(right) > 0.7


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    again = make_world(tmp_path / "again", WORLD, workers=0)
    assert _hashes(again.root) == _hashes(world.root)


def test_an_interrupted_data_set_is_completed(world, tmp_path, monkeypatch):
    finished = _hashes(world.root)
    drawn = []

    def stops_early(place, detail=""):
        if place == "render_task" and len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(place)

    monkeypatch.setattr(make, "CLIPS_PER_TASK", 8)
    monkeypatch.setattr(faults, "here", stops_early)
    with pytest.raises(KeyboardInterrupt):
        make_world(tmp_path, WORLD, workers=0)
    monkeypatch.undo()
    assert 0 < len(list((tmp_path / "clips").glob("*.mp4"))) < sum(WORLD.counts.values())
    assert not (tmp_path / "manifest.json").exists()
    make_world(tmp_path, WORLD, workers=0)
    assert _hashes(tmp_path) == finished


def test_a_finished_data_set_is_reused_and_repaired(world):
    finished = _hashes(world.root)
    times = {path: path.stat().st_mtime_ns for path in (world.root / "clips").iterdir()}
    make_world(world.root, WORLD, workers=0)
    assert times == {path: path.stat().st_mtime_ns for path in (world.root / "clips").iterdir()}
    (world.root / "clips" / "rl-000003.mp4").unlink()
    world.rl.write_text("")
    make_world(world.root, WORLD, workers=0)
    assert _hashes(world.root) == finished


def test_a_data_set_of_before_worlds_had_names_is_taken_as_it_is(tmp_path):
    """Its settings do not say that reasonings conclude, as they all did."""
    concluding = WorldSettings(sft_clips=1, rl_clips=0, eval_clips=1, config=WORLDS["concluding"])
    world = make_world(tmp_path, concluding, workers=0)
    file = world.root / "settings.json"
    settings = json.loads(file.read_text())
    assert settings["world"].pop("concludes") is True
    file.write_text(json.dumps(settings))
    before = {path: path.stat().st_mtime_ns for path in (world.sft, world.eval, world.manifest, file)}
    make_world(world.root, concluding, workers=0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # The default is another world since.
    with pytest.raises(WorldError, match=r"\(world differ\): .*data.synthetic_world=concluding was the default"):
        make_world(world.root, dataclasses.replace(concluding, config=WORLDS[DEFAULT]), workers=0)


def test_a_folder_of_another_world_is_refused(world):
    with pytest.raises(WorldError, match=r"other settings \(seed differ\): choose another folder"):
        make_world(world.root, dataclasses.replace(WORLD, seed=1), workers=0)
    with pytest.raises(WorldError, match="must not be negative"):
        make_world(world.root, WorldSettings(sft_clips=-1, rl_clips=0, eval_clips=0), workers=0)
