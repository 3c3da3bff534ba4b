"""The report of a profile: ``results/<profile>/report.html``, its tables and pictures, every run, every setting."""

import dataclasses
from collections import Counter
from pathlib import Path

from simmimlib.data.sources import DataSettings
from simmimlib.machine.files import write_text
from simmimlib.pipeline.arms import changes_of, data_parameters, load_arms, stage_parameters
from simmimlib.pipeline.profiles import load_profile, read_params
from simmimlib.report.page import to_html, to_table
from simmimlib.settings import Settings, require

COLUMNS = {  # of runs.csv, and how the report calls them
    "arm": "arm",
    "seed": "seed",
    "changes": "changes",
    "top1": "top-1",
    "probe_linear": "linear probe",
    "probe_knn": "k-NN",
    "pretrain_val_loss": "pre-training validation loss",
    "pretrain_images_seen": "images seen in pre-training",
    "pretrain_wall_seconds": "pre-training, s",
    "wall_seconds": "fine-tuning, s",
}


def write_report(name: str = "") -> Path:
    """Of a profile, or of the active one, from the tables and figures that its last stage wrote; trains nothing.

    Raises:
        ValueError: an unknown profile, or one without tables.
    """
    params = read_params() if not name or name == read_params()["profile"] else load_profile(name)
    name = params["profile"]
    folder = Path("results") / name
    tables = folder / "ablations.md"
    require(tables.is_file(), str(tables), "missing", f"there: make repro PROFILE={name} writes it")
    markdown = "\n\n".join([tables.read_text(), *every_run(folder / "runs.csv"), *every_setting(params)])
    write_text(folder / "report.html", to_html(markdown, folder, f"SimMIM, profile {name}"))
    return folder / "report.html"


def every_run(path: Path) -> list[str]:
    import pandas as pd  # imported here: half a second that a stage's own process can do without

    runs = pd.read_csv(path, keep_default_na=False, na_values=[""])
    runs = runs[[column for column in COLUMNS if column in runs]].rename(columns=COLUMNS)
    rows = [
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in runs.astype(object).where(runs.notna(), "").to_dict("records")
    ]
    return ["## Every run", to_table(rows)]


def every_setting(params: dict) -> list[str]:
    """What the default arm is given, settings that the profile does not name included, and what the arms change."""
    # imported here: brings torch
    from simmimlib.train.settings import FinetuneSettings, PretrainSettings, ProbeSettings

    values = {stage: stage_parameters(params, stage, "default", 0) for stage in ("pretrain", "finetune", "probe")}
    given: dict[str, Settings] = {
        "Data": DataSettings.from_values(data_parameters(params)),
        "Pre-training": PretrainSettings.from_values(values["pretrain"]),
        # the checkpoint of a run may lie on another machine
        "Fine-tuning": FinetuneSettings.from_values(values["finetune"] | {"checkpoint": ""}),
        "Probes": ProbeSettings.from_values(values["probe"] | {"checkpoint": ""}),
    }
    counts, known = Counter(run["arm"] for run in params["runs"].values()), load_arms()
    parts = ["## Settings", "Of the default arm; another arm is the default with its change."]
    rows = [
        {"arm": arm, "label": known[arm]["label"], "changes": changes_of(arm), "seeds": n} for arm, n in counts.items()
    ]
    parts += ["### Arms", to_table(rows)]
    for title, settings in given.items():
        left_out = {"seed", "checkpoint", "path", "out"}  # of a run, of a machine
        rows = [
            {"setting": name, "value": f"`{value!r}`", "meaning": settings.about[name]}
            for name, value in dataclasses.asdict(settings).items()  # type: ignore[call-overload]
            if name not in left_out
        ]
        parts += [f"### {title}", to_table(rows)]
    return parts
