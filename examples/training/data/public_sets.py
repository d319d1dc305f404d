"""Public data sets that `--data` names: where their files lie already, and from where they are downloaded.

Files are used where they lie: in `data/NAME` below the current folder, there or in `data` as torchvision lays them out,
or in /usr/share/datasets, where Debian's packages have them. Else they are downloaded into `data/NAME`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from training.data.download import RemoteFile, Unavailable, download, sha256
from training.runs.kernel_lock import KernelLock

HERE, SYSTEM = Path("data"), Path("/usr/share/datasets")
LABELS = "train-labels-idx1-ubyte"


class PublicSet(NamedTuple):
    """A data set: the name that people know, its terms, its files, and its classes if the files have only numbers."""

    title: str
    terms: str  # in a few words, with a source
    files: tuple[RemoteFile, ...]
    classes: tuple[str, ...] = ()
    torchvision: str = ""  # the folder in which it keeps them, below the one that it is given
    debian: str = ""  # the package that has them
    other_labels: tuple[str, ...] = ()  # SHA-256 of the training labels in other forms: packed again, or not packed


def _files(folder: str, *files: tuple[str, int, str]) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(folder + name, size, digest) for name, size, digest in files)


# Sizes and checksums are those that TensorFlow Datasets has published (url_checksums).
SETS = {
    "mnist": PublicSet(
        "MNIST",
        "CC BY-SA 3.0, Yann LeCun and Corinna Cortes",
        _files(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",  # of PyTorch: its authors' own page has no files any more
            (f"{LABELS}.gz", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            ("t10k-labels-idx1-ubyte.gz", 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
            ("t10k-images-idx3-ubyte.gz", 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            ("train-images-idx3-ubyte.gz", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ),
        torchvision="MNIST/raw",
    ),
    "fashion-mnist": PublicSet(
        "Fashion-MNIST",
        "MIT license, Zalando SE, https://github.com/zalandoresearch/fashion-mnist",
        _files(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            (f"{LABELS}.gz", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            ("t10k-labels-idx1-ubyte.gz", 5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
            ("t10k-images-idx3-ubyte.gz", 4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            (
                "train-images-idx3-ubyte.gz",
                26421880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
        ),
        classes=(
            "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
        ),
        torchvision="FashionMNIST/raw",
        debian="dataset-fashion-mnist",
        other_labels=(
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",  # Debian's
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",  # not packed
        ),
    ),
    "kmnist": PublicSet(
        "Kuzushiji-MNIST",
        'CC BY-SA 4.0, "KMNIST Dataset" (created by CODH), adapted from "Kuzushiji Dataset" (created by NIJL and '
        "others), doi:10.20676/00000341",
        _files(
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
            (f"{LABELS}.gz", 29497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
            ("t10k-labels-idx1-ubyte.gz", 5120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
            ("t10k-images-idx3-ubyte.gz", 3041136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
            (
                "train-images-idx3-ubyte.gz",
                18165135,
                "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            ),
        ),
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        torchvision="KMNIST/raw",
    ),
    "cifar10": PublicSet(
        "CIFAR-10",
        "no license is stated; its authors ask to cite Krizhevsky, Learning Multiple Layers of Features from Tiny "
        "Images, 2009",
        _files(
            "https://www.cs.toronto.edu/~kriz/",
            (
                "cifar-10-binary.tar.gz",
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
    ),
}  # fmt: skip

CELEBA = "celeba"
CELEBA_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
# As they come from the project's page (whose folder on the drive has Img), from torchvision, and from Kaggle.
CELEBA_PLACES = (
    "img_align_celeba.zip",
    "img_align_celeba",
    "Img/img_align_celeba.zip",
    "Img/img_align_celeba",
    "celeba-dataset.zip",
    "archive.zip",
)
NAMES = (*SETS, CELEBA)
LIKE_MNIST = ("mnist", "fashion-mnist", "kmnist")


def public_files(name: str) -> Path:
    """The folder or archive with the files of the data set of this name, downloaded if they lie nowhere yet.

    Raises:
        ValueError: if it cannot be downloaded. The message says which files to put where.
        OSError: if it cannot be written.
    """
    if Path(name).exists():
        print(f"--data {name} is the public data set; for what is here, give ./{name}", file=sys.stderr, flush=True)
    if name == CELEBA:
        return _celeba()
    known = SETS[name]
    found = next((place for place in _places(name) if not _missing(known, place)), None)
    if found is None:
        found = HERE / name
        _download(name, known, found)
    return found / _name(known.files[0]) if len(known.files) == 1 else found


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the classes if a folder has MNIST's files of a public data set, which its training labels tell."""
    digests = {sha256(path) for path in (folder / LABELS, folder / f"{LABELS}.gz") if path.is_file()}
    for known in SETS.values():
        if digests & {*known.other_labels, *(file.sha256 for file in known.files)}:
            return known.classes
    return ()


def _places(name: str) -> Iterator[Path]:
    known = SETS[name]
    yield HERE / name
    if known.torchvision:
        yield HERE / name / known.torchvision
    yield HERE / known.torchvision  # its root= is most often data, where others have archives too
    yield SYSTEM / name


def _name(file: RemoteFile) -> str:
    return file.address.rsplit("/", 1)[-1]


def _forms(file: RemoteFile) -> tuple[str, ...]:
    """The names that a file may have: MNIST's are read packed or not."""
    name = _name(file)
    return (name, name.removesuffix(".gz")) if name.endswith("-ubyte.gz") else (name,)


def _missing(known: PublicSet, folder: Path) -> list[RemoteFile]:
    """The files that are not in a folder."""
    return [file for file in known.files if not any((folder / form).is_file() for form in _forms(file))]


def _download(name: str, known: PublicSet, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = KernelLock(folder / "download.lock")
    except OSError as error:
        raise OSError(f"--data {name}: cannot write into {folder.resolve()}: {error.strerror}") from None
    with closing(lock):
        locked = lock.wait(f"downloads {known.title}")
        missing = _missing(known, folder)  # by now, another process may have downloaded them
        if missing:
            size = sum(file.size for file in missing)
            print(f"{known.title}: {size:,} bytes into {folder.resolve()}; {known.terms}", file=sys.stderr, flush=True)
        for file in missing:
            path = folder / _name(file)
            # Without a lock two processes could write into one file.
            part = path.with_name(f"{path.name}.part" if locked else f"{path.name}.{os.getpid()}.part")
            try:
                download(file, path, part)
            except Unavailable as error:
                raise ValueError(f"--data {name}: {error}. {_advice(known, folder)}") from None
        if locked:
            lock.clear()


def _advice(known: PublicSet, folder: Path) -> str:
    missing = _missing(known, folder)
    files = ", ".join(f"{_name(file)} ({file.size:,} bytes)" for file in missing)
    source = missing[0].address.removesuffix(_name(missing[0]))
    debian = f" (or install Debian's package {known.debian})" if known.debian else ""
    return f"If it cannot be reached from here, put {files} from {source} into {folder.resolve()}{debian}"


def _celeba() -> Path:
    folder = HERE / CELEBA
    for place in (folder / name for name in CELEBA_PLACES):
        if place.exists():
            return place
    raise ValueError(
        f"--data {CELEBA}: its place is a shared drive, from which no script can download: get img_align_celeba.zip "
        f"(1,443,490,838 bytes), and for attributes list_attr_celeba.txt, from {CELEBA_PAGE} and put them into "
        f"{folder.resolve()}; its terms allow non-commercial research alone"
    )
