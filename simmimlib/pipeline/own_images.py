"""A profile for a folder of images: looks at it, measures this machine, chooses, and writes ``profiles/<name>.yaml``.

    python -m simmimlib.pipeline.own_images mine --images /my/images --minutes 60     # make profile NAME=mine ...

The minutes are for the whole of ``make repro PROFILE=mine``: packing, the default against the same encoder from scratch
over the seeds (pre-training, fine-tuning, probes), tables and figures. Nothing is written before everything is known;
every value of the profile has been tried by then, in a short run of each stage on some of the images.
"""

import argparse
import math
import os
import re
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings
from simmimlib.machine.device import pick_device
from simmimlib.machine.files import project_root, write_text
from simmimlib.machine.provenance import provenance
from simmimlib.pipeline.arms import STAGES
from simmimlib.pipeline.budget import Cost
from simmimlib.pipeline.campaign import jobs_here
from simmimlib.pipeline.choose import (
    ENOUGH_STEPS,
    FEWEST_STEPS,
    HELPED_STEPS,
    PROBED,
    Choice,
    Rung,
    choose_data,
    choose_model,
    choose_recipe,
    rungs,
    warn,
)
from simmimlib.pipeline.look import Look, look
from simmimlib.pipeline.measure import image_seconds, measure_stages
from simmimlib.pipeline.profiles import flow
from simmimlib.settings import Settings, require, setting

WORK = Path(".scratch/own_images")
DIGITS = WORK / "digits"
TRY_SECONDS = 4.0  # of training, in the try of a stage
FORWARD = 1 / 3  # what an image costs that is only looked at, as a share of one that is trained on
FEWEST_FINETUNE_STEPS = 200
ROUGH = (30, 5, 15)  # seconds of a run's notebooks and probes on a slow core, until they are measured
WIDTH = 120


@dataclass
class OwnImagesSettings(Settings):
    """Settings of ``notebooks/07_own_images.ipynb`` and of ``make profile``."""

    name: str = setting("", "of the profile to write; empty shows it only")
    images: str = setting("", "a folder of images; empty means digits that scikit-learn ships")
    minutes: float = setting(60.0, "for make repro with that profile, on this machine")

    def check(self) -> None:
        allowed = "letters, digits, - and _, a letter or digit first"
        require(not self.name or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name), "name", self.name, allowed)
        taken = [path for path in (f"profiles/{self.name}.yaml", f"results/{self.name}", f"data/packed/{self.name}")
                 if self.name and Path(path).exists()]  # fmt: skip
        require(not taken, "name", self.name, f"one that is not taken: there is {' and '.join(taken)}")
        require(0 < self.minutes < math.inf, "minutes", self.minutes, "a number above 0")

    def folder(self) -> str:
        """The images; the digits are written on first use."""
        return self.images or write_digits()


def write_digits() -> str:
    """1,797 grey images of 8 x 8 pixels as DIGITS/<class>/*.png."""
    from sklearn.datasets import load_digits  # imported here: only for its images

    if not DIGITS.is_dir():
        digits, partial = load_digits(), DIGITS.with_name(".digits.partial")
        for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            path = partial / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).astype(np.uint8)).save(path)
        partial.replace(DIGITS)
    return str(DIGITS)


def propose(settings: OwnImagesSettings, found: Look) -> Choice:
    """Chooses everything, with a minute or so of measuring.

    Raises:
        ValueError: a class with too few images, too few minutes; the message says what would be needed.
        RuntimeError: a try of a stage failed.
    """
    choice, images, jobs = Choice(found), settings.folder(), jobs_here()
    jobs = min(jobs, (1 + found.labelled) * choice.runs.seeds)
    rung, seconds = pick_rung(choice, images, settings.minutes, jobs)
    choose_data(choice, images, rung.model(found.side)["image_size"])
    choose_model(choice, rung)
    cost = measure(choice, rung, seconds, jobs)
    fits = choice.runs.fit(cost, settings.minutes)
    refuse_too_few_minutes(choice, rung, cost, settings.minutes, fits)
    choose_recipe(choice, rung, *fits)
    warn(choice)
    values = choice.values
    train = int(choice.training_counts.sum())
    used = values["finetune"].get("labelled_images") or train
    planned = values["pretrain"]["epochs"] * train, values["finetune"].get("epochs", 0) * used
    choice.minutes = choice.runs.seconds(cost, *planned) / 60
    return choice


