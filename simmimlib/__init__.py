"""SimMIM, reproduced: masked image modelling by predicting raw pixels.

``from simmimlib import SimMIM`` and the like load the module that a name lives in when it is first asked for: torch and
timm take seconds to import, which the pipeline's own process and the table code can do without.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simmimlib.data.sources import DataSettings as DataSettings
    from simmimlib.model.avgdist import avg_dist as avg_dist
    from simmimlib.model.encoders import create_encoder as create_encoder
    from simmimlib.model.fcmae import FCMAE as FCMAE
    from simmimlib.model.heads import create_head as create_head
    from simmimlib.model.mae import MAE as MAE
    from simmimlib.model.masking import MaskGenerator as MaskGenerator
    from simmimlib.model.simmim import SimMIM as SimMIM
    from simmimlib.notebook import from_notebook as from_notebook
    from simmimlib.train.finetune import finetune as finetune
    from simmimlib.train.pretrain import pretrain as pretrain
    from simmimlib.train.probe import knn as knn
    from simmimlib.train.probe import linear_probe as linear_probe
    from simmimlib.train.probe import probe_blocks as probe_blocks
    from simmimlib.train.settings import FinetuneSettings as FinetuneSettings
    from simmimlib.train.settings import PretrainSettings as PretrainSettings
    from simmimlib.train.settings import ProbeSettings as ProbeSettings
    from simmimlib.weights.checkpoints import load_checkpoint as load_checkpoint
    from simmimlib.weights.export import export_timm as export_timm
    from simmimlib.weights.folders import save_huggingface as save_huggingface
    from simmimlib.weights.folders import save_timm as save_timm

_HOME = {
    "FCMAE": "model.fcmae",
    "MAE": "model.mae",
    "DataSettings": "data.sources",
    "FinetuneSettings": "train.settings",
    "MaskGenerator": "model.masking",
    "PretrainSettings": "train.settings",
    "ProbeSettings": "train.settings",
    "SimMIM": "model.simmim",
    "avg_dist": "model.avgdist",
    "create_encoder": "model.encoders",
    "create_head": "model.heads",
    "export_timm": "weights.export",
    "finetune": "train.finetune",
    "from_notebook": "notebook",
    "knn": "train.probe",
    "linear_probe": "train.probe",
    "load_checkpoint": "weights.checkpoints",
    "pretrain": "train.pretrain",
    "probe_blocks": "train.probe",
    "save_huggingface": "weights.folders",
    "save_timm": "weights.folders",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'simmimlib' has no attribute {name!r}")
    return getattr(import_module(f"simmimlib.{_HOME[name]}"), name)
