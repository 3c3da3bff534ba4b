"""What a stage hands to the process that trains, and how the two talk."""

import ast
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


def test_a_kernel_has_sockets_of_its_own(tmp_path, monkeypatch):
    """Kernels that start side by side would race for a port that was free, or share a file."""
    monkeypatch.chdir(tmp_path)
    code = "from ipykernel import connect; print(connect.get_connection_info(unpack=True))"
    Path("notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), "notebooks/talk.ipynb")
    folders = []
    for name in ("one", "two"):
        run_notebook("talk", {}, Path("results", name))
        cells = nbformat.read(f"results/{name}/talk.ipynb", as_version=4).cells
        about = ast.literal_eval(cells[-1].outputs[0].text)
        assert about["transport"] == "ipc"
        folders.append(Path(about["ip"]).parent)
    assert folders[0] != folders[1] and not any(folder.exists() for folder in folders)
