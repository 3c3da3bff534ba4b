"""Files that must agree with each other: notebooks, settings, profiles, arms, pins."""

import ast
import dataclasses
import json
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from ruamel.yaml import YAML

from conftest import ROOT
from simmimlib.finetune import FinetuneSettings
from simmimlib.pretrain import PretrainSettings
from simmimlib.settings import stage_parameters
from simmimlib.sources import DataSettings
from simmimlib.tables import TableSettings, load_arms
from simmimlib.tour import TourSettings

NOTEBOOKS = {
    "00_tour": TourSettings,
    "01_data": DataSettings,
    "02_pretrain": PretrainSettings,
    "03_finetune": FinetuneSettings,
    "04_ablations": TableSettings,
}
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
ARMS = sorted(path.stem for path in (ROOT / "arms").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def notebook(name):
    return json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_without_outputs(name):
    for cell in notebook(name):
        assert not cell.get("outputs") and not cell.get("execution_count")


@pytest.mark.parametrize(("name", "settings"), NOTEBOOKS.items())
def test_parameters_cell_explains_every_setting(name, settings):
    (cell,) = [cell for cell in notebook(name) if "parameters" in cell["metadata"].get("tags", [])]
    first, *lines = "".join(cell["source"]).splitlines()
    assert first.startswith("# Parameters:")
    values = {}
    for line in lines:
        (node,) = ast.parse(line).body
        values[node.target.id] = ast.literal_eval(node.value)
        assert re.search(r"  # \w", line), f"{line} has no explanation"
    # the same defaults: a process without a notebook (stages.run_loop) must run what the notebook runs
    assert values == dataclasses.asdict(settings())


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_and_arms_give_valid_settings(profile):
    params = yaml.safe_load((ROOT / f"profiles/{profile}.yaml").read_text())
    assert params["profile"] == profile
    _, values, _ = stage_parameters("data", params, "default", 0)
    DataSettings.from_values(values)
    same_sizes_as_imagenette = profile == "imagenet-100ep"  # the same arms at the same sizes, on a larger model
    for arm in ["default"] if same_sizes_as_imagenette else params["arms"]:
        _, values, _ = stage_parameters("pretrain", params, arm, 0)
        PretrainSettings.from_values(values)
    _, values, _ = stage_parameters("finetune", params, "scratch", 0)
    FinetuneSettings.from_values(values)
    assert "default" in params["arms"] and "scratch" not in params["arms"]
    assert set(load_arms(params["arms"])["arm"]) == {*params["arms"], "scratch"}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_changes_something(arm):
    values = yaml.safe_load((ROOT / f"arms/{arm}.yaml").read_text())
    assert set(values) == {"question", "label", "paper", "paper_status", "pretrain", "finetune"}
    assert values["paper_status"] in ("sure", "recalled", None)
    assert (values["paper"] is None) == (values["paper_status"] is None)
    assert bool(values["pretrain"] or values["finetune"]) == (arm not in ("default", "scratch"))


@pytest.mark.parametrize(
    "path", ["params.yaml", *(f"profiles/{p}.yaml" for p in PROFILES), *(f"arms/{a}.yaml" for a in ARMS)]
)
def test_dvc_and_papermill_read_the_same_values(path):
    """DVC reads YAML 1.2, papermill 1.1: 1e-4 is a number to one and a string to the other."""
    text = (ROOT / path).read_text()
    assert YAML(typ="safe").load(text) == yaml.safe_load(text)


def test_pins_agree():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert dict(line.split("==") for line in environment if "==" in line) == pins
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().splitlines())
    assert {name: constraints[name] for name in pins} == pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, ranges):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert {Requirement(r).name for r in ranges} == set(pins)
