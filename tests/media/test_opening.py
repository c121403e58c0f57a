"""What may be read as a clip: one file below the media root, in a known format, whatever its name or content say."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct

import av
import numpy as np
import pytest
from PIL import Image
from support.clips import make_clip
from support.media_files import numbered_pictures, write_sound, write_video

from mer_r1_jax import faults
from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.data.records import read_records
from mer_r1_jax.evaluation.clip_frames import clip_strips
from mer_r1_jax.media.decoded import decode_file
from mer_r1_jax.media.loader import ClipLoader
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.run.inference import clip_record

MEDIA = MediaConfig(video_min_pixels=784, video_max_pixels=4 * 784, max_frames=4, decode_workers=0)
HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:2.0,\n{}\n#EXT-X-ENDLIST\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
MPD = '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>{}</BaseURL></Period></MPD>'
XSPF = '<?xml version="1.0"?><playlist><trackList><track><location>{}</location></track></trackList></playlist>'


@pytest.fixture
def root(tmp_path):
    """A media root with a clip, beside a folder with a private one."""
    (tmp_path / "media").mkdir()
    (tmp_path / "private").mkdir()
    write_video(tmp_path / "media" / "good.mp4", numbered_pictures(8))
    make_clip(tmp_path / "private" / "clip.ts", video_codec="mpeg2video", audio_codec="mp2", sampling_rate=44_100)
    shutil.copy(tmp_path / "media" / "good.mp4", tmp_path / "private" / "clip.mp4")
    return tmp_path / "media"


def decoded(path, root="", kind="video", media=MEDIA):
    return decode_file(str(path), kind, media, 28, 128, str(root))


def refusal(path, root="", kind="video", media=MEDIA) -> MediaError:
    with pytest.raises(MediaError) as caught:
        decoded(path, root, kind, media)
    assert str(path) in str(caught.value) and caught.value.mend
    return caught.value


@pytest.mark.parametrize("kind", ["video", "audio"])
@pytest.mark.parametrize(
    "target", ["{}", "file://{}", "../private/clip.ts", "concat:{}|{}", "subfile,,start,0,end,0,,:{}"]
)
@pytest.mark.parametrize("ending", ["m3u8", "mp4", "ts"])
def test_hls_playlists_are_refused_by_name(root, kind, target, ending):
    clip = root / f"list.{ending}"
    clip.write_text(HLS.format(target.replace("{}", str(root.parent / "private" / "clip.ts"))))
    error = refusal(clip, root, kind)
    assert error.reason == "playlist" and "M3U or HLS" in error.found and "List the clips themselves" in error.mend


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n{}\n", "HLS"),  # a live list, which never ends
        ("ffconcat version 1.0\nfile '{}'\n", "concat"),
        ("ffconcat version 1.0\nfile 'good.mp4'\n", "concat"),
        ("file '{}'\n", "concat"),
        ("\ufeff  [playlist]\nFile1={}\nNumberOfEntries=1\n", "PLS"),
        ("[Reference]\nRef1={}\n", "ASX"),
        ("<asx version='3.0'><entry><ref href='{}'/></entry></asx>", "XML"),
        (SDP, "SDP"),
        (MPD, "DASH"),
        (XSPF, "playlist"),
        ("http://127.0.0.1:9/clip.mp4\n", "address"),
        ("{}\n../other.mp4\n", "a list of files"),
        ("clip one.mp4", "a list of files"),
        ("# my clips\n# of today\n\nfile '{}'\n", "concat"),
        ("// mine\n#EXTM3U\n{}\n", "HLS"),
        ("# mine\r\n{}\r\n", "a list of files"),
        ("<?xml version='1.0'?><!-- " + "x" * 5000 + " --><MPD/>", "an XML text"),
        ("WEBVTT\n\n00:00.000 --> 00:05.000\nHello\n", "subtitles"),
        ("1\r\n00:00:00,000 --> 00:00:05,000\r\nHello\r\n", "subtitles"),
        ("[Script Info]\n[Events]\nDialogue: 0,0:00:00.00,0:00:05.00,Default,,0,0,0,,x", "subtitles"),
        ("# VobSub index file, v7\nid: en, index: 0\n", "subtitles"),
        ('<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "SVG"),
        ("<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs"),
    ],
)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
def test_texts_in_the_place_of_clips_are_named(root, text, word, name):
    (root / name).write_text(text.replace("{}", str(root.parent / "private" / "clip.ts")))
    error = refusal(root / name, root)
    assert word in error.found
    assert error.reason in ("playlist", "not_media")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_a_playlist_in_another_encoding_is_named(root, encoding):
    (root / "clip.mp4").write_bytes(HLS.format("good.mp4").encode(encoding))
    assert refusal(root / "clip.mp4", root).reason == "playlist"


@pytest.mark.parametrize("ending", ["nfo", "sub", "png", "jpg", "svg", "ass"])
def test_formats_outside_the_list_are_refused(root, ending):
    clip = root / f"clip.{ending}"
    clip.write_bytes(b"ansi art \x1b[31m\n" * 50)  # FFmpeg draws it as a video of letters
    assert refusal(clip, root).reason == "not_media"


@pytest.mark.parametrize("pattern", ["f%03d.png", "f%d.png", "f*.png"])
def test_a_pattern_in_a_name_is_a_name(root, pattern):
    """FFmpeg would show the pictures whose names fit."""
    for number in range(1, 6):
        Image.new("RGB", (64, 48), (77, 77, 77)).save(root / f"f{number:03d}.png")
    assert refusal(root / pattern, root).reason == "missing"
    (root / pattern).write_bytes(b"x")
    assert refusal(root / pattern, root).reason == "not_media"
    Image.new("RGB", (64, 48)).save(root / pattern, "PNG")
    error = refusal(root / pattern, root)
    assert error.reason == "no_frames" and error.found == "a picture" and "under `images`" in error.mend


def test_a_movie_that_keeps_its_frames_in_another_file(root):
    """QuickTime's external data references: the header here, the frames in a file that it names."""
    whole = (root / "good.mp4").read_bytes()
    other = str(root.parent / "private" / "clip.mp4").encode()
    other += bytes(len(other) % 2)
    alias = b"alis" + bytes(4 + 150) + struct.pack(">HH", 2, len(other)) + other + struct.pack(">HH", 0xFFFF, 0)
    entry = struct.pack(">I", 4 + len(alias)) + alias
    at = whole.index(b"url \x00\x00\x00\x01") - 4
    data = bytearray(whole[:at] + entry + whole[at + 12 :])
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):  # one in the other; the frames lie before them
        place = data.index(box) - 4
        struct.pack_into(">I", data, place, struct.unpack_from(">I", data, place)[0] + len(entry) - 12)
    (root / "good.mp4").write_bytes(data)
    error = refusal(root / "good.mp4", root)
    assert error.reason == "truncated" and "0 of the 8 frames" in error.found


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mov", "mpeg4", "yuv420p"),
        ("a.3gp", "mpeg4", "yuv420p"),
        ("a.mkv", "libx264", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.ts", "mpeg2video", "yuv420p"),
        ("a.mpg", "mpeg2video", "yuv420p"),
        ("a.flv", "libx264", "yuv420p"),
        ("a.wmv", "wmv2", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("a.h264", "libx264", "yuv420p"),
        ("a.y4m", "wrapped_avframe", "yuv420p"),
    ],
)
def test_usual_videos_are_read_whatever_they_are_called(tmp_path, name, codec, pix_fmt):
    write_video(tmp_path / name, numbered_pictures(8, (48, 64)), fps=25, codec=codec, pix_fmt=pix_fmt)
    shutil.copy(tmp_path / name, tmp_path / "no ending")
    for path in (tmp_path / name, tmp_path / "no ending"):
        assert len(decoded(path, tmp_path).arrays["frames"]) == 4


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.wav", "pcm_s16le"),
        ("a.mp3", "libmp3lame"),
        ("a.flac", "flac"),
        ("a.ogg", "flac"),
        ("a.opus", "libopus"),
        ("a.m4a", "aac"),
        ("a.aac", "aac"),
        ("a.wma", "pcm_s16le"),
        ("a.aiff", "pcm_s16be"),
        ("a.au", "pcm_s16be"),
        ("a.caf", "pcm_s16le"),
        ("a.ac3", "ac3"),
        ("a.w64", "pcm_s16le"),
    ],
)
def test_usual_sounds_are_read(tmp_path, name, codec):
    tone = np.sin(np.arange(48_000, dtype=np.float32) / 20)[None] * 0.3
    path = write_sound(tmp_path / name, tone, rate=48_000, codec=codec)
    assert decoded(path, tmp_path, "audio").facts["samples"] == pytest.approx(16_000, abs=2000)


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "12:30.mp4", "file:x.mp4", "http:x.mp4", "concat:a.mp4|b.mp4", "pipe:0", "data:x.mp4", "%d.mp4"]
)
def test_colons_make_no_addresses(root, name, monkeypatch):
    shutil.copy(root / "good.mp4", root / name)
    (root / "data.jsonl").write_text(json.dumps({"id": "a", "videos": [name], "solution": ["happy"]}) + "\n")
    monkeypatch.chdir(root)  # FFmpeg takes `pipe:0` or `file:x.mp4` as an address where no folder stands before it
    for file in (root / "data.jsonl", "data.jsonl"):
        (record,) = read_records(file)
        with ClipLoader(MEDIA, ThinkerConfig.tiny().vision, 128) as loader:
            assert len(loader.load(record).videos) == 1
    assert clip_strips([name], root)[0].problem is None


