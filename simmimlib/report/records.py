"""What figures show of finished runs, in files that git keeps: curves, and images with a model's predictions in them.

A run's own folder may lie on another machine. As with ``runs.csv``, what an earlier call recorded counts while arm,
seed and settings are those of a finished run. No torch.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from simmimlib.machine.files import whole_file

KEY = ["arm", "seed", "settings"]
CURVES = {  # stage -> its file, and what figures show of it
    "pretrain": ("log.csv", ["epoch", "loss"]),
    "finetune": ("log.csv", ["epoch", "top1"]),
    "probe": ("blocks.csv", ["block", "linear", "knn"]),
}


def load_curves(folder: str | Path, runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each epoch of pre-training and of fine-tuning and for each probed block of the finished runs.

    Columns: arm, seed, settings, stage, and those of ``CURVES``, not a number where a stage has none.

    Args:
        folder: ``results/<profile>``.
        runs: of ``load_runs``.
    """
    recorded = {}
    if (path := Path(folder, "curves.csv")).is_file():
        recorded = dict(iter(pd.read_csv(path, dtype={"settings": str}).groupby(KEY)))
    columns = dict.fromkeys(column for _, shown in CURVES.values() for column in shown)
    found = [pd.DataFrame(columns=[*KEY, "stage", *columns])]
    for values in runs.reindex(columns=KEY).itertuples(index=False, name=None):
        if is_here(folder, *values[:2]):
            own = Path(folder, "runs", f"{values[0]}-{values[1]}")
            for stage, (name, shown) in CURVES.items():
                if (own / stage / name).is_file():  # a probe of nothing writes no blocks
                    log = pd.read_csv(own / stage / name).reindex(columns=shown).round(5)
                    log = log.dropna(subset=shown[1:], how="all")  # epochs without validation
                    found.append(log.assign(**dict(zip(KEY, values, strict=True)), stage=stage))
        elif values in recorded:
            found.append(recorded[values])
    return pd.concat([log for log in found if len(log)] or found, ignore_index=True).reindex(columns=found[0].columns)


def is_here(folder: str | Path, arm: str, seed: int) -> bool:
    """Whether all stages of a run have finished in its own folder."""
    return all(Path(folder, "runs", f"{arm}-{seed}", stage, "metrics.json").is_file() for stage in CURVES)


def runs_in(path: Path) -> set[str]:
    """The runs that a figure shows, as ``l2-0``, which its description names; none if it is not there."""
    if not path.is_file():
        return set()
    with Image.open(path) as picture:
        return set(picture.info.get("Description", "").split())


def picture_of(folder: str | Path, arm: str, seed: int, settings: str) -> Path:
    """Where the images with the predictions of a run's model are kept."""
    return Path(folder, "predictions", f"{arm}-{seed}-{settings}.png")


def write_images(path: Path, pixels: np.ndarray) -> None:
    """Square images [n, H, H, C] of pixels in [0, 1] side by side in one PNG; grey below three channels, else three."""
    pixels = pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3]
    row = np.concatenate(list((255 * np.clip(pixels, 0, 1)).round().astype(np.uint8)), axis=1)
    with whole_file(path) as temporary:
        Image.fromarray(row).save(temporary)


def read_images(path: Path) -> np.ndarray:
    """The images of ``write_images``, [n, H, H, 1 or 3] in [0, 1]."""
    with Image.open(path) as picture:
        row = np.asarray(picture) / 255
    row = row if row.ndim == 3 else row[..., None]
    return np.stack(np.split(row, row.shape[1] // row.shape[0], axis=1))


def drop_others(folder: str | Path, runs: pd.DataFrame) -> None:
    """Deletes the pictures of runs that are not among the finished ones, as ``runs.csv`` loses their rows.

    Makes the folder, which the pipeline expects, where there is no picture at all.
    """
    Path(folder, "predictions").mkdir(parents=True, exist_ok=True)
    kept = {picture_of(folder, *values) for values in runs[KEY].itertuples(index=False, name=None)}
    for path in set(Path(folder, "predictions").glob("*.png")) - kept:
        path.unlink()
