"""What the settings classes share: they check themselves, and a notebook's parameters turn into one.

A wrong value stops at once with its name, its value and what is allowed.
"""

import ast
import dataclasses
import difflib
import os
from pathlib import Path

import yaml


class Settings:
    """Base of the settings dataclasses: types are checked against the annotations, then ``check`` looks at values."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            setattr(self, field.name, _as_type(field.name, getattr(self, field.name), field.type))
        self.check()

    def check(self) -> None:
        """Raises ValueError on a value that is not allowed."""

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def from_values(cls, values: dict):
        """Like ``cls(**values)``, with unknown names refused by name."""
        for name in values:
            if name not in cls.names():
                near = difflib.get_close_matches(name, cls.names(), n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown parameter {name!r}: {hint}Allowed: {', '.join(cls.names())}")
        return cls(**values)

    @classmethod
    def from_notebook(cls, namespace: dict):
        """The settings that a notebook's parameters cell, and papermill's injected one, assign.

        ``namespace`` is the notebook's ``globals()``. Also moves to the project's root, so that relative paths mean
        the same in JupyterLab (started in ``notebooks/``) and under papermill.
        """
        os.chdir(project_root())
        # The cells as they ran are in IPython's `In`. Ours starts with "# Parameters:"; papermill's injected cell,
        # which holds what -p and -f gave, with "# Parameters" alone.
        cells = [source for source in namespace["In"] if source.lstrip().startswith("# Parameters")]
        last_own = max(i for i, source in enumerate(cells) if source.lstrip().startswith("# Parameters:"))
        assignments = [
            node
            for source in cells[last_own:]
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign | ast.AnnAssign)
        ]
        targets = [node.target if isinstance(node, ast.AnnAssign) else node.targets[0] for node in assignments]
        names = dict.fromkeys(target.id for target in targets)
        return cls.from_values({name: namespace[name] for name in names})


def require(condition: bool, name: str, value, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}: must be {allowed}")


def one_of(name: str, value, allowed) -> None:
    require(value in allowed, name, value, f"one of {', '.join(map(str, allowed))}")


def _as_type(name, value, wanted):
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        hint = " (write 1.0e-4, not 1e-4, in a YAML file)" if wanted is float and isinstance(value, str) else ""
        raise ValueError(f"{name} = {value!r} ({type(value).__name__}): must be of type {wanted.__name__}{hint}")
    return value


def project_root() -> Path:
    """The nearest folder at or above the working folder that holds dvc.yaml; the working folder if none does."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").exists()), here)


# Profiles and arms ---------------------------------------------------------------------------------------------------


def load_yaml(kind: str, name: str) -> dict:
    """The file ``<kind>s/<name>.yaml``; an unknown name is refused with the list of those there are."""
    folder = project_root() / f"{kind}s"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ValueError(f"{kind} = {name!r}: there is no {kind}s/{name}.yaml; known are {there}")
    return yaml.safe_load(path.read_text())


def stage_parameters(stage: str, params: dict, arm: str, seed: int) -> tuple[str, dict, Path]:
    """Notebook, parameters and folder of the files of one stage."""
    profile = params["profile"]
    packed, results = f"data/packed/{profile}", Path("results") / profile
    run = results / "runs" / f"{arm}-{seed}"
    if stage == "data":
        return "01_data", {**params["data"], "out": packed}, results
    if stage == "ablations":
        return "04_ablations", {"profile": profile, "out": str(results)}, results
    changes = dict(load_yaml("arm", arm)[stage])
    # arms give mask patches as multiples of the profile's, so that one arm serves every image size
    if scale := changes.pop("mask_patch_scale", None):
        changes["mask_patch_size"] = round(params["pretrain"]["mask_patch_size"] * scale)
    values = {**params["model"], **params[stage], **changes, "data": packed, "seed": seed, "out": str(run / stage)}
    if stage == "finetune" and arm != "scratch":
        values["checkpoint"] = str(run / "pretrain" / "model.safetensors")
    return {"pretrain": "02_pretrain", "finetune": "03_finetune"}[stage], values, run / stage


def run_settings(params: dict, arm: str, seed: int) -> dict[str, dict]:
    """What the data and training stages of one run are given: two runs with the same are the same run."""
    stages = ["data", "finetune"] if arm == "scratch" else ["data", "pretrain", "finetune"]
    return {stage: stage_parameters(stage, params, arm, seed)[1] for stage in stages}


def arm_changes(arm: str) -> str:
    """What an arm changes, on one line."""
    stages = load_yaml("arm", arm)
    return ", ".join(f"{name} = {value}" for stage in ("pretrain", "finetune") for name, value in stages[stage].items())
