"""The other libraries that moekit is compared with: which a subject knows, and whether they are installed."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence

from moekit.config.errors import ConfigError, MissingExtraError, nearest

# distribution: the extra of moekit that installs it, and the oldest major version whose interface is the one called
PEERS = {
    "transformers": {"transformers": 5},
    "llama-cpp": {"llama-cpp-python": 0, "gguf": 0},
    "dense": {},
}
SUBJECTS = {
    "layer": ("transformers", "dense"),
    "decode": ("transformers",),
    "step": ("transformers", "dense"),
    "model": ("transformers", "llama-cpp"),
}


def parse_peers(subject: str, text: str) -> tuple[str, ...]:
    """The peers of `--against`, a list with commas, or "none".

    Raises:
        ConfigError: a name that the subject does not know.
        MissingExtraError: a peer that is not installed, with the command that installs it.

    >>> parse_peers("layer", "dense"), parse_peers("step", "none")
    (('dense',), ())
    """
    known = SUBJECTS[subject]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--against must list peers of bench {subject}, or be none; got {name!r}. {nearest(name, known)}"
            )
    for name in names:
        _require_installed(subject, name, [other for other in names if other != name])
    return tuple(dict.fromkeys(names))


def installed_version(distribution: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(peers: Sequence[str]) -> dict[str, str | None]:
    """Version of each distribution behind the peers."""
    return {name: installed_version(name) for peer in peers for name in PEERS[peer]}


def _require_installed(subject: str, peer: str, others: Sequence[str]) -> None:
    remedy = f"pip install 'moekit[{peer}]', or leave it out: --against {','.join(others) or 'none'}"
    for distribution, oldest in PEERS[peer].items():
        version = installed_version(distribution)
        if version is None:
            raise MissingExtraError(
                f"bench {subject} --against {peer} needs {distribution}. Install it: {remedy}"
            )
        major = re.match(r"\d+", version)
        if major and int(major.group()) < oldest:
            raise MissingExtraError(
                f"bench {subject} --against {peer} needs {distribution} {oldest} or newer; {version} is installed. "
                f"Upgrade it: {remedy}"
            )