def pick_rung(choice: Choice, images: str, minutes: float, jobs: int) -> tuple[Rung, float]:
    """The largest encoder that gets enough steps, else the smallest, and the seconds that its step takes an image.

    Raises:
        ValueError: not even the smallest fits into the memory.
    """
    found, fitting = choice.look, None
    for rung in rungs(found):
        trial = Choice(found)
        choose_data(trial, images, rung.model(found.side)["image_size"])
        choose_model(trial, rung)
        masks = {name: trial.values["pretrain"][name] for name in ("mask_patch_size", "mask_ratio")}
        seconds = image_seconds({**trial.values["model"], **masks, "batch_size": rung.batch}, found.channels)
        if seconds is None:
            print(f"{described(trial)}: does not fit into the memory", flush=True)
            continue
        rough = Cost(0, seconds, seconds, 0, *ROUGH, jobs)
        steps = choice.runs.fit(rough, minutes)[0] / rung.batch
        print(f"{described(trial)}: {1 / seconds:.3g} images/s, about {steps:.2g} steps in {minutes:g} min", flush=True)
        fitting = rung, seconds
        if steps >= ENOUGH_STEPS:
            break
    if fitting is None:
        raise ValueError(f"images = {images!r}: no step of any encoder fits into the memory of {pick_device()}")
    return fitting


def described(choice: Choice) -> str:
    model = choice.values["model"]
    return f"{model['encoder']} {flow(model['encoder_kwargs'])} at {model['image_size']} pixels"


