"""Model cards: what weights are, from what data and recipe they come, what they reach, how to load them."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_input_data_config
from torch import nn

from simmimlib.machine.files import read_json
from simmimlib.model.encoders import Encoder
from simmimlib.model.mim import MaskedImageModel
from simmimlib.settings import require
from simmimlib.weights.checkpoints import load_model

NOT_RECORDED = "Not recorded: these weights were saved without the folder of their run (`run=`).\n"
LICENCE = """\
MIT, as the code that trained them, unless whoever trained them says otherwise here. The images that they were trained
on have terms of their own.
"""
LOAD = """\
from simmimlib.weights.checkpoints import load_model

model = load_model("model.safetensors").eval()
output = model(images, mask)  # images: [B, C, H, W], normalised; mask: [B, h, w] of tokens, True = hidden
loss, prediction = output.loss, output.prediction"""
PAPERS = {
    "simmim": "SimMIM (Xie et al., CVPR 2022)",
    "mae": "MAE (He et al., CVPR 2022)",
    "fcmae": "FCMAE (Woo et al., ConvNeXt V2, CVPR 2023)",
}
NUMBERS = {  # of a stage's metrics: what a reader calls them
    ("pretrain", "loss"): "pre-training loss, last epoch",
    ("pretrain", "val_loss"): "pre-training loss on validation images",
    ("pretrain", "avg_dist"): "AvgDist of the masks, pixels",
    ("finetune", "top1"): "top-1 after fine-tuning, last epoch, %",
    ("probe", "linear"): "linear probe of the frozen output, %",
    ("probe", "linear_best"): "linear probe of the best block, %",
    ("probe", "knn"): "k-NN of the frozen output, %",
    ("probe", "knn_best"): "k-NN of the best block, %",
}
SOURCE = ("commit", "code", "seed", "device", "precision", "versions", "images_seen", "wall_seconds")


@dataclass
class Origin:
    """What a run wrote about itself: ``metrics`` and ``given``, the parameters, of each of its stages."""

    metrics: dict[str, dict]
    given: dict[str, dict]

    @classmethod
    def read(cls, run: str | Path) -> Self:
        """Of the folder that pre-training wrote, and of the ``finetune`` and ``probe`` beside it that started there.

        Args:
            run: that folder; "" is nothing.

        Raises:
            ValueError: there is no ``metrics.json``.
        """
        if not run:
            return cls({}, {})
        folder = Path(run)
        require((folder / "metrics.json").is_file(), "run", str(run), "a folder with a pre-training's metrics.json")
        metrics = {"pretrain": read_json(folder / "metrics.json")}
        given = {"pretrain": read_json(folder / "parameters.json")}
        started = f"{given['pretrain'].get('pretrain', {}).get('out')}/model.safetensors"
        for stage in ("finetune", "probe"):
            found, values = (read_json(folder.parent / stage / f"{file}.json") for file in ("metrics", "parameters"))
            if found and values.get(stage, {}).get("checkpoint") == started:  # else what lies there is another run's
                metrics[stage], given[stage] = found, values
        return cls(metrics, given)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What images are normalised with, in timm's words; {} where it is not known."""
        given = self.given.get("pretrain", {})
        if not given:
            return {}
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        if given["data"]["statistics"] != "imagenet":  # the data set's own, which its packed folder knows
            manifest = read_json(Path(given["pretrain"]["data"]) / "manifest.json")
            if manifest.get("digest") != self.metrics["pretrain"]["data_digest"]:
                return {}
            mean, std = manifest["mean"], manifest["std"]
        return {"mean": tuple(mean), "std": tuple(std), "interpolation": "bilinear", "crop_pct": 1.0}


