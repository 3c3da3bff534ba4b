"""SimMIM, reproduced: masked image modelling by predicting raw pixels."""

from simmimlib.checkpoints import export_timm, load_checkpoint
from simmimlib.encoders import create_encoder
from simmimlib.finetune import FinetuneSettings, finetune
from simmimlib.heads import create_head
from simmimlib.masking import MaskGenerator, avg_dist
from simmimlib.pretrain import PretrainSettings, pretrain
from simmimlib.simmim import SimMIM

__all__ = [
    "FinetuneSettings",
    "MaskGenerator",
    "PretrainSettings",
    "SimMIM",
    "avg_dist",
    "create_encoder",
    "create_head",
    "export_timm",
    "finetune",
    "load_checkpoint",
    "pretrain",
]
