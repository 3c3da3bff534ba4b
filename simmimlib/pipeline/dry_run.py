"""Two steps of a profile's pre-training and two of its fine-tuning: its model, its recipe, but noise for images."""

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings
from simmimlib.pipeline.arms import stage_parameters
from simmimlib.pipeline.profiles import load_profile
from simmimlib.train.finetune import finetune
from simmimlib.train.pretrain import pretrain
from simmimlib.train.settings import FinetuneSettings, PretrainSettings


def dry_run(name: str) -> None:
    """Shows that a profile starts, on any machine; batches are of two images, so the numbers mean nothing."""
    os.environ.setdefault("SIMMIM_PROCESSES", "1")  # several could not share two images
    params = load_profile(name)
    folder = Path(".scratch/dry-run") / name
    rng = np.random.default_rng(0)
    for i, part in enumerate(("train/a", "train/b", "val/a", "val/b")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for j in range(2):
            noise = rng.integers(0, 256, (300, 400 + 10 * i, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / part / f"{j}.png")
    packed = {"data": str(folder / "packed"), "batch_size": 2, "epochs": 1}
    size = {key: params["data"][key] for key in ("size", "channels", "statistics") if key in params["data"]}
    pack(DataSettings(data="folder", path=str(folder), out=str(folder / "packed"), **size))
    start = {"checkpoint": str(folder / "pretrain" / "model.safetensors"), "labelled_images": 0}

    def values(stage: str) -> dict:
        return stage_parameters(params, stage, "default", 0) | packed | {"out": str(folder / stage)}

    for stage, run in {
        "pretrain": lambda: pretrain(PretrainSettings.from_values(values("pretrain"))),
        "finetune": lambda: finetune(FinetuneSettings.from_values(values("finetune") | start)),
    }.items():
        metrics = run()
        print(f"{name} {stage}: loss {metrics['loss']:.3f}, {metrics['images_per_second']:.2f} images/s")
    shutil.rmtree(folder)  # weights of full-size models, trained on noise
