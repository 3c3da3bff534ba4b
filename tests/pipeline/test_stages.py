"""What a stage hands to the process that trains."""

import os

from simmimlib.pipeline import stages
from simmimlib.pipeline.profiles import load_profile


def test_the_environment_of_a_stage_yields_to_the_users(monkeypatch):
    given = {}
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "3"})
    monkeypatch.setattr(stages, "read_params", lambda: load_profile("quick"))
    monkeypatch.setattr(stages, "check_packed", lambda params: None)
    monkeypatch.setattr(stages, "run_notebook", lambda *arguments: given.update(os.environ))
    stages.run_stage("pretrain", "default", 0)
    assert given == stages.ENVIRONMENT | {"OMP_NUM_THREADS": "3"}
