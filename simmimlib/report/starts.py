"""Where the encoder of an arm starts, which decides what a seed draws. No torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simmimlib.train.settings import PretrainSettings


def start_of(section: str, recipe: "PretrainSettings") -> str:
    """Encoder, positions (of a ViT) and initial weights, as ``vit_..., learned positions, timm's initial weights``.

    Arms of one start and seed begin with the same encoder, pre-trained or not.

    Args:
        section: of the profile, that the arm takes its encoder from (``pipeline.arms.load_arms``).
        recipe: what it is pre-trained with; ``method`` decides what ``positions`` and ``weight_init`` leave open.
    """
    own = "mae" if recipe.method == "mae" else "timm"
    parts = [recipe.encoder if section == "model" else f"{recipe.encoder} ({section})"]
    if recipe.encoder.startswith(("vit_", "deit")):
        parts.append(f"{recipe.positions or ('sincos' if own == 'mae' else 'learned')} positions")
    return ", ".join([*parts, f"{recipe.weight_init or own}'s initial weights"])
