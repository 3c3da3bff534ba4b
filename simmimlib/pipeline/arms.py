"""Profiles and arms: which runs an experiment has, and the parameters of each of their stages. No torch here.

``params.yaml`` is the active profile, and the only place that stages, tables and campaigns read their values from; an
arm is a line of ``arms.yaml``. ``activate`` writes the one from ``profiles/<name>.yaml``.
"""

import copy
import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from simmimlib.data.sources import DataSettings
from simmimlib.machine.files import project_root, read_json, write_text
from simmimlib.settings import one_of, require

STAGES = {"pretrain": "02_pretrain", "finetune": "03_finetune", "probe": "05_probe"}  # of a run, and their notebooks
SECTIONS = ("profile", "seeds", "arms", "data", "model", *STAGES)
HEADER = "# The active profile: profiles/{name}.yaml as made active ({digest}). `runs` follows from arms and seeds.\n"


# Arms ----------------------------------------------------------------------------------------------------------------


def load_arms() -> dict[str, dict]:
    """Every arm of ``arms.yaml`` by name, in its order: question, heading, label, paper, and changes by stage."""
    arms = {}
    for question, content in _grid()["questions"].items():
        for name, arm in content["arms"].items():
            changes = {stage: arm.get(stage, {}) for stage in STAGES}
            about = {"question": question, "heading": content["heading"], "label": arm["label"]}
            arms[name] = {**about, "paper": arm.get("paper"), **changes}
    return arms


def arms_of(name: str) -> list[str]:
    """The arms that a profile means by a name: an arm, a question, or a set."""
    grid, arms = _grid(), load_arms()
    known = {question: list(content["arms"]) for question, content in grid["questions"].items()} | grid["sets"]
    known |= {arm: [arm] for arm in arms}
    one_of("arms", name, known)
    return known[name]


def changes_of(arm: str) -> str:
    """What an arm changes, on one line."""
    found = []
    for stage in STAGES:
        for name, value in load_arms()[arm][stage].items():
            if name == "scale":
                found += [f"{key} x {factor}" for key, factor in value.items()]
            elif stage != "probe":
                found.append(f"{name} = {value}")
    return ", ".join(found)


def _grid() -> dict:
    return _read_yaml(project_root() / "arms.yaml")


def _read_yaml(path: Path) -> dict:
    stat = path.stat()
    return copy.deepcopy(_parse(str(path), stat.st_mtime_ns, stat.st_size))


@lru_cache
def _parse(path: str, changed: int, size: int) -> dict:
    return yaml.safe_load(Path(path).read_text())


# Profiles ------------------------------------------------------------------------------------------------------------


def load_profile(name: str) -> dict:
    """``profiles/<name>.yaml``, over the profile that it ``extends``, with its ``runs``.

    Raises:
        ValueError: an unknown name, the list of those there are; an unknown section.
    """
    path = project_root() / f"profiles/{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ValueError(f"profile = {name!r}: there is no profiles/{name}.yaml; known are {there}")
    profile = yaml.safe_load(path.read_text())
    if base := profile.pop("extends", None):
        below = load_profile(base)
        nested = {key: {**below[key], **profile.get(key, {})} for key in ("data", "model", *STAGES)}
        profile = {**below, **profile, **nested}
    for key in profile.keys() - {"runs"}:
        one_of("section", key, SECTIONS)
    require(profile.get("profile") == name, "profile", profile.get("profile"), f"{name!r}, the name of its file")
    profile.setdefault("probe", {})
    return profile | {"runs": runs_of(profile)}


def runs_of(profile: dict) -> dict[str, dict]:
    """The runs of a profile, ``{<profile>-<arm>-<seed>: {arm, seed, and what the arm changes in each stage}}``, in the
    order in which they are trained.

    ``arms`` says for an arm, a question or a set of arms how many of the ``seeds`` it gets.
    """
    name, seeds, known = profile["profile"], profile["seeds"], load_arms()
    runs: dict[str, dict] = {}
    for group, count in profile["arms"].items():
        require(1 <= count <= len(seeds), f"arms: {group}", count, f"from 1 to {len(seeds)}, the number of seeds")
        for seed in seeds[:count]:
            for arm in arms_of(group):
                changes = {stage: known[arm][stage] for stage in STAGES}
                runs.setdefault(f"{name}-{arm}-{seed}", {"arm": arm, "seed": seed, **changes})
    return runs


def activate(name: str) -> None:
    """Makes a profile the active one: writes it to ``params.yaml``, unless that would lose edits there.

    Raises:
        ValueError: params.yaml was edited; the message says what to do.
    """
    params, profile = project_root() / "params.yaml", load_profile(name)
    if params.exists():
        before = yaml.safe_load(params.read_text())
        if before == profile:
            return
        if edits := edited(params.read_text()):
            raise ValueError(
                f"params.yaml was edited since it was written from profiles/{before['profile']}.yaml ({edits}): keep "
                "the edits as profiles/<new name>.yaml, with that name as its `profile`, or drop them by deleting "
                "params.yaml; then try again"
            )
        if before["profile"] == name:
            print(f"profiles/{name}.yaml has changed since it was made active ({differences(before, profile)})")
    text = _dump(profile)
    write_text(params, HEADER.format(name=name, digest=_digest(text)) + text)