def test_links_inside_the_root_are_followed_and_others_are_not(root):
    outside = root.parent / "private"
    (root / "inner").mkdir()
    os.symlink(root / "good.mp4", root / "inner" / "link.mp4")
    os.symlink("inner", root / "folder")
    os.symlink(root, root.parent / "alias")  # the root itself may be a link
    for path, top in ((root / "folder/link.mp4", root), (root.parent / "alias/folder/link.mp4", root.parent / "alias")):
        assert len(decoded(path, top).arrays["frames"]) == 4
    os.symlink(outside / "clip.mp4", root / "out.mp4")
    os.symlink("../private", root / "out")
    os.symlink("out.mp4", root / "twice.mp4")
    os.symlink("/proc/self/environ", root / "environ.mp4")
    os.symlink("circle.mp4", root / "circle.mp4")
    for name in ("out.mp4", "out/clip.mp4", "twice.mp4", "environ.mp4", "circle.mp4", "../private/clip.mp4"):
        error = refusal(root / name, root)
        assert error.reason == "outside" and str(root) in error.expected
    assert len(decoded(root / "out.mp4").arrays["frames"]) == 4  # a file its user names himself has no root


def test_a_clip_named_by_its_user_may_be_a_link(root):
    """A single clip to answer about: no data file of somebody else's names it."""
    os.symlink(root.parent / "private" / "clip.mp4", root / "mine [1].mp4")
    record = clip_record(root / "mine [1].mp4", "Why?", None, frames=True, audio=False)
    with ClipLoader(MEDIA, ThinkerConfig.tiny().vision, 128) as loader:
        assert len(loader.load(record).videos) == 1
    assert record.id == "mine [1].mp4"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_put_there_after_the_records_were_read(root, tmp_path, what, cached):
    (root / "inner").mkdir()
    shutil.copy(root / "good.mp4", root / "inner" / "clip.mp4")
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "x", "videos": ["inner/clip.mp4"], "solution": ["sad"]}) + "\n")
    (record,) = read_records(tmp_path / "x.jsonl", root)
    replace_by_link(root, what)
    cache = tmp_path / "cache" if cached else ""
    with (
        ClipLoader(MEDIA, ThinkerConfig.tiny().vision, 128, cache, root) as loader,
        pytest.raises(MediaError, match="leads to") as caught,
    ):
        loader.load(record)
    assert caught.value.reason == "outside"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_put_there_between_check_and_opening(root, monkeypatch, what):
    """The race itself: the path is resolved and found inside the root, then changed, then opened."""
    (root / "inner").mkdir()
    shutil.copy(root / "good.mp4", root / "inner" / "clip.mp4")
    swapped = []

    def swap(place, detail=""):
        if place == "media_path_resolved":
            swapped.append(detail)
            replace_by_link(root, what)

    monkeypatch.setattr(faults, "here", swap)
    error = refusal(root / "inner" / "clip.mp4", root)
    assert error.reason == "outside" and "a symbolic link" in error.found and len(swapped) == 1


