"""Decoding (paper section 4): image files to rows of one array, chunk by chunk, resumed where it was interrupted."""

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from simmimlib.data.sources import DataSettings, read_image
from simmimlib.machine.device import cores
from simmimlib.machine.progress import interactive

CHUNK = 1024  # images decoded between two marks of what is done: little is lost by a kill, little time by marking
CHUNK_BYTES = 2**26  # fewer where images are large: two chunks are in memory at a time


def decode_split(items: list, prefix: Path, settings: DataSettings) -> list[dict]:
    """Appends the readable images to ``<prefix>_images.npy``, chunk by chunk, after those that are done already.

    Written with plain writes, not through a memory map: this needs no memory, and a full disk is an error, not SIGBUS.

    Returns for each chunk what its line in ``<prefix>_done.jsonl`` holds: "identity" of its items, "sizes" [n, 2]
    (0 = unreadable), "sums" [2, C], the sum over all pixels of v and of v², "unreadable", a line for each such file,
    "pixels", a hash of each of its rows.
    """
    shape = (settings.size, settings.size, settings.channels)
    row = math.prod(shape)  # bytes
    step = max(1, min(CHUNK, CHUNK_BYTES // row))
    chunks = [[item for item, _ in items[i : i + step]] for i in range(0, len(items), step)]
    pool = ThreadPoolExecutor(cores())
    with update(f"{prefix}_images.npy") as images, update(f"{prefix}_done.jsonl") as log:
        there = os.fstat(images.fileno()).st_size
        start = write_header(images, (len(items), *shape))
        done = _resume(log, chunks, (there - start) // row, settings)
        images.seek(
            start + row * sum(np.count_nonzero(chunk["sizes"][:, 0]) for chunk in done)  # type: ignore[arg-type]
        )
        whole = start + row * len(items)
        if there < whole and hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(images.fileno(), 0, whole)
        bar = tqdm(
            total=len(items),
            initial=sum(len(chunk["sizes"]) for chunk in done),
            desc=f"pack {prefix.name}",
            unit="img",
            disable=not interactive(),
        )
        started = (
            (_identity(chunk, settings), pool.map(lambda item: _decode(item, settings), chunk))
            for chunk in chunks[len(done) :]
        )
        try:
            # in pairs, so that the next chunk is being decoded while this one is written
            for (identity, results), _ in pairwise(chain(started, [None])):  # type: ignore[misc]
                sums = np.zeros((2, *shape), dtype=np.uint32)  # 66,000 images would fit
                sizes, unreadable, pixels = [], [], []
                for image, size, reason in results:
                    sizes.append(size)
                    if reason:
                        unreadable.append(reason)
                    else:
                        content = image.tobytes()  # type: ignore[union-attr]
                        images.write(content)
                        pixels.append(hashlib.blake2b(content, digest_size=8).hexdigest())
                        sums += image, np.square(image, dtype=np.uint16)  # type: ignore[arg-type]
                    bar.update()
                images.flush()
                os.fsync(images.fileno())
                sums = sums.reshape(2, -1, settings.channels).sum(1, dtype=np.int64).tolist()
                chunk = {"identity": identity, "sizes": sizes, "sums": sums, "unreadable": unreadable, "pixels": pixels}
                log.write(json.dumps(chunk).encode() + b"\n")
                log.flush()
                os.fsync(log.fileno())
                done.append(chunk | {"sizes": np.array(sizes)})
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for what is queued
            bar.close()
    return done


def _resume(log: BinaryIO, chunks: list, rows: int, settings: DataSettings) -> list[dict]:
    """The chunks of the log that still hold, of at most so many rows; the log is cut off behind them."""
    done, length = [], 0
    for line, items in zip(log, chunks, strict=False):
        chunk = json.loads(line) if line.endswith(b"\n") else {}  # else: killed while writing it
        if chunk.get("identity") != _identity(items, settings):
            break
        chunk["sizes"] = np.array(chunk["sizes"])
        unreadable = np.flatnonzero(chunk["sizes"][:, 0] == 0)
        rows -= len(items) - len(unreadable)
        # a file may have become readable without a change of its own: a permission, a disk that is back
        if rows < 0 or not all(_decode(items[i], settings)[2] for i in unreadable):
            break
        done.append(chunk)
        length += len(line)
    log.seek(length)
    log.truncate()
    os.fsync(log.fileno())  # before the first of the rows behind is written over
    return done


def _identity(items: list, settings: DataSettings) -> str:
    """A hash of what the rows of these items depend on; files count by path, size and time of change."""
    layout = "2"  # of the log's lines
    digest = hashlib.blake2b(f"{layout} {settings.size} {settings.channels}".encode(), digest_size=16)
    for item in items:
        if isinstance(item, np.ndarray):
            digest.update(str(item.shape).encode() + item.tobytes())
        else:
            stat = Path(item).stat()
            digest.update(f"{item!a} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _decode(item: str | np.ndarray, settings: DataSettings) -> tuple[np.ndarray | None, tuple[int, int], str]:
    """An item as uint8 [size, size, C], its original width and height, and why it could not be read ("" = it could)."""
    try:
        image = read_image(item, settings.channels)
        height, width, _ = image.shape
        if (height, width) != (settings.size, settings.size):
            bands = (Image.fromarray(band) for band in np.moveaxis(image, 2, 0))
            resized = [band.resize((settings.size, settings.size), Image.Resampling.BICUBIC) for band in bands]
            image = np.stack([np.asarray(band) for band in resized], axis=2)
        return image, (width, height), ""
    except Exception as error:  # damaged files make decoders raise all kinds: EOFError, struct.error, SyntaxError, ...
        return None, (0, 0), f"{item}: {error}".replace("\n", " ")


def update(path: str | Path) -> BinaryIO:
    """A file opened to be read, changed and extended; made if it is missing."""
    Path(path).touch()
    return Path(path).open("r+b")


def write_header(file: BinaryIO, shape: tuple) -> int:
    """Starts a .npy file of uint8; returns the bytes this takes, which NumPy makes the same for any length."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()
