"""Folders that others open: of plain timm, of transformers; each with its weights, ``config.json`` and a model card."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from simmimlib.machine.files import write_json
from simmimlib.model.encoders import Encoder
from simmimlib.model.mim import MaskedImageModel
from simmimlib.model.simmim import SimMIM
from simmimlib.weights.card import Origin, model_card
from simmimlib.weights.huggingface import to_huggingface

FILES = {"model.safetensors", "config.json", "README.md"}
LOAD_TIMM = """\
import timm

model = timm.create_model("local-dir:<this folder>", pretrained=True)
features = model.forward_features(images)  # images: [B, C, H, W], normalised
backbone = timm.create_model("local-dir:<this folder>", pretrained=True, features_only=True)  # a map a level"""
LOAD_TRANSFORMERS = """\
from transformers import {name}

model = {name}.from_pretrained("<this folder>"{without_pooler})
features = model(images).last_hidden_state  # images: [B, C, H, W], normalised"""
LOAD_MASKED = """\
from transformers import {name}

model = {name}.from_pretrained("<this folder>")
output = model(images, bool_masked_pos=mask)  # images: [B, C, H, W], normalised; mask: [B, tokens], True = hidden"""


def save_timm(model: nn.Module, folder: str | Path, run: str | Path = "") -> None:
    """Writes a plain timm model: ``timm.create_model("local-dir:" + folder, pretrained=True)`` gives it back.

    With ``features_only=True`` it is a backbone for detection or segmentation, of any input size by ``img_size=(H, W)``
    (which a ConvNeXt does without; timm resizes relative biases from a square one only: from another,
    ``export_timm(encoder, image_size=(H, W))`` before saving). A ViT of fewer than three blocks needs ``out_indices``,
    too.

    Args:
        model: from ``export_timm``, fine-tuned or not, or from ``timm.create_model``.
        folder: gets ``model.safetensors``, ``config.json`` and the card, all or none; an earlier export is replaced.
        run: the folder that pre-training wrote, ``.../pretrain``: the card then says data, recipe, numbers and commit,
            and ``config.json`` what images are normalised with.

    Raises:
        ValueError: not a plain timm model, or one that timm does not rebuild (an encoder without final norm); a folder
            that holds anything else; no run there.
    """
    if isinstance(model, (MaskedImageModel, Encoder)) or not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"model of type {type(model).__name__}: must be a timm model, as export_timm returns it")
    origin = Origin.read(run)
    with _whole_folder(folder) as temporary:
        timm.models.save_for_hf(
            model,  # type: ignore[arg-type]
            temporary,  # type: ignore[arg-type]
            safe_serialization=True,
            # timm would name its own weights of this architecture as the source, and their normalisation
            model_config={"pretrained_cfg": {"tag": "simmim", "license": None}} if run else None,
            data_config=origin.preprocessing,
        )
        with torch.device("meta"):
            rebuilt = timm.create_model(f"local-dir:{temporary}").state_dict()
        if {name: t.shape for name, t in rebuilt.items()} != {name: t.shape for name, t in model.state_dict().items()}:
            raise ValueError(f"model of type {type(model).__name__}: timm would rebuild it with other weights")
        (temporary / "README.md").write_text(model_card(model, origin, LOAD_TIMM, "timm"))


def save_huggingface(model: nn.Module, folder: str | Path, run: str | Path = "") -> None:
    """Writes a folder for transformers, which need not be installed here.

    An encoder, or a plain timm model, becomes a ``ViTModel``, ``BeitModel``, ``SwinModel`` or ``Swinv2Model``, whose
    ``last_hidden_state`` is ``forward_features``; a ``SimMIM`` a ``...ForMaskedImageModeling`` with mask token and
    head. ``load_checkpoint`` reads them back, into a timm model or a ``SimMIM``.

    Args:
        model: an ``Encoder``, a ``SimMIM``, or a timm model without classifier.
        folder, run: as in ``save_timm``.

    Raises:
        ValueError: transformers has no place for a part of the model (named); a folder that holds anything else; no run
            there.
    """
    origin = Origin.read(run)
    config, state = to_huggingface(model)
    load = LOAD_MASKED if isinstance(model, SimMIM) else LOAD_TRANSFORMERS
    # a ViT of transformers has a layer on its class token, which nothing here has trained
    without_pooler = ", add_pooling_layer=False" if config["model_type"] in ("vit", "beit") else ""
    load = load.format(name=config["architectures"][0], without_pooler=without_pooler)
    with _whole_folder(folder) as temporary:
        save_file(state, temporary / "model.safetensors", {"format": "pt"})
        write_json(temporary / "config.json", config)
        (temporary / "README.md").write_text(model_card(model, origin, load, "transformers"))


@contextmanager
def _whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a new folder that takes the place of ``folder`` only if the block ends without an error."""
    folder = Path(folder)
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    earlier = "config.json" in held and held <= FILES  # an earlier export
    if (folder.exists() and not folder.is_dir()) or (held and not earlier):
        raise ValueError(
            f"folder = {str(folder)!r}: must be new, or hold nothing but an earlier export ({', '.join(sorted(FILES))})"
        )
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
