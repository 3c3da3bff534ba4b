"""Packing (paper section 4): every image is decoded once, into the uint8 arrays that ``packed.py`` reads.

It resumes where it was interrupted, names every unreadable file, and writes the packed folder whole or not at all.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from simmimlib.data.decoding import decode_split, update, write_header
from simmimlib.data.sources import DataSettings, find_images
from simmimlib.machine.files import read_json


def pack(settings: DataSettings, timeout: float = 0) -> dict:
    """Decodes every image once and writes the packed folder ``settings.out``, whole or not at all.

    Works in ``.<name>.partial`` beside that folder. It stays when packing is interrupted or stops at unreadable files,
    and the next call resumes: images before the first file that is new, changed or mended are not decoded again.

    Args:
        timeout: seconds to wait for another process that packs into the same folder, whose result is then taken.

    Returns the manifest.

    Raises:
        ValueError: unreadable files (all are counted, ten named), or none is left to train on.
        OSError: the disk has too little space.
        RuntimeError: another process packs into the same folder.
    """
    out = Path(settings.out).resolve()  # so that a link to another disk stays one
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out.with_name(f".{out.name}.lock"), timeout=timeout):
            packed = read_json(out / "manifest.json") if timeout else {}
            return packed if "digest" in packed else _pack(settings, out)
    except Timeout as error:
        raise RuntimeError(
            f"out = {settings.out!r}: another process is packing into this folder; wait for it"
        ) from error


def _pack(settings: DataSettings, out: Path) -> dict:
    source = find_images(settings)
    train, val = source.train, source.val
    if settings.holdout_per_class:
        held = set(_first_of_each_class(train, settings.holdout_per_class))
        val = [train[i] for i in sorted(held)]
        train = [item for i, item in enumerate(train) if i not in held]
    limits = {"train": (train, settings.train_per_class), "val": (val, settings.val_per_class)}
    splits = {
        name: [items[i] for i in _first_of_each_class(items, limit)] if limit else items
        for name, (items, limit) in limits.items()
    }
    partial, old = (out.with_name(f".{out.name}.{kind}") for kind in ("partial", "old"))
    _check_space(splits, partial, settings)
    partial.mkdir(exist_ok=True)
    done = {name: decode_split(items, partial / name, settings) for name, items in splits.items()}
    unreadable = {name: [line for chunk in done[name] for line in chunk["unreadable"]] for name in splits}
    lines = unreadable["train"] + unreadable["val"]
    if lines and settings.corrupt == "stop":
        raise ValueError(
            f"{len(lines)} of {len(splits['train']) + len(splits['val'])} files are unreadable; mend or remove "
            'them, or leave them out with corrupt = "skip" (what is decoded is kept for the next run):\n  '
            + _first(lines)
        )
    counts = {name: len(splits[name]) - len(unreadable[name]) for name in splits}
    if not counts["train"]:
        raise ValueError(f"none of the {len(splits['train'])} training images can be read:\n  {_first(lines)}")
    if settings.statistics == "imagenet":
        mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    else:
        mean, std = _statistics(done["train"], counts["train"] * settings.size**2)
    manifest = {
        "data": source.name,
        "classes": source.classes,
        **counts,
        "unreadable": {name: len(unreadable[name]) for name in splits},
        "other_files": len(source.other_files),  # left out: no image's extension
        "size": settings.size,
        "channels": settings.channels,
        "mean": mean,
        "std": std,
        "digest": _digest(splits, done),
        "settings": settings.identity(),
    }
    for name, items in splits.items():
        _finish_split(items, partial / name, done[name], settings)
    (partial / "unreadable.txt").write_bytes(os.fsencode("".join(f"{line}\n" for line in lines)))
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for path in partial.iterdir():
        with update(path) as file:
            os.fsync(file.fileno())
    # Killed between these lines, the old folder and the new one are whole under one name or another. The logs of what
    # is done go last, so that the next call then only does this again.
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    partial.replace(out)
    for name in splits:
        (out / f"{name}_done.jsonl").unlink()
    shutil.rmtree(old, ignore_errors=True)
    return manifest


def _first_of_each_class(items: list, count: int) -> list[int]:
    """Positions, in order, of the first ``count`` items of each class in a fixed shuffle."""
    kept, seen = [], {}  # type: ignore[var-annotated]
    for i in np.random.default_rng(0).permutation(len(items)).tolist():
        label = items[i][1]
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= count:
            kept.append(i)
    return sorted(kept)


def _first(lines: list[str]) -> str:
    more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
    return "\n  ".join(lines[:10]) + more


def _check_space(splits: dict, partial: Path, settings: DataSettings) -> None:
    needed = 0
    for name, items in splits.items():
        images = partial / f"{name}_images.npy"
        there = images.stat().st_size if images.exists() else 0
        image = settings.size**2 * settings.channels + 256  # for label, size, file name and log
        needed += max(0, len(items) * image - there)
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise OSError(
            f"{partial.parent}: packing needs {needed / 1e9:.2f} GB more there, but only {free / 1e9:.2f} GB are free; "
            "make space, or give `out` on another disk"
        )


def _finish_split(items: list, prefix: Path, done: list[dict], settings: DataSettings) -> None:
    """Cuts the images to those that were readable, and writes the small arrays."""
    sizes = np.concatenate([np.zeros((0, 2)), *(chunk["sizes"] for chunk in done)]).astype(np.int32)
    kept = np.flatnonzero(sizes[:, 0])
    files = [b"" if isinstance(items[i][0], np.ndarray) else os.fsencode(items[i][0]) for i in kept]
    np.save(f"{prefix}_sizes.npy", sizes[kept])
    np.save(f"{prefix}_labels.npy", np.array([items[i][1] for i in kept], dtype=np.int64))
    np.save(f"{prefix}_files.npy", np.array(files, dtype=np.bytes_))
    shape = (len(kept), settings.size, settings.size, settings.channels)
    with update(f"{prefix}_images.npy") as images:
        images.truncate(write_header(images, shape) + math.prod(shape))


def _digest(splits: dict, done: dict) -> str:
    """Sixteen hexadecimal digits that follow from the labels and pixels of all images, in their order.

    Files that were left out have no say.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, items in splits.items():
        widths = [width for chunk in done[name] for width, _ in chunk["sizes"]]
        labels = [label for (_, label), width in zip(items, widths, strict=True) if width]
        digest.update(f"{name} {labels} {[pixels for chunk in done[name] for pixels in chunk['pixels']]}".encode())
    return digest.hexdigest()


def _statistics(chunks: list[dict], pixels: int) -> tuple[list, list]:
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1]."""
    total, squares = sum(np.array(chunk["sums"]) for chunk in chunks) / pixels  # type: ignore[misc]
    mean = total / 255
    std = np.sqrt(np.maximum(squares / 255**2 - mean**2, 1e-12))
    return [round(float(v), 6) for v in mean], [round(float(v), 6) for v in std]
