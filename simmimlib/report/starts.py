"""Where the encoder of an arm starts, by which the effect of a seed and the error of a run may differ. No torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simmimlib.train.settings import PretrainSettings


def start_of(section: str, recipe: "PretrainSettings") -> str:
    """Encoder, positions (of a ViT) and initial weights, as ``vit_..., learned positions, timm's initial weights``.

    Arms of one start draw their encoder from the same distribution; with timm's weights those of one seed begin with
    the very same encoder, learned positions aside. MAE's weights are drawn after the head's or decoder's.

    Args:
        section: of the profile, that the arm takes its encoder from (``pipeline.arms.load_arms``).
        recipe: what it is pre-trained with; ``method`` decides what ``positions`` and ``weight_init`` leave open.
    """
    own = ("sincos", "mae") if recipe.method == "mae" else ("learned", "timm")
    parts = [recipe.encoder if section == "model" else f"{recipe.encoder} ({section})"]
    if recipe.encoder.startswith(("vit_", "deit")):
        fixed = (recipe.positions or own[0]) == "sincos"
        parts.append(f"{'fixed' if fixed else 'learned'} positions")
    weights = {"timm": "timm's", "mae": "MAE's"}[recipe.weight_init or own[1]]
    return ", ".join([*parts, f"{weights} initial weights"])
