"""Paths of a record name files below the media root, whatever they look like and wherever links lead."""

from __future__ import annotations

import os

import pytest
from support.record_files import GOOD, fault

from mer_r1_jax.data.records import read_records


@pytest.mark.parametrize(
    "path",
    [
        "../a.mp4",
        "x/../../a.mp4",
        "x\\..\\a.mp4",
        "/etc/passwd",
        "~/a.mp4",
        "C:\\a.mp4",
        "C:/a.mp4",
        "HTTPS://host/a.mp4",
        "s3://bucket/a.mp4",
        "data:,AA",
        "\\\\host\\a.mp4",
        "http://host/a.mp4",
        "file:///a.mp4",
        "//host/a.mp4",
        "data:video/mp4;base64,AA",
        "",
        " ",
        ".",
        "a\nb.mp4",
        "a\x00.mp4",
    ],
)
def test_media_paths_stay_inside_the_media_root(write, path):
    problem = fault(write({**GOOD, "videos": [path]}))
    assert problem.field == "videos[0]"
    assert "media root" in problem.expected


def test_a_symbolic_link_may_not_leave_the_media_root(write, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inner").mkdir(parents=True)
    outside.mkdir()
    (outside / "a.mp4").touch()
    (root / "inner" / "b.mp4").touch()
    os.symlink(outside / "a.mp4", root / "link.mp4")
    os.symlink(outside, root / "folder")
    os.symlink(root / "inner" / "b.mp4", root / "fine.mp4")
    for path in ("link.mp4", "folder/a.mp4"):
        problem = fault(write({**GOOD, "videos": [path]}), media_root=root)
        assert str(outside / "a.mp4") in problem.got
        assert "symbolic link" in problem.mend
    assert read_records(write({**GOOD, "videos": ["fine.mp4"]}), root)[0].videos == ("fine.mp4",)


def test_a_folder_whose_name_begins_like_the_root_is_outside(write, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root2").mkdir()
    os.symlink(tmp_path / "root2", tmp_path / "root" / "x")
    problem = fault(write({**GOOD, "videos": ["x/a.mp4"]}), media_root=tmp_path / "root")
    assert problem.field == "videos[0]" and str(tmp_path / "root2" / "a.mp4") in problem.got
