"""Files that must agree with each other: notebooks, settings, profiles, arms, documents, pins."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from ruamel.yaml import YAML

import simmimlib
from conftest import ROOT
from simmimlib import DataSettings, FinetuneSettings, PretrainSettings, ProbeSettings
from simmimlib.machine.statements import LIBRARY
from simmimlib.notebook import NOTEBOOKS, WIDTH, parameters_cell, settings_of
from simmimlib.pipeline.arms import data_parameters, load_arms, stage_parameters
from simmimlib.pipeline.profiles import load_profile

PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
YAML_FILES = ["params.yaml", "arms.yaml", "dvc.yaml", *(f"profiles/{name}.yaml" for name in PROFILES)]


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def cells_of(name):
    return json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]


def test_every_notebook_is_known():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_without_outputs_and_fit_jupyterlab(name):
    for cell in cells_of(name):
        assert not cell.get("outputs") and not cell.get("execution_count")
        if cell["cell_type"] == "code":
            wide = [line for line in "".join(cell["source"]).splitlines() if len(line) > WIDTH]
            assert not wide, wide


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_parameters_cell_is_generated_from_the_settings(name):
    """The same names, defaults and explanations: a process without a notebook runs what the notebook runs."""
    settings = settings_of(name)
    (cell,) = [cell for cell in cells_of(name) if "parameters" in cell["metadata"].get("tags", [])]
    assert "".join(cell["source"]) == parameters_cell(settings), "make format writes it again"
    values = {}
    for node in ast.parse("".join(cell["source"])).body:
        values[node.target.id] = ast.literal_eval(node.value)
    assert values == dataclasses.asdict(settings())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_setting_is_explained_where_a_user_looks(name):
    settings = settings_of(name)
    assert all(settings.about.get(field) for field in settings.names())
    assert all(f"{field}: {settings.about[field]}" in settings.__doc__ for field in settings.names())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["02_pretrain", "04_ablations"])
def test_papermill_explains_every_parameter(name):
    command = [sys.executable, "-m", "papermill", "--help-notebook", f"notebooks/{name}.ipynb"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings = settings_of(name)
    shown = re.sub(r"\s+", " ", said)
    for field in settings.names():
        assert f"{field}: " in shown and re.sub(r"\s+", " ", settings.about[field]) in shown, field


# profiles of so many arms that a test of them is slow
WHOLE_GRIDS = ("cifar10", "cifar10-cpu", "cifar10-replica", "imagenette")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in WHOLE_GRIDS)) for name in PROFILES]
)
def test_profiles_and_arms_give_valid_settings(name):
    profile = load_profile(name)
    DataSettings.from_values(data_parameters(profile))
    arms = dict.fromkeys(run["arm"] for run in profile["runs"].values())
    assert "default" in arms
    for arm in ["default"] if name == "imagenet-100ep" else arms:  # the same sizes as imagenette, on a larger model
        PretrainSettings.from_values(stage_parameters(profile, "pretrain", arm, 0))
        for stage, settings in (("finetune", FinetuneSettings), ("probe", ProbeSettings)):
            settings.from_values(stage_parameters(profile, stage, arm, 0) | {"checkpoint": ""})


@pytest.mark.parametrize("name", PROFILES)
def test_a_profiles_header_says_what_it_costs_or_that_it_was_not_run(name):
    header = [line for line in (ROOT / f"profiles/{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert re.search(r"\d min\b|minutes|hours|[Nn]ot (run|trained)", " ".join(header)), header


@pytest.mark.parametrize("path", YAML_FILES)
def test_dvc_and_papermill_read_the_same_values(path):
    """DVC reads YAML 1.2, papermill 1.1: 1e-4 is a number to one and a string to the other."""
    text = (ROOT / path).read_text()
    assert YAML(typ="safe").load(text) == yaml.safe_load(text)


def test_dvc_yaml_is_short():
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 90


def test_the_afternoons_read_is_short():
    loops = [LIBRARY / f"train/{name}.py" for name in ("loop", "pretrain", "finetune")]
    others = [LIBRARY / f"model/{name}.py" for name in ("mae", "fcmae")]  # each can be read, or left, by itself
    simmim = {*(LIBRARY / "model").glob("*.py"), *loops} - {*others}
    assert sum(len(path.read_text().splitlines()) for path in simmim) <= 1200
    assert all(len(path.read_text().splitlines()) <= 135 for path in others)


def imports_of(path):
    """(wing, module) of what a module imports of the library when it is itself imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simmimlib"):
            yield node.module.removeprefix("simmimlib").removeprefix(".")


ALLOWED = {  # pipeline -> train -> data, weights -> model -> machine; report beside train, and neither knows the other
    "settings": set(),
    "machine": {"settings"},
    "model": {"machine", "settings"},
    "weights": {"model", "machine", "settings"},
    "data": {"machine", "settings"},
    "train": {"data", "weights", "model", "machine", "settings"},
    "report": {"data", "model", "machine", "settings"},
    "notebook": {"machine", "settings"},
    "pipeline": {"train", "report", "data", "weights", "model", "machine", "settings"},
}


def test_imports_run_one_way():
    for path in LIBRARY.rglob("*.py"):
        wing = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
        for module in imports_of(path) if wing != "__init__" else ():
            other = module.partition(".")[0]
            assert other == wing or other in ALLOWED[wing], f"{path.relative_to(LIBRARY)} imports {module}"


@pytest.mark.parametrize(
    "module",
    ["simmimlib", "simmimlib.settings", "simmimlib.pipeline.stages", "simmimlib.pipeline.campaign",
     "simmimlib.pipeline.arms", "simmimlib.report.tables", "simmimlib.report.runs", "simmimlib.report.statistics"],
)  # fmt: skip
def test_light_modules_do_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_public_names():
    fixed = {"MaskGenerator", "avg_dist", "create_encoder", "create_head", "SimMIM", "load_checkpoint", "export_timm"}
    fixed |= {"pretrain", "finetune", "linear_probe", "knn"}
    assert fixed < set(simmimlib.__all__)
    for name in simmimlib.__all__:
        assert getattr(simmimlib, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        simmimlib.nosuch  # noqa: B018


def test_arms_in_the_readme_and_in_the_grid_have_labels():
    labels = [arm["label"] for arm in load_arms().values()]
    assert len(set(labels)) == len(labels), "a table or a figure with two equal labels cannot be read"


def test_pins_agree():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert dict(line.split("==") for line in environment if "==" in line) == pins
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().splitlines())
    assert {name: constraints[name.lower()] for name in pins} == pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, ranges):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert {Requirement(r).name for r in ranges} == set(pins)