def model_card(model: nn.Module, origin: Origin, load: str = LOAD, library: str = "simmimlib") -> str:
    """The card in Markdown, with the header that model hubs read.

    Args:
        model: whose weights they are: a ``SimMIM``, ``MAE`` or ``FCMAE``, an ``Encoder``, a timm model.
        load: the lines of Python that load them; if not given, those for a file of ``save_model``.
        library: what these lines import.
    """
    encoder = model.encoder if isinstance(model, MaskedImageModel) else model
    timm_model: Any = encoder.model if isinstance(encoder, Encoder) else encoder
    name, count = timm_model.pretrained_cfg["architecture"], sum(p.numel() for p in model.parameters())
    channels, height, width = resolve_input_data_config(timm_model)["input_size"]
    classes = f", with a classifier of {timm_model.num_classes} classes" if timm_model.num_classes else ""
    task = "image-classification" if classes else "image-feature-extraction"
    title, method = name, ""
    if metrics := origin.metrics.get("pretrain"):
        data = origin.given["pretrain"].get("data", {}).get("data", "folder")  # of a folder, its name
        trained = "pre-trained" if metrics.get("images_seen") else "not pre-trained"
        paper = PAPERS[origin.given["pretrain"].get("pretrain", {}).get("method", "simmim")]
        title = f"{paper.partition(' ')[0]}, {trained} on {metrics['data'] if data == 'folder' else data}"
        method = f"{paper} predicts the pixels that a mask hides; it uses no label.\n"
    return "\n".join(
        [
            f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n- simmim\n- masked-image-modeling\n---",
            f"# {title}\n",
            f"timm's {name} with changes (`config.json`, or as said below); {count:,} parameters{classes};",
            f"images of {channels} x {height} x {width} (channels, height, width).",
            method,
            f"## Load\n\n```python\n{load}\n```\n",
            f"## Data\n\n{_data(origin)}",
            f"## Recipe\n\n{_recipe(origin)}",
            f"## Numbers\n\n{_numbers(origin)}",
            f"## Source\n\n{_source(origin)}",
            f"## Licence\n\n{LICENCE}",
        ]
    )


def _data(origin: Origin) -> str:
    if not origin.metrics:
        return NOT_RECORDED
    given = origin.given["pretrain"].get("data", {})
    lines = [f"`{name}`: {_text(value)}" for name, value in given.items() if value not in (0, "")]
    if normalised := origin.preprocessing:
        mean, std = ([round(value, 4) for value in normalised[part]] for part in ("mean", "std"))
        lines.append(f"normalised, pixels from 0 to 1, by mean {mean} and deviation {std}")
    else:
        lines.append("normalised by a mean and a deviation that were not found when this was saved")
    lines.append(f"digest of labels and pixels: {origin.metrics['pretrain']['data_digest']}")
    return _list(lines)


def _recipe(origin: Origin) -> str:
    given = origin.given.get("pretrain", {}).get("pretrain", {})
    left_out = ("data", "out", "seed")
    return _list([f"`{n}`: {_text(value)}" for n, value in given.items() if n not in left_out]) or NOT_RECORDED


def _numbers(origin: Origin) -> str:
    if not origin.metrics:
        return NOT_RECORDED
    rows = [
        f"| {label} | {value:.4g} |"
        for (stage, name), label in NUMBERS.items()
        if (value := origin.metrics.get(stage, {}).get(name)) is not None
    ]
    labels = {origin.metrics[stage]["labelled_images"] for stage in ("finetune", "probe") if stage in origin.metrics}
    notes = "Of this one run; intervals over seeds stand in the tables of its profile."
    if labels:
        notes += f" Labelled images for fine-tuning and probes: {', '.join(f'{count:,}' for count in sorted(labels))}."
    return "\n".join(["| | |", "|---|---|", *rows, "", notes, ""])


def _source(origin: Origin) -> str:
    if not origin.metrics:
        return NOT_RECORDED
    metrics = origin.metrics["pretrain"]
    return _list([f"{name.replace('_', ' ')}: {_text(metrics[name])}" for name in SOURCE if name in metrics])


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _list(lines: list[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def main() -> None:
    """Prints the card of a pre-training: ``python -m simmimlib.weights.card results/<profile>/runs/<run>/pretrain``."""
    print(model_card(load_model(Path(sys.argv[1]) / "model.safetensors"), Origin.read(sys.argv[1])), end="")


if __name__ == "__main__":
    main()