def test_a_clip_replaced_while_it_is_read_is_read_to_its_end(root, monkeypatch):
    """Both passes over a video read the descriptor that was opened."""
    opened = av.open

    def replaced(*arguments, **options):
        (root / "good.mp4").unlink(missing_ok=True)
        os.symlink(root.parent / "private" / "clip.ts", root / "good.mp4")
        return opened(*arguments, **options)

    monkeypatch.setattr(av, "open", replaced)
    frames = decoded(root / "good.mp4", root).arrays["frames"]
    assert frames[0].mean() == pytest.approx(30, abs=4) and frames[-1].mean() == pytest.approx(220, abs=4)


def replace_by_link(root, what: str) -> None:
    """Puts a link out of the root in the place of inner/clip.mp4, or of its folder."""
    shutil.rmtree(root / "inner")
    if what == "folder":
        os.symlink(root.parent / "private", root / "inner")
    else:
        (root / "inner").mkdir()
        os.symlink(root.parent / "private" / "clip.mp4", root / "inner" / "clip.mp4")


@pytest.mark.parametrize("kind", ["video", "audio", "image"])
def test_what_is_no_regular_file_is_named_and_never_waited_for(root, kind):
    os.mkfifo(root / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(root)  # a socket's path must be short
        listening.bind("socket.mp4")
        assert refusal(root / "socket.mp4", root, kind).found == "a socket"
    assert refusal(root / "pipe.mp4", root, kind).found == "a named pipe"
    assert refusal("/dev/zero", kind=kind).found == "a device"
    assert refusal(root / ("a" * 5000 + ".mp4"), root, kind).reason == "missing"
    assert refusal(root / "good.mp4" / "more.mp4", root, kind).reason == "missing"
    assert refusal(root / "nul\0.mp4", root, kind).reason == "missing"


def test_a_huge_file_is_refused_before_it_is_read(root, tmp_path):
    os.truncate(root / "good.mp4", 1 << 36)
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "x", "videos": ["good.mp4"], "solution": ["sad"]}) + "\n")
    (record,) = read_records(tmp_path / "x.jsonl", root)
    with (
        ClipLoader(MEDIA, ThinkerConfig.tiny().vision, 128, tmp_path / "cache", root) as loader,
        pytest.raises(MediaError, match="a file of 64.0 GiB") as caught,
    ):
        loader.load(record)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "tiff", "avif", "ppm", "jp2"])
