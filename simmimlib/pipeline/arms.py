"""Arms: the lines of ``arms.yaml``, the runs that a profile makes of them, and what each stage of a run is given."""

import copy
from functools import lru_cache
from pathlib import Path

import yaml

from simmimlib.data.sources import DataSettings
from simmimlib.machine.files import project_root
from simmimlib.settings import one_of, require

STAGES = {"pretrain": "02_pretrain", "finetune": "03_finetune", "probe": "05_probe"}  # of a run, and their notebooks


def load_arms() -> dict[str, dict]:
    """Every arm of ``arms.yaml`` by name, in its order.

    Of each: question, its place among the questions, heading; label; paper, paper_linear (None where it has none);
    reference (the arm that those of the question are compared with, and its own paper and paper_linear); probes; also
    (the same of other questions that compare it); model; changes by stage.
    """
    arms: dict[str, dict] = {}
    questions = _grid()["questions"]
    usual = {"arm": "default", "paper": questions["default"]["arms"]["default"]["paper"]}
    abouts = {}
    for place, (question, content) in enumerate(questions.items()):
        about = {"question": question, "place": place, "heading": content["heading"]}
        about |= {"probes": content.get("probes", False)}
        about["reference"] = {"paper": None, "paper_linear": None, **content.get("reference", usual)}
        abouts[question] = about
        for name, arm in content.get("arms", {}).items():
            changes = {stage: arm.get(stage, {}) for stage in STAGES}
            of_paper = {key: arm.get(key) for key in ("paper", "paper_linear")}
            model = arm.get("model", "model")
            arms[name] = {**about, "label": arm["label"], **of_paper, "also": [], "model": model, **changes}
    for question, content in questions.items():
        for name in content.get("also", []):
            arms[name]["also"].append(abouts[question])
    return arms


def arms_of(name: str) -> list[str]:
    """The arms that a profile means by a name: an arm, a question, or a set."""
    grid, arms = _grid(), load_arms()
    known = {
        question: [*content.get("arms", {}), *content.get("also", [])]
        for question, content in grid["questions"].items()
    }
    known |= grid["sets"]
    known |= {arm: [arm] for arm in arms}
    one_of("arms", name, known)
    return known[name]


def changes_of(arm: str) -> str:
    """What an arm changes, on one line."""
    changes = load_arms()[arm]
    found = [f"model = {changes['model']}"] if changes["model"] != "model" else []
    for stage in STAGES:
        for name, value in changes[stage].items():
            if name == "scale":
                found += [f"{key} x {factor}" for key, factor in value.items()]
            elif stage != "probe":
                found.append(f"{name} = {value}")
    return ", ".join(found)


def _grid() -> dict:
    path = project_root() / "arms.yaml"
    stat = path.stat()
    return copy.deepcopy(_parse(str(path), stat.st_mtime_ns, stat.st_size))


@lru_cache
def _parse(path: str, changed: int, size: int) -> dict:
    return yaml.safe_load(Path(path).read_text())


def runs_of(profile: dict) -> dict[str, dict]:
    """The runs of a profile, ``{<profile>-<arm>-<seed>: {arm, seed, and what the arm changes in each stage}}``, in the
    order in which they are trained.

    ``arms`` says for an arm, a question or a set of arms how many of the ``seeds`` it gets.
    """
    name, seeds, known = profile["profile"], profile["seeds"], load_arms()
    runs: dict[str, dict] = {}
    for group, count in profile["arms"].items():
        require(1 <= count <= len(seeds), f"arms: {group}", count, f"from 1 to {len(seeds)}, the number of seeds")
        arms = arms_of(group)
        for seed in seeds[:count]:
            for arm in arms:
                changes = {stage: model_of(profile, known[arm]) | known[arm][stage] for stage in STAGES}
                runs.setdefault(f"{name}-{arm}-{seed}", {"arm": arm, "seed": seed, **changes})
    return runs


def model_of(profile: dict, arm: dict) -> dict:
    """What an arm with a model of its own puts in the place of the profile's ``model``."""
    section = arm["model"]
    if section == "model":
        return {}
    require(
        section in profile,
        f"model of arm {arm['label']!r}",
        section,
        f"a section of profiles/{profile['profile']}.yaml",
    )
    return copy.deepcopy(profile[section])  # YAML would write a shared one as an alias


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
    changes = {**model_of(params, arms[arm]), **arms[arm][stage]}
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
