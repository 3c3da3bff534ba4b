"""SimMIM, reproduced: masked image modelling by predicting raw pixels.

``from simmimlib import SimMIM`` and the like load the module that a name lives in when it is first asked for: torch and
timm take seconds to import, which ``python -m simmimlib.stages`` and the table code can do without.
"""

from importlib import import_module

_HOME = {
    "FinetuneSettings": "finetune",
    "MaskGenerator": "masking",
    "PretrainSettings": "pretrain",
    "ProbeSettings": "probe",
    "SimMIM": "simmim",
    "avg_dist": "masking",
    "create_encoder": "encoders",
    "create_head": "heads",
    "export_timm": "checkpoints",
    "load_checkpoint": "checkpoints",
    "save_timm": "checkpoints",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'simmimlib' has no attribute {name!r}")
    return getattr(import_module(f"simmimlib.{_HOME[name]}"), name)
