"""Finished runs, here and elsewhere, as one table. No training code, no torch.

A run that lies under ``results/<profile>/runs/`` counts if it was given what the active profile gives now, data
settings included; otherwise it is named and left out. Runs that lie on another machine come from ``runs.csv``, where
an earlier call recorded them, under the same condition.
"""

import hashlib
import json
from pathlib import Path

import pandas as pd

from simmimlib.machine.files import read_json

PRETRAIN = ("loss", "val_loss", "avg_dist", "parameters", "images_seen", "images_per_second", "wall_seconds")
PROBE = (
    "knn",
    "knn_best",
    "knn_best_block",
    "knn_pixels",
    "linear",
    "linear_best",
    "linear_best_block",
    "linear_pixels",
)
ORIGIN = ("data", "data_digest", "device", "precision", "versions", "commit", "code")


def load_runs(folder: str | Path, wanted: list[dict]) -> tuple[pd.DataFrame, list[str]]:
    """One row a finished run, in the order of ``wanted``, and a line for each run that is there but left out.

    Args:
        folder: ``results/<profile>``.
        wanted: of each run of the profile ``arm``, ``seed``, ``changes`` (text) and ``stages``, the parameters of each
            stage (``pipeline.arms.wanted_runs``).
    """
    folder, rows, left_out = Path(folder), [], []
    recorded = read_recorded(folder / "runs.csv")
    for run in wanted:
        arm, seed, stages = run["arm"], run["seed"], run["stages"]
        row = {"arm": arm, "seed": seed, "changes": run["changes"], "settings": settings_key(stages)}
        here = folder / "runs" / f"{arm}-{seed}"
        found, why = read_run(here, stages)
        if why:
            left_out.append(f"{here} is left out: {why}")
        elif found:
            rows.append(row | found)
        elif (arm, seed, row["settings"]) in recorded:
            rows.append(recorded[arm, seed, row["settings"]])
    return pd.DataFrame(rows), left_out


def settings_key(stages: dict[str, dict]) -> str:
    """Ten hexadecimal digits that follow from what the stages of a run are given, without the paths of one machine."""
    values = {stage: {k: v for k, v in of.items() if k not in ("checkpoint", "out")} for stage, of in stages.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def read_recorded(path: Path) -> dict[tuple, dict]:
    """The rows of a ``runs.csv`` by arm, seed and settings; {} if there is none."""
    if not path.is_file():
        return {}
    table = pd.read_csv(path, dtype={"settings": str, "commit": str}, keep_default_na=False, na_values=[""])
    return {(row["arm"], row["seed"], row.get("settings")): row for row in table.to_dict("records")}


def read_run(folder: Path, wanted: dict[str, dict]) -> tuple[dict, str]:
    """Metrics of all stages of a run, and why it cannot be taken; ({}, "") while it is not finished.

    Those of fine-tuning keep their names, the others are prefixed with ``pretrain_`` and ``probe_``.
    """
    files = {stage: folder / stage / "metrics.json" for stage in wanted if stage != "data"}
    if not all(path.is_file() for path in files.values()):
        return {}, ""
    found = {stage: read_json(path) for stage, path in files.items()}
    for stage, path in files.items():
        given = read_json(path.with_name("parameters.json"))
        for part in ("data", stage):
            if differs := different(given.get(part, {}), wanted[part]):
                return {}, f"its {stage} was given other {part} parameters than params.yaml gives now ({differs})"
    if len({metrics["data_digest"] for metrics in found.values()}) > 1:
        return {}, "its stages saw different images"
    row = dict(found["finetune"])
    for stage, names in (("pretrain", PRETRAIN), ("probe", PROBE)):
        row |= {f"{stage}_{name}": found[stage][name] for name in names if name in found.get(stage, {})}
    for name in ORIGIN:  # of all stages, where they differ
        values = dict.fromkeys(str(metrics[name]) for metrics in found.values())
        row[name] = " + ".join(values)
    return row, ""


def different(given: dict, wanted: dict) -> str:
    """The values that differ, as ``epochs = 12, not 14``."""
    keys = dict.fromkeys([*given, *wanted])
    return ", ".join(f"{k} = {given.get(k)}, not {wanted.get(k)}" for k in keys if given.get(k) != wanted.get(k))
