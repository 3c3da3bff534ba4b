"""What ``notebooks/06_use.ipynb`` starts from: a trained encoder, and images to use it on."""

from dataclasses import dataclass
from pathlib import Path

from simmimlib.report.tour import TRAINED
from simmimlib.settings import Settings, require, setting


@dataclass
class UseSettings(Settings):
    """Settings of ``notebooks/06_use.ipynb``."""

    checkpoint: str = setting("", "model.safetensors of 02_pretrain; empty: the one in git")
    data: str = setting("mnist5k", "a folder packed by 01_data; mnist5k is packed on first use")
    images: int = setting(6, "validation images to look for, a row each")
    neighbours: int = setting(8, "training images shown beside each")
    labelled_per_class: int = setting(10, "training images of each class to fine-tune on")
    epochs: int = setting(30, "passes over these, in batches of two images a class")
    lr: float = setting(2.0e-3, "peak learning rate")
    seed: int = setting(0, "of the labelled images, their order and the classifier")
    out: str = setting("results/try/use", "folder for the export, from the project root")

    def check(self) -> None:
        self.weights = Path(self.checkpoint or TRAINED)
        found = not self.checkpoint or self.weights.is_file()
        require(found, "checkpoint", self.checkpoint, "a model.safetensors of 02_pretrain, or empty")
        for name in ("images", "neighbours", "labelled_per_class", "epochs", "lr"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