def read_params() -> dict:
    """The active profile.

    Raises:
        ValueError: there is none, or its runs do not follow from its arms and seeds.
    """
    path = project_root() / "params.yaml"
    require(path.is_file(), "params.yaml", "missing", "there: python -m simmimlib.pipeline.stages activate quick")
    params = yaml.safe_load(path.read_text())
    if params.get("runs") != runs_of(params):
        raise ValueError(
            "params.yaml: `runs` does not follow from its `arms` and `seeds` and arms.yaml: one was edited. "
            "`python -m simmimlib.pipeline.stages refresh` (part of `make repro`) writes `runs` again"
        )
    return params


def refresh() -> None:
    """Writes ``runs`` of an edited ``params.yaml`` again, and says how the active profile differs from its file."""
    path = project_root() / "params.yaml"
    text = path.read_text()
    params = yaml.safe_load(text)
    if params.get("runs") != runs_of(params):
        header = text.partition("\n")[0] + "\n" if text.startswith("#") else ""
        params["runs"] = runs_of(params)
        write_text(path, header + _dump(params))
    name = params["profile"]
    if not (project_root() / f"profiles/{name}.yaml").is_file():
        return
    if found := differences(load_profile(name), params):
        if edited(path.read_text()):
            print(f"params.yaml was edited: unlike profiles/{name}.yaml, {found}; params.yaml counts")
        else:
            print(
                f"profiles/{name}.yaml was edited ({found}) and params.yaml counts: make repro PROFILE={name} takes it"
            )


def edited(text: str) -> str:
    """How a params.yaml differs from what ``activate`` wrote; "" if it does not."""
    digest = re.search(r"\((\w+)\)", text.partition("\n")[0])
    body = text.partition("\n")[2]
    if digest and digest[1] == _digest(body):
        return ""
    params = yaml.safe_load(text)
    if not (project_root() / f"profiles/{params['profile']}.yaml").is_file():
        return f"there is no profiles/{params['profile']}.yaml"
    profile = load_profile(params["profile"])
    return differences(profile, params) if params != profile else ""


def differences(before: dict, after: dict, prefix: str = "") -> str:
    """The values that differ, as ``pretrain.epochs: 12 -> 14``."""
    found = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if key == "runs" or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict) and not prefix:
            found.append(differences(old, new, f"{key}."))
        else:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return ", ".join(found)


def _dump(params: dict) -> str:
    """YAML with a line for each value of a section and for each run."""
    lines = []
    for key, value in params.items():
        if key in ("data", "model", *STAGES, "runs") and value:
            lines += [f"{key}:", *(f"  {name}: {_flow(inner)}" for name, inner in value.items())]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(copy.deepcopy(value), default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("...\n").strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


# Parameters of a stage -----------------------------------------------------------------------------------------------


def packed_folder(params: dict) -> str:
    return f"data/packed/{params['profile']}"


def run_folder(params: dict, arm: str, seed: int) -> Path:
    return Path("results") / params["profile"] / "runs" / f"{arm}-{seed}"


def data_parameters(params: dict) -> dict:
    return {**params["data"], "out": packed_folder(params)}


def stage_parameters(params: dict, stage: str, arm: str, seed: int) -> dict:
    """What the notebook of a run's stage is given.

    Raises:
        ValueError: an unknown arm, the list of those there are.
    """
    arms = load_arms()
    one_of("arm", arm, arms)
    changes = dict(arms[arm][stage])
    for name, factor in changes.pop("scale", {}).items():
        value = params[stage][name] * factor
        changes[name] = round(value) if isinstance(params[stage][name], int) else value
    folder = run_folder(params, arm, seed)
    values = {**params["model"], **params[stage], **changes, "data": packed_folder(params), "seed": seed}
    if stage != "pretrain":
        values["checkpoint"] = str(folder / "pretrain" / "model.safetensors")
    return values | {"out": str(folder / stage)}


def wanted_runs(params: dict) -> list[dict]:
    """What ``report.runs`` looks for: arm, seed, what the arm changes, and the parameters of data and stages."""
    data = DataSettings.from_values(data_parameters(params)).identity()
    return [
        {
            "arm": run["arm"],
            "seed": run["seed"],
            "changes": changes_of(run["arm"]),
            "stages": {"data": data}
            | {stage: stage_parameters(params, stage, run["arm"], run["seed"]) for stage in STAGES},
        }
        for run in params["runs"].values()
    ]


def check_packed(params: dict) -> None:
    """Refuses a packed folder that other data settings were packed with.

    Raises:
        ValueError: which settings differ, and what to do.
    """
    folder = packed_folder(params)
    wanted = DataSettings.from_values(data_parameters(params)).identity()
    packed = read_json(Path(folder) / "manifest.json").get("settings")
    if packed is not None and packed != wanted:
        raise ValueError(
            f"{folder} was packed with other settings ({differences(packed, wanted, ' ')}): pack it again with "
            "`python -m simmimlib.pipeline.stages data`"
        )
