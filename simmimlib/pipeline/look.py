"""Looks at a folder of images, before anything is chosen for it: layout, counts, sizes, channels, what is wrong."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

import numpy as np
from PIL import Image

from simmimlib.data.sources import MODES, Source, image_folder, read_image
from simmimlib.machine.device import cores
from simmimlib.settings import require

DECODED = 5000  # images decoded, the first of a fixed shuffle; all of a smaller folder
COMPARED = 10_000  # validation files, likewise, compared with all training files
HALF_COPIED = 0.1  # a folder with a larger share of unreadable files is refused


@dataclass(frozen=True)
class Look:
    """What was found.

    ``sizes`` [n, 2] are width and height of the readable ones of the ``decoded`` images; ``kinds`` counts "grey",
    "RGB", "RGBA" (something is transparent) and "array of 7" (channels of a ``.npy``). ``unreadable`` has a line for
    each file that packing would stop at; ``duplicates`` are pairs of a validation file, of the ``compared``, and a
    training file with the same bytes.
    """

    source: Source
    decoded: int
    unreadable: list[str]
    sizes: np.ndarray
    kinds: Counter[str]
    compared: int
    duplicates: list[tuple[str, str]]

    @property
    def counts(self) -> np.ndarray:
        """Training images of each class; of a set without classes, one number."""
        return self._of_each_class(self.source.train)

    @property
    def validation_counts(self) -> np.ndarray:
        """The same of the validation images."""
        return self._of_each_class(self.source.val)

    def _of_each_class(self, images: list) -> np.ndarray:
        return np.bincount([max(label, 0) for _, label in images], minlength=len(self.source.classes))

    @property
    def labelled(self) -> bool:
        return len(self.source.classes) > 1

    @property
    def side(self) -> int:
        """Median of the images' shorter sides, pixels."""
        return int(np.median(self.sizes.min(1)))

    @property
    def channels(self) -> int:
        """To pack with: as many as the arrays have; of image files 1 if all are grey, 4 if half of them or more are
        transparent somewhere, else 3.

        Raises:
            ValueError: arrays of several numbers of channels, or beside image files that cannot have theirs.
        """
        found = Counter({int(kind.split()[-1]): n for kind, n in self.kinds.items() if kind.startswith("array")})
        files = sum(self.kinds.values()) - sum(found.values())
        if found:
            fits = len(found) == 1 and (not files or next(iter(found)) in MODES)
            require(fits, "images", self.told_kinds(), "of one number of channels (beside image files 1, 3 or 4)")
            return next(iter(found))
        if 2 * self.kinds["RGBA"] >= files:
            return 4
        return 1 if self.kinds["grey"] == files else 3

    def told_kinds(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())

    def lines(self) -> list[str]:
        """What was found, for people."""
        source, counts = self.source, self.counts
        count = f"{len(source.train)} training and {len(source.val)} validation images"
        if self.labelled:
            spread = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.min()}"
            found = [f"{count} of {len(source.classes)} classes, {spread} training images each"]
        else:
            found = [f"{count}, {'all of one class' if source.classes else 'without classes'}"]
        if other := source.other_files:
            some = ", ".join(other[:3]) + ", ..." * (len(other) > 3)
            found.append(f"{len(other)} other files, without an image's extension, are left out ({some})")
        all_of_them = "all" if self.decoded == len(source.train) + len(source.val) else "a sample of"
        (low_w, low_h), (w, h) = self.sizes.min(0), np.median(self.sizes, 0).astype(int)
        found.append(
            f"decoded {all_of_them} {self.decoded}: {self.told_kinds()}; median {w} x {h} pixels, "
            f"least {low_w} x {low_h}"
        )
        if source.val:
            all_of_them = "all" if self.compared == len(source.val) else "a sample of"
            found.append(
                f"compared {all_of_them} {self.compared} validation files with the training files: "
                f"{len(self.duplicates)} are there byte for byte"
            )
        return found


