"""Profiles, arms, params.yaml: what an experiment consists of, and what is said when one of them was edited."""

import shutil

import pytest
import yaml

from conftest import ROOT
from simmimlib.pipeline.arms import arms_of, changes_of, load_arms, runs_of, stage_parameters, wanted_runs
from simmimlib.pipeline.profiles import activate, load_profile, read_params, refresh
from simmimlib.report.runs import settings_key

PAPER = {  # shown in the paper's tables 1 to 5, Swin-B, 100 epochs
    "square": [82.6, 82.5, 82.5],
    "block_half": [82.7, 82.6, 82.4],
    "block_full": [82.7, 82.6, 82.5],
    "patch_eighth": [81.9, 82.0, 82.1],
    "patch_quarter": [82.0, 82.1, 82.4],
    "patch_half": [82.4, 82.7, 82.8],
    "patch_double": [82.6, 82.6],
    "ratio": [82.7, 82.8, 82.8, 82.9, 83.0, 82.8, 82.7, 82.4, 82.4],
    "head_mlp": [82.8],
    "head_inverse": [82.4, 82.5],
    "resolution": [82.3, 82.7, 82.8, 82.7, 82.8],
    "reconstruct_all": [81.7],
    "target_bins_8": [82.7, 82.7],
    "target_bins_256": [82.3],
    "target_clusters": [82.4],
    "l2": [82.7],
    "smooth_l1": [82.7],
    "default": [82.8],
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with profiles and arms, and ``quick`` active."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    for name in ("dvc.yaml", "arms.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    activate("quick")
    return tmp_path


def edit(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


@pytest.mark.parametrize(("prefix", "values"), PAPER.items())
def test_the_papers_numbers(monkeypatch, prefix, values):
    monkeypatch.chdir(ROOT)
    assert [arm["paper"] for name, arm in load_arms().items() if name.startswith(prefix)] == values


def test_arms_the_paper_predicts_at_a_quarter(monkeypatch):
    monkeypatch.chdir(ROOT)
    arms = load_arms()
    quarter = {name for name, arm in arms.items() if arm["pretrain"].get("resolution") == 0.25}
    assert quarter == {"resolution_4", "target_bins_8_quarter", "target_bins_256", "target_clusters_512"}
    assert changes_of("target_bins_256") == "target = bins_256, resolution = 0.25"


def test_every_arm_is_the_default_with_a_change_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    params = load_profile("imagenet-100ep") | {"convnext": {"encoder": "convnextv2_base"}}
    arms = [name for name in load_arms() if name not in ("ratio_60",)]  # which is the default, at this mask ratio
    given = {arm: settings_key({"pretrain": stage_parameters(params, "pretrain", arm, 0)}) for arm in arms}
    assert len(set(given.values())) == len(arms)


def test_sets_questions_and_arms_name_arms(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert arms_of("headline") == ["scratch", "default", "reconstruct_all"]
    assert arms_of("loss") == ["l2", "smooth_l1"] and arms_of("l2") == ["l2"]
    with pytest.raises(ValueError, match="arms = 'l3': must be one of"):
        arms_of("l3")


def test_runs_go_by_the_order_of_the_profile_and_no_run_twice(monkeypatch):
    monkeypatch.chdir(ROOT)
    profile = {"profile": "p", "seeds": [3, 5], "arms": {"default": 2, "headline": 1, "loss": 1}}
    names = [f"{run['arm']}-{run['seed']}" for run in runs_of(profile).values()]
    assert names == ["default-3", "default-5", "scratch-3", "reconstruct_all-3", "l2-3", "smooth_l1-3"]
    with pytest.raises(ValueError, match="arms: loss = 3: must be from 1 to 2, the number of seeds"):
        runs_of(profile | {"arms": {"loss": 3}})


def test_a_profile_extends_another(monkeypatch):
    monkeypatch.chdir(ROOT)
    base, longer = load_profile("imagenet-100ep"), load_profile("imagenet-800ep-swin-b")
    assert longer["pretrain"]["epochs"] == 800 and longer["pretrain"]["mask_ratio"] == base["pretrain"]["mask_ratio"]
    assert longer["finetune"] == base["finetune"] | {"image_size": 224, "layer_decay": 0.8}
    large = load_profile("imagenet-800ep-swin-l")
    assert large["pretrain"] == longer["pretrain"] and large["model"]["encoder"].startswith("swin_large")


def test_scale_serves_every_image_size(monkeypatch):
    monkeypatch.chdir(ROOT)
    params = load_profile("imagenet-100ep")
    assert stage_parameters(params, "pretrain", "patch_half_60", 0)["mask_patch_size"] == 16
    assert stage_parameters(load_profile("cifar10"), "pretrain", "patch_half_60", 0)["mask_patch_size"] == 4
    assert stage_parameters(params, "pretrain", "length_double", 0)["epochs"] == 200


def test_unknown_sections_names_and_arms(project):
    with pytest.raises(ValueError, match=r"profile = 'nosuch': there is no profiles/nosuch\.yaml; known are .*quick"):
        load_profile("nosuch")
    edit(project / "profiles/quick.yaml", "pretrain:", "pretraining:")
    with pytest.raises(ValueError, match="section = 'pretraining': must be one of"):
        load_profile("quick")
    with pytest.raises(ValueError, match="arm = 'nosuch': must be one of default, scratch"):
        stage_parameters(read_params(), "pretrain", "nosuch", 0)


def test_activating_keeps_edits_and_says_what_to_do(project):
    edit(project / "params.yaml", "epochs: 12", "epochs: 20")
    kept = (project / "params.yaml").read_text()
    with pytest.raises(ValueError, match=r"params\.yaml was edited since it was written from profiles/quick\.yaml \("
                       r"pretrain\.epochs: 12 -> 20\): keep the edits as profiles/<new name>\.yaml"):  # fmt: skip
        activate("cifar10")
    assert (project / "params.yaml").read_text() == kept
    (project / "params.yaml").unlink()
    activate("cifar10")
    assert read_params()["profile"] == "cifar10"


def test_an_edited_profile_is_taken_when_it_is_made_active_again(project, capsys):
    edit(project / "profiles/quick.yaml", "epochs: 12", "epochs: 20")
    refresh()
    said = capsys.readouterr().out
    assert "profiles/quick.yaml was edited (pretrain.epochs: 20 -> 12) and params.yaml counts" in said
    assert "make repro PROFILE=quick takes it" in said and read_params()["pretrain"]["epochs"] == 12
    activate("quick")
    assert (
        "profiles/quick.yaml has changed since it was made active (pretrain.epochs: 12 -> 20)"
        in capsys.readouterr().out
    )
    assert read_params()["pretrain"]["epochs"] == 20
    refresh()
    assert capsys.readouterr().out == ""


def test_edited_params_count_and_it_is_said(project, capsys):
    edit(project / "params.yaml", "epochs: 12", "epochs: 20")
    refresh()
    said = capsys.readouterr().out
    assert said == "params.yaml was edited: unlike profiles/quick.yaml, pretrain.epochs: 12 -> 20; params.yaml counts\n"


def test_edited_arms_of_params_need_a_refresh(project):
    edit(project / "params.yaml", "headline: 5", "headline: 2")
    with pytest.raises(ValueError, match="`runs` does not follow from its `arms` and `seeds`"):
        read_params()
    refresh()
    arms = [run["arm"] for run in read_params()["runs"].values()]
    assert arms.count("scratch") == 2


def test_params_yaml_is_the_profile(project):
    """DVC and a reader see the same values as the profile's own file."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    assert params == load_profile("quick") == read_params()


def test_what_a_run_is_given_includes_its_data(project):
    run = wanted_runs(read_params())[0]
    assert run["arm"] == "scratch" and run["changes"] == "epochs = 0"
    assert run["stages"]["data"]["data"] == "mnist5k" and run["stages"]["pretrain"]["epochs"] == 0
    edit(project / "params.yaml", "  size: 32", "  size: 64")
    assert settings_key(wanted_runs(read_params())[0]["stages"]) != settings_key(run["stages"])
