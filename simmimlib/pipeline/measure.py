"""Measures this machine: a step of an encoder by itself, and the stages of a run as ``make repro`` will run them.

python -m simmimlib.pipeline.measure stages.json      # {stage: parameters}; started by ``measure_stages``
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from simmimlib.data.batches import sample_images
from simmimlib.data.packed import open_packed
from simmimlib.machine.device import autocast, pick_device, resolve_precision
from simmimlib.machine.files import read_json, write_json
from simmimlib.model.mim import MaskedImageModel
from simmimlib.pipeline.arms import STAGES
from simmimlib.pipeline.execute import run_notebook
from simmimlib.pipeline.stages import ENVIRONMENT
from simmimlib.train.classifiers import fit_linear
from simmimlib.train.settings import PretrainSettings

FEW = 4  # images of a first bare step: those of a whole batch may take minutes
FITTED_CLASSES = 100  # of the raw pixels' probe
LONG = 5.0  # seconds of a step that is not taken to know better


def image_seconds(values: dict, channels: int) -> float | None:
    """Seconds that an image takes in a step of pre-training, with one thread on a CPU, as stages run there.

    Of the batch of ``values``, or of fewer images where that would take long; None where memory does not suffice.
    """
    settings, device = PretrainSettings.from_values(values), pick_device()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        model = settings.model(channels).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        seconds = _step_seconds(settings, model, optimizer, channels, FEW)
        if seconds * settings.batch_size / FEW < LONG:
            return _step_seconds(settings, model, optimizer, channels, settings.batch_size) / settings.batch_size
        return seconds / FEW
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.set_num_threads(threads)


def _step_seconds(
    settings: PretrainSettings, model: MaskedImageModel, optimizer: torch.optim.Optimizer, channels: int, count: int
) -> float:
    """Of a step of so many images of noise."""
    device, seconds = pick_device(), []
    images = torch.randn(count, channels, settings.image_size, settings.image_size, device=device)
    mask = settings.masks(model.encoder.patch_size)(count, device=device)
    for _ in range(2):  # the first is warm-up
        start = time.perf_counter()
        with autocast(device, resolve_precision(settings.precision, device)):
            loss = model(images, mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1]


def measure_stages(stages: dict[str, dict], jobs: int, folder: Path) -> dict[str, dict]:
    """Runs the stages one after the other in a process, ``jobs`` such processes side by side, as a campaign does.

    Args:
        stages: stage -> parameters of its notebook.
        folder: to work in.

    Returns:
        Of each stage the slowest job's "training" (seconds that its metrics name), "start" (those around it) and
        "images" (seen); of the probe also "pixels", those of a linear probe of the raw pixels.

    Raises:
        RuntimeError: a stage failed, with what it said.
    """
    commands = []
    for job in range(jobs):
        own = folder / str(job)
        given = {stage: {**values, "seed": job, "out": str(own / stage)} for stage, values in stages.items()}
        for stage in given.keys() - {"pretrain"}:
            given[stage]["checkpoint"] = str(own / "pretrain/model.safetensors")
        write_json(own.with_suffix(".json"), given)
        commands.append([sys.executable, "-m", "simmimlib.pipeline.measure", str(own.with_suffix(".json"))])
    with contextlib.ExitStack() as stack:
        running = []
        for command in commands:
            process = subprocess.Popen(
                command, env=ENVIRONMENT | os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            stack.callback(process.kill)
            running.append(process)
        said = [process.communicate()[0] for process in running]
    if failed := [text for process, text in zip(running, said, strict=True) if process.returncode]:
        raise RuntimeError(f"a try of the stages failed:\n{failed[0][-2000:]}")
    found = [read_json(folder / f"{job}/measured.json") for job in range(jobs)]
    return {stage: {name: max(job[stage][name] for job in found) for name in found[0][stage]} for stage in stages}


def pixel_seconds(values: dict) -> float:
    """Of a linear probe of the raw pixels, which the arm from scratch has besides its features.

    Time grows with images and with classes: of many classes a part is fitted, and the time scaled.
    """
    packed = open_packed(values["data"])
    some = np.flatnonzero(packed.train.labels < FITTED_CLASSES)
    split = packed.train.select(some)
    pixels = sample_images(split, packed, values["image_size"], len(split)).flatten(1).numpy()
    start = time.perf_counter()
    fit_linear(pixels, np.array(split.labels), 0)
    return (time.perf_counter() - start) * (len(packed.train) / len(split)) ** 2


def main() -> None:
    given = Path(sys.argv[1])
    found = {}
    for stage, values in json.loads(given.read_text()).items():
        start, out = time.perf_counter(), Path(values["out"])
        run_notebook(STAGES[stage], values, out)
        metrics = read_json(out / "metrics.json")
        seconds = {"training": metrics["wall_seconds"], "images": metrics.get("images_seen", 0)}
        found[stage] = {**seconds, "start": time.perf_counter() - start - metrics["wall_seconds"]}
        if stage == "probe":
            found[stage]["pixels"] = pixel_seconds(values)
    write_json(given.with_suffix("") / "measured.json", found)


if __name__ == "__main__":
    main()