def look(images: str) -> Look:
    """Reads a folder by the rules of ``data/sources.py`` (``image_folder``).

    Raises:
        ValueError: no folder, no images, or so many unreadable ones that it seems to be half copied.
    """
    source = image_folder(images)
    items = source.train + source.val
    paths = [items[i][0] for i in _shuffled(len(items), DECODED)]
    with ThreadPoolExecutor(cores()) as pool:
        looked = list(zip(paths, pool.map(_look_at, paths), strict=True))
    unreadable = [f"{path}: {why}" for path, (_, _, why) in looked if why]
    if len(unreadable) > HALF_COPIED * len(paths):
        raise ValueError(
            f"images = {images!r}: {len(unreadable)} of the {len(paths)} images looked at cannot be read, as in a "
            "folder that is half copied. Mend or remove them:\n  " + "\n  ".join(unreadable[:10])
        )
    sizes, kinds = zip(*((size, kind) for _, (size, kind, why) in looked if not why), strict=True)
    compared = [source.val[i][0] for i in _shuffled(len(source.val), COMPARED)]
    twice = same_files(compared, [path for path, _ in source.train])
    return Look(source, len(paths), unreadable, np.array(sizes), Counter(kinds), len(compared), twice)


def same_files(some: list[str], others: list[str]) -> list[tuple[str, str]]:
    """Pairs of a file of ``some`` and one of ``others`` with the same bytes; only files of equal sizes are read."""
    with ThreadPoolExecutor(cores()) as pool:
        sizes, other_sizes = (list(pool.map(os.path.getsize, paths)) for paths in (some, others))
        both = set(sizes) & set(other_sizes)
        some, others = (
            [path for path, size in zip(paths, found, strict=True) if size in both]
            for paths, found in ((some, sizes), (others, other_sizes))
        )
        known = dict(zip(pool.map(_hash, others), others, strict=True))
        hashes = list(pool.map(_hash, some))
    return [(path, known[found]) for path, found in zip(some, hashes, strict=True) if found in known]


def samples(found: Look, classes: int = 10, each: int = 8, side: int = 96) -> dict[str, np.ndarray]:
    """Class -> its first readable training images, [n, side, side, C] in [0, 1]: the square in the middle of each."""
    rows = {}
    for label, name in list(enumerate(found.source.classes or ["images"]))[:classes]:
        paths = [path for path, of in found.source.train if max(of, 0) == label][:each]
        rows[name] = np.stack([_square(path, found.channels, side) for path in paths if not _look_at(path)[2]]) / 255
    return rows


def _square(path: str, channels: int, side: int) -> np.ndarray:
    image = read_image(path, channels)
    height, width, _ = image.shape
    least = min(height, width)
    top, left = (height - least) // 2, (width - least) // 2
    bands = np.moveaxis(image[top : top + least, left : left + least], 2, 0)
    return np.stack([np.asarray(Image.fromarray(band).resize((side, side))) for band in bands], axis=2)


def _hash(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file_digest(file, "blake2b").digest()


def _look_at(path: str) -> tuple[tuple[int, int], str, str]:
    """Width and height, kind, and why packing would stop at it ("" = it would not)."""
    try:
        if path.endswith(".npy"):
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            image = read_image(path, shape[2] if len(shape) == 3 else 1)
            kind = f"array of {image.shape[2]}"
        else:
            image = read_image(path, 4)
            kind = "RGBA" if image[..., 3].min() < 255 else "RGB" if np.ptp(image[..., :3], axis=2).any() else "grey"
        return (image.shape[1], image.shape[0]), kind, ""
    except Exception as error:  # damaged files make decoders raise all kinds
        return (0, 0), "", str(error).replace("\n", " ")


def _shuffled(count: int, most: int) -> list[int]:
    return np.random.default_rng(0).permutation(count)[:most].tolist()
