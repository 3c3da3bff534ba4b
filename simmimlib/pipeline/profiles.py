"""Profiles: ``params.yaml`` is the active one, and all that stages, tables and campaigns read their values from.

``activate`` writes it from ``profiles/<name>.yaml``. No torch here.
"""

import copy
import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from simmimlib.data.sources import DataSettings
from simmimlib.machine.files import project_root, read_json, write_text
from simmimlib.pipeline.arms import STAGES, data_parameters, packed_folder, runs_of
from simmimlib.settings import one_of, require

NESTED = ("data", "model", "convnext", *STAGES)  # sections that hold values by name
SECTIONS = ("profile", "seeds", "arms", *NESTED)
HEADER = "# The active profile: profiles/{name}.yaml as made active ({digest}). `runs` follows from arms and seeds.\n"


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
        nested = {key: {**below.get(key, {}), **profile.get(key, {})} for key in NESTED if key in {*below, *profile}}
        profile = {**below, **profile, **nested}
    for key in profile.keys() - {"runs"}:
        one_of("section", key, SECTIONS)
    require(profile.get("profile") == name, "profile", profile.get("profile"), f"{name!r}, the name of its file")
    profile.setdefault("probe", {})
    return profile | {"runs": runs_of(profile)}


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
        if key in (*NESTED, "runs") and value:
            lines += [f"{key}:", *(f"  {name}: {flow(inner)}" for name, inner in value.items())]
        else:
            lines.append(f"{key}: {flow(value)}")
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    text = yaml.safe_dump(copy.deepcopy(value), default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("...\n").strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def check_classes(params: dict) -> None:
    """Refuses a packed folder that no classifier can be trained on, and says what can be done with it.

    Raises:
        ValueError: it has fewer than two classes.
    """
    folder, name = packed_folder(params), params["profile"]
    if len(read_json(Path(folder) / "manifest.json")["classes"]) < 2:
        arms = " ".join(f"pretrain@{key}" for key in params["runs"])
        raise ValueError(
            f"{folder} has no two classes, so there is nothing to fine-tune on. Pre-train alone: `dvc repro {arms}`; "
            f"encoder, loss and reconstructions are then in results/{name}/runs/"
        )


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