def test_usual_pictures_are_read_whatever_they_are_called(tmp_path, ending):
    Image.new("RGB", (56, 56), (200, 10, 10)).save(tmp_path / f"a.{ending}")
    os.rename(tmp_path / f"a.{ending}", tmp_path / "a.jpg")
    assert decoded(tmp_path / "a.jpg", tmp_path, "image").arrays["frames"].shape == (1, 56, 56, 3)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (HLS.encode(), "playlist"),
    ],
)
def test_other_pictures_are_named(tmp_path, data, word):
    (tmp_path / "a.png").write_bytes(data)
    assert word in refusal(tmp_path / "a.png", tmp_path, "image").found


@pytest.mark.parametrize("kind", ["image", "video"])
def test_picture_bombs_are_refused_by_their_size(tmp_path, kind):
    if kind == "image":
        Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
        assert refusal(tmp_path / "bomb.png", tmp_path, kind).reason == "bad_size"
    else:
        big = np.zeros((8192, 8192, 3), np.uint8)
        write_video(tmp_path / "bomb.mkv", big[None], codec="mjpeg", pix_fmt="yuvj420p")
        error = refusal(tmp_path / "bomb.mkv", tmp_path)
        assert error.reason == "bad_size" and "8192x8192" in error.found


@pytest.mark.parametrize("text", [HLS, "ffconcat version 1.0\nfile '{}'\n"])
def test_the_report_reads_no_playlist_and_no_link_either(root, text):
    (root / "list.m3u8").write_text(text.replace("{}", str(root.parent / "private" / "clip.ts")))
    os.symlink(root.parent / "private" / "clip.mp4", root / "out.mp4")
    listed, linked, good, gone = clip_strips(["list.m3u8", "out.mp4", "good.mp4", "gone.mp4"], root)
    assert listed.source is None and "list.m3u8 cannot be shown: a " in listed.problem
    assert linked.source is None and "media root" in linked.problem
    assert good.source.startswith("data:image/jpeg;base64,") and good.seconds == pytest.approx(0.5)
    assert gone.problem == "gone.mp4 is not in the media folder"
