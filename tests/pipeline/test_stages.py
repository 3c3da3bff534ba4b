"""What a stage hands to the process that trains, and how the two talk."""

import os
from pathlib import Path

import nbformat

from simmimlib.pipeline import stages
from simmimlib.pipeline.execute import run_notebook
from simmimlib.pipeline.profiles import load_profile


def test_the_environment_of_a_stage_yields_to_the_users(monkeypatch):
    given = {}
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "3"})
    monkeypatch.setattr(stages, "read_params", lambda: load_profile("quick"))
    monkeypatch.setattr(stages, "check_packed", lambda params: None)
    monkeypatch.setattr(stages, "run_notebook", lambda *arguments: given.update(os.environ))
    stages.run_stage("pretrain", "default", 0)
    assert given == stages.ENVIRONMENT | {"OMP_NUM_THREADS": "3"}


def test_a_notebook_needs_no_port(tmp_path, monkeypatch):
    """Runs that start side by side would race for one that was free."""
    monkeypatch.chdir(tmp_path)
    code = "import json, ipykernel.connect as c; print(json.loads(c.get_connection_info())['transport'])"
    Path("notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), "notebooks/talk.ipynb")
    run_notebook("talk", {}, Path("results/talk"))
    cells = nbformat.read("results/talk/talk.ipynb", as_version=4).cells
    assert cells[-1].outputs[0].text == "ipc\n"