def measure(choice: Choice, rung: Rung, seconds: float, jobs: int) -> Cost:
    """Packs some of the images and runs each stage on them, as many side by side as runs will be."""
    found, classes = choice.look, max(1, len(choice.look.source.classes))
    shutil.rmtree(WORK / "try", ignore_errors=True)
    packed, data = str(WORK / "try/packed"), choice.values["data"]
    each = max(2, PROBED // classes)
    start = time.perf_counter()
    manifest = pack(DataSettings.from_values({**data, "train_per_class": each, "out": packed, "corrupt": "skip"}))
    count = manifest["train"]
    packing = (time.perf_counter() - start) / (count + manifest["val"])
    trial = Choice(found, {section: dict(of) for section, of in choice.values.items()})
    epochs = math.ceil(min(100, TRY_SECONDS / seconds / count))
    choose_recipe(trial, rung, epochs * count, epochs * count)
    common = {**trial.values["model"], "data": packed}
    short = {"epochs": epochs, "warmup_epochs": 0.0}
    stages = {"pretrain": {**common, **trial.values["pretrain"], **short}}
    if found.labelled:
        stages["finetune"] = {**common, **trial.values["finetune"], **short, "labelled_images": 0}
        stages["finetune"]["eval_epochs"] = epochs
        probe = {"labelled_images": 0, "k": min(20, count)}
        stages["probe"] = {**common, **trial.values["probe"], **probe}
    for stage in ("pretrain", "finetune"):
        if stage in stages:
            stages[stage]["batch_size"] = min(stages[stage]["batch_size"], count)
    print(f"trying {len(stages)} stages on {count} images, {jobs} side by side", flush=True)
    took = measure_stages(stages, jobs, WORK / "try")
    shutil.rmtree(WORK / "try")
    total = len(found.source.train) + manifest["val"]

    # the try of fine-tuning ends with an evaluation, whose images cost a forward pass, a third of a step
    evaluated = {"pretrain": 0.0, "finetune": FORWARD * manifest["val"]}

    def an_image(stage: str) -> float:
        return took[stage]["training"] / (took[stage]["images"] + evaluated[stage]) if stage in took else 0.0

    told = [f"{stage} {1 / an_image(stage):.3g} images/s" for stage in ("pretrain", "finetune") if stage in took]
    print(f"{', '.join(told)}; {sum(of['start'] for of in took.values()):.0f} s for the notebooks of a run", flush=True)
    return Cost(
        packing=packing * total,
        pretrain_image=an_image("pretrain"),
        finetune_image=an_image("finetune"),
        evaluation=an_image("finetune") * evaluated["finetune"],
        starts=sum(took[stage]["start"] for stage in STAGES if stage in took),
        probe=took["probe"]["training"] if "probe" in took else 0.0,
        probe_pixels=took["probe"]["pixels"] if "probe" in took else 0.0,
        jobs=jobs,
    )


def refuse_too_few_minutes(choice: Choice, rung: Rung, cost: Cost, minutes: float, fits: tuple[float, float]) -> None:
    count = int(choice.training_counts.sum())
    batch = min(rung.batch, count)
    if fits[0] >= FEWEST_STEPS * batch and fits[1] >= FEWEST_FINETUNE_STEPS * batch * choice.look.labelled:
        return
    fewest, helped = (
        math.ceil(choice.runs.minutes(cost, steps * batch, max(FEWEST_FINETUNE_STEPS, steps / 4) * batch))
        for steps in (FEWEST_STEPS, HELPED_STEPS)
    )
    runs = f"{2 * choice.runs.seeds} runs" if choice.look.labelled else "one run"
    raise ValueError(
        f"minutes = {minutes:g}: must be about {fewest} or more for these images on this machine, {helped} to see "
        f"something ({FEWEST_STEPS} and {HELPED_STEPS} steps of pre-training in {runs})"
    )


def to_yaml(choice: Choice, settings: OwnImagesSettings) -> str:
    """The profile: what was found and what to expect as its header, then each value with its reason."""
    labelled, name = choice.look.labelled, settings.name or "mine"
    where = provenance(pick_device(), torch.float32)["device"]
    header = [
        f"{name}: chosen by `make profile` for {choice.look.source.name}, {settings.minutes:g} minutes on "
        f"{where}; about {choice.minutes:.0f} min by what was measured. Not run yet.",
        *choice.look.lines(),
        *(f"WARNING: {text}" for text in choice.warnings),
        *next_steps(name, labelled),
    ]
    lines = [line for text in header for line in wrapped(text)]
    seeds = list(range(choice.runs.seeds))
    lines.append(f"profile: {flow(name)}")
    lines.append(f"seeds: {flow(seeds)}" + "  # an interval needs three; more decide more" * labelled)
    arms = {"default": len(seeds), "scratch": len(seeds)} if labelled else {"default": 1}
    lines.append(f"arms: {flow(arms)}  # `reconstruct_all`, `ratio` and other names of arms.yaml can be added")
    for section, values in choice.values.items():
        lines.append(f"{section}:" if values else f"{section}: {{}}")
        for key, value in values.items():
            line, why = f"  {key}: {flow(value)}", choice.why.get(f"{section}.{key}", "")
            if why and len(line) + len(why) + 4 > WIDTH:
                lines += [f"  {part}" for part in wrapped(why)] + [line]
            else:
                lines.append(f"{line}  # {why}" if why else line)
    return "\n".join(lines) + "\n"


def next_steps(name: str, labelled: bool) -> list[str]:
    if labelled:
        return [f"`make repro PROFILE={name}` runs it: the default against from scratch, results/{name}/ablations.md."]
    return [
        "Without two classes there is nothing to fine-tune on. It is pre-trained alone, with .venv active:",
        f"    python -m simmimlib.pipeline.stages activate {name}",
        f"    dvc repro pretrain@{name}-default-0",
        f"Encoder, loss and reconstructions are then in results/{name}/runs/default-0/pretrain/. For an accuracy sort "
        "some images into train/<class>/ and val/<class>/.",
    ]


def wrapped(text: str) -> list[str]:
    """As comment lines."""
    return textwrap.wrap(text, WIDTH - 2, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def write_profile(choice: Choice, settings: OwnImagesSettings) -> Path:
    path = project_root() / f"profiles/{settings.name}.yaml"
    write_text(path, to_yaml(choice, settings))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simmimlib.pipeline.own_images", description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the profile to write")
    parser.add_argument("--images", required=True, help="the folder of images")
    parser.add_argument("--minutes", type=float, default=60.0, help="for `make repro` with this profile (default: 60)")
    given = parser.parse_args()
    images = str(Path(given.images).expanduser().absolute())
    os.chdir(project_root())
    try:
        how = "make profile NAME=mine IMAGES=/path"
        require(given.name, "name", given.name, f"that of the profile to write: {how}")
        require(given.images, "images", given.images, f"a folder of images: {how}")
        settings = OwnImagesSettings(given.name, images, given.minutes)
        print(f"looking at {images}", flush=True)
        found = look(images)
        print("\n".join(found.lines()), flush=True)
        choice = propose(settings, found)
        path = write_profile(choice, settings)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(str(error))
    print("\n".join(f"WARNING: {text}" for text in choice.warnings))
    print(f"{path.relative_to(project_root())} is written: about {choice.minutes:.0f} of {given.minutes:g} minutes.")
    print("\n".join(next_steps(given.name, found.labelled)))


if __name__ == "__main__":
    main()
