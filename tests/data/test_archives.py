"""Unpacking refuses whatever could leave its folder, and leaves nothing behind that was not asked for."""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from moekit.config.errors import DataError
from moekit.data import archives
from moekit.data.archives import unpack


def test_files_that_match_are_written_and_others_are_not(make_tar, tmp_path: Path) -> None:
    archive = make_tar({"a/text/1.txt": "one", "a/text/2.py": "two", "a/setup.py": "raise SystemExit"})
    target = tmp_path / "out"
    assert unpack(archive, target, ("*/text/*.txt",)) == ["a/text/1.txt"]
    assert [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()] == [
        "a/text/1.txt"
    ]
    assert (target / "a/text/1.txt").read_text() == "one"


@pytest.mark.parametrize(
    "name",
    ["../evil.txt", "a/../../evil.txt", "/tmp/moekit-evil.txt", "a\\..\\evil.txt", "C:/evil.txt", "a/.."],
)
def test_paths_that_leave_the_folder_are_refused(make_tar, tmp_path: Path, name: str) -> None:
    archive = make_tar({"good.txt": "fine", name: "evil"})
    with pytest.raises(DataError, match="would leave its folder"):
        unpack(archive, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil*"))


def test_a_bad_member_refuses_the_archive_even_where_it_is_not_wanted(make_tar, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="would leave"):
        unpack(make_tar({"../x": "evil", "good.txt": "fine"}), tmp_path / "out", ("*.txt",))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(make_tar, tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("innocent.txt")
    info.type = kind
    info.linkname = "/etc/passwd"
    with pytest.raises(DataError, match="link or a device"):
        unpack(make_tar({"good.txt": "fine"}, info), tmp_path / "out")
    assert not (tmp_path / "out/innocent.txt").exists()


def test_a_hard_link_that_is_not_asked_for_is_passed_by(make_tar, tmp_path: Path) -> None:
    info = tarfile.TarInfo("same.css")
    info.type = tarfile.LNKTYPE
    info.linkname = "good.css"
    archive = make_tar({"good.css": "fine", "good.txt": "fine"}, info)
    assert unpack(archive, tmp_path / "out", ("*.txt",)) == ["good.txt"]
    with pytest.raises(DataError, match="link or a device"):
        unpack(archive, tmp_path / "again", ("*.css",))
    info.type = tarfile.SYMTYPE
    with pytest.raises(DataError, match="link or a device"):
        unpack(make_tar({"good.txt": "fine"}, info), tmp_path / "third", ("*.txt",))


def test_a_member_that_comes_twice_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "double.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for text in (b"first", b"second"):
            info = tarfile.TarInfo("same.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    with pytest.raises(DataError, match="comes twice"):
        unpack(archive, tmp_path / "out")


def test_zip_members_are_held_to_the_same_rules(tmp_path: Path) -> None:
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("ok/a.txt", "fine")
    assert unpack(archive, tmp_path / "out") == ["ok/a.txt"]
    with zipfile.ZipFile(archive, "a") as zipped:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        zipped.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="link or a device"):
        unpack(archive, tmp_path / "out2")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as zipped:
        zipped.writestr("../../evil.txt", "x")
    with pytest.raises(DataError, match="would leave"):
        unpack(tmp_path / "b.zip", tmp_path / "out3")


def test_bombs_are_refused_while_they_unpack(
    make_tar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1000)
    with pytest.raises(DataError, match="more than 1000 bytes"):
        unpack(make_tar({"a.txt": "x" * 1001}), tmp_path / "out")
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 1500)
    with pytest.raises(DataError, match="unpacks to more"):
        unpack(make_tar({"a.txt": "x" * 900, "b.txt": "x" * 900}), tmp_path / "out2")
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    with pytest.raises(DataError, match="more than 3 members"):
        unpack(make_tar({f"{i}.txt": "x" for i in range(4)}), tmp_path / "out3")


def test_cut_off_and_foreign_files_are_refused(make_tar, tmp_path: Path) -> None:
    whole = make_tar({"a.txt": "".join(chr(33 + i * i % 90) for i in range(20_000))}).read_bytes()
    half = tmp_path / "half.tar.gz"
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a complete archive"):
        unpack(half, tmp_path / "out")
    for data in (b"not an archive", gzip.compress(b"not a tar" * 100)):
        half.write_bytes(data)
        with pytest.raises(DataError, match="not a complete archive"):
            unpack(half, tmp_path / "out2")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")
def test_deb_archives_are_unpacked_without_their_scripts(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: thing\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.invalid>\nDescription: x\n"
    )
    script = tree / "DEBIAN/postinst"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o755)
    (tree / "usr/share").mkdir(parents=True)
    (tree / "usr/share/text.txt").write_text("from a deb")
    archive = tmp_path / "thing.deb"
    command = ["dpkg-deb", "--build", "--root-owner-group", str(tree), str(archive)]
    subprocess.run(command, check=True, capture_output=True)
    assert unpack(archive, tmp_path / "out", ("usr/share/*",)) == ["usr/share/text.txt"]
    assert (tmp_path / "out/usr/share/text.txt").read_text() == "from a deb"
    assert not (tmp_path / "ran").exists()
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(DataError):
        unpack(archive, tmp_path / "out2")
