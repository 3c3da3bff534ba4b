import pytest

from simmimlib.train import losses, resume


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The rolling checkpoints of a test belong into its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def often(monkeypatch):
    """Looks at losses and saves at every second step."""
    monkeypatch.setattr(losses, "CHECK_STEPS", 2)
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(resume, "SAVE_SHARE", 1e9)
