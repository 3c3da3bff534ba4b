"""`make profile`, from the folder to the file, and what it says of bad input."""

import sys

import pytest
import yaml
from project import STAGES, copy_project, run
from ruamel.yaml import YAML

from conftest import write_images
from simmimlib import PretrainSettings
from simmimlib.pipeline import own_images
from simmimlib.pipeline.arms import stage_parameters
from simmimlib.pipeline.budget import Cost
from simmimlib.pipeline.own_images import OwnImagesSettings
from simmimlib.pipeline.profiles import load_profile

FAST = Cost(5, 1e-4, 1e-4, evaluation=0.1, starts=5, probe=2, probe_pixels=3, jobs=2)
PROFILE = (sys.executable, "-m", "simmimlib.pipeline.own_images")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project, where no time is measured: ``profile(*arguments)`` is `make profile`."""
    monkeypatch.chdir(copy_project(tmp_path / "project"))
    monkeypatch.setattr(own_images, "measure", lambda *_: FAST)
    monkeypatch.setattr(own_images, "image_seconds", lambda *_: 1e-3)

    def profile(*arguments, ok=True):
        monkeypatch.setattr(sys, "argv", ["own_images", *map(str, arguments)])
        if ok:
            own_images.main()
            return None
        with pytest.raises(SystemExit) as stopped:
            own_images.main()
        return str(stopped.value)

    return profile


def test_a_profile_is_written_that_the_pipeline_reads(tmp_path, project, capsys):
    root = write_images(tmp_path / "images", count=40)
    (root / "val/dark/same.png").write_bytes((root / "train/dark/1.png").read_bytes())
    project("mine", "--images", root, "--minutes", 10)
    said = capsys.readouterr().out
    assert "profiles/mine.yaml is written: about " in said and "`make repro PROFILE=mine` runs it" in said
    assert "WARNING: 80 training images are few" in said and "WARNING: 1 of 81 validation images" in said
    params = load_profile("mine")
    assert [run["arm"] for run in params["runs"].values()] == ["default"] * 3 + ["scratch"] * 3
    PretrainSettings.from_values(stage_parameters(params, "pretrain", "default", 0))
    text = (tmp_path / "project/profiles/mine.yaml").read_text()
    assert YAML(typ="safe").load(text) == yaml.safe_load(text), "as DVC and as papermill read it"
    assert "# AvgDist is " in text and "# WARNING: 80 training images are few" in text
    assert max(map(len, text.splitlines())) <= 120 or str(root) in text

    said = project("mine", "--images", root, ok=False)
    assert said == "name = 'mine': must be one that is not taken: there is profiles/mine.yaml"


def test_without_classes_it_is_pretrained_alone(tmp_path, project, capsys):
    root = write_images(tmp_path / "images", splits=(".",), classes=(".",), count=200)
    project("flat", "--images", root, "--minutes", 10)
    said = capsys.readouterr().out
    assert "dvc repro pretrain@flat-default-0" in said and "train/<class>/" in said
    params = load_profile("flat")
    assert list(params["runs"]) == ["flat-default-0"] and params["data"]["holdout_per_class"] == 40


@pytest.mark.parametrize("name", ["2024", "on"])
def test_a_name_that_yaml_would_take_for_something_else(tmp_path, project, name):
    root = write_images(tmp_path / "images", splits=(".",), classes=(".",), count=200)
    project(name, "--images", root, "--minutes", 10)
    assert load_profile(name)["profile"] == name


@pytest.mark.parametrize(
    ("name", "images", "minutes", "message"),
    [
        ("my images", "images", 10, "name = 'my images': must be letters, digits, - and _"),
        ("", "images", 10, "name = '': must be that of the profile to write"),
        ("quick", "images", 10, "must be one that is not taken: there is profiles/quick.yaml"),
        ("mine", "nowhere", 10, "must be an existing folder"),
        ("mine", "", 10, "images = '': must be a folder of images"),
        ("mine", "empty", 10, "must be a folder that holds images; this one has none"),
        ("mine", "images", 0, "minutes = 0.0: must be a number above 0"),
        ("mine", "images", 1.5, "minutes = 1.5: must be about "),
        ("mine", "rare", 10, "1 classes have fewer than 2 training images (light); take them out"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(tmp_path, project, name, images, minutes, message):
    write_images(tmp_path / "images", count=40)
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "rare")
    for i in range(1, 8):
        (tmp_path / f"rare/train/light/{i}.png").unlink()
    before = sorted((tmp_path / "project/profiles").iterdir())
    path = str(tmp_path / images) if images else ""
    assert message in project(name, "--images", path, "--minutes", minutes, ok=False)
    assert sorted((tmp_path / "project/profiles").iterdir()) == before


def test_larger_encoders_where_there_is_time_for_them(tmp_path, project, monkeypatch):
    root = write_images(tmp_path / "images", count=40, size=(200, 180))
    for minutes, encoder in ((10, "vit_tiny_patch16_224"), (3000, "swin_tiny_patch4_window7_224")):
        project(f"for{minutes}", "--images", root, "--minutes", minutes)
        assert load_profile(f"for{minutes}")["model"]["encoder"] == encoder
    # one that does not fit into the memory is left out
    monkeypatch.setattr(own_images, "image_seconds", lambda values, _: None if values["image_size"] > 64 else 1e-3)
    project("small", "--images", root, "--minutes", 3000)
    assert load_profile("small")["model"]["encoder_kwargs"]["embed_dim"] == 192
    monkeypatch.setattr(own_images, "image_seconds", lambda *_: None)
    assert "no step of any encoder fits into the memory" in project("none", "--images", root, ok=False)


def test_the_digits_of_the_notebook_are_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = OwnImagesSettings()
    assert len(list((tmp_path / settings.folder()).rglob("*.png"))) == 1797 and settings.folder() == settings.folder()


@pytest.mark.slow
def test_from_a_folder_to_a_report(tmp_path):
    """Measured and run for real; the images are so few that pre-training cannot help, and the profile says so."""
    root = copy_project(tmp_path / "project")
    write_images(tmp_path / "images", count=100)
    said = run(*PROFILE, "mine", "--images", str(tmp_path / "images"), "--minutes", "60", cwd=root)
    assert "trying 3 stages on 200 images" in said and "images/s" in said
    profile = yaml.safe_load((root / "profiles/mine.yaml").read_text())
    assert profile["pretrain"]["epochs"] > 5 and not list((root / ".scratch/own_images").iterdir())
    profile |= {"seeds": [0], "arms": {"default": 1, "scratch": 1}}
    profile["pretrain"] |= {"epochs": 1, "warmup_epochs": 0.0}
    profile["finetune"] |= {"epochs": 1, "warmup_epochs": 0.0}
    (root / "profiles/mine.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
    run(*STAGES, "activate", "mine", cwd=root)
    run("dvc", "init", "-q", "--no-scm", cwd=root)
    run("dvc", "repro", cwd=root)
    report = (root / "results/mine/report.html").read_text()
    assert "From scratch, no pre-training" in report and "data:image/png;base64," in report


@pytest.mark.slow
def test_images_without_classes_are_pretrained_alone_and_repro_says_so(tmp_path):
    root = copy_project(tmp_path / "project")
    write_images(tmp_path / "images", splits=(".",), classes=(".",), count=100)
    run(*PROFILE, "flat", "--images", str(tmp_path / "images"), "--minutes", "30", cwd=root)
    profile = yaml.safe_load((root / "profiles/flat.yaml").read_text())
    profile["pretrain"] |= {"epochs": 1, "warmup_epochs": 0.0}
    (root / "profiles/flat.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
    run(*STAGES, "activate", "flat", cwd=root)
    run("dvc", "init", "-q", "--no-scm", cwd=root)
    said = run(sys.executable, "-m", "simmimlib.pipeline.campaign", "repro", cwd=root, ok=False)
    assert "has no two classes" in said and "dvc repro pretrain@flat-default-0" in said
    run("dvc", "repro", "pretrain@flat-default-0", cwd=root)
    assert (root / "results/flat/runs/default-0/pretrain/model.safetensors").is_file()
