"""The pipeline and the notebooks, run as a user runs them, on a few tiny images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from conftest import ROOT, TINY, write_images

PARTS = ("notebooks", "simmimlib", "arms", "profiles", "dvc.yaml", ".dvcignore")


def run(*command, cwd, ok=True):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output[-5000:]
    return output


@pytest.fixture
def project(tmp_path):
    """A copy of the project whose active profile is tiny."""
    root = tmp_path / "project"
    root.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, root / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            shutil.copy(source, root / part)
    write_images(tmp_path / "images")
    profile = {
        "profile": "tiny",
        "arms": ["default"],
        "seeds": [0],
        "data": {"data": "folder", "path": str(tmp_path / "images"), "size": 16, "channels": 3},
        "model": {"encoder": "vit_tiny_patch16_224", "encoder_kwargs": TINY, "image_size": 16},
        "pretrain": {"mask_patch_size": 4, "epochs": 2, "batch_size": 8},
        "finetune": {"labels": 8, "epochs": 2, "batch_size": 4},
    }
    (root / "profiles/tiny.yaml").write_text(yaml.safe_dump(profile))
    shutil.copy(root / "profiles/quick.yaml", root / "params.yaml")
    run(sys.executable, "-m", "simmimlib.stages", "activate", "tiny", cwd=root)
    run("dvc", "init", "-q", "--no-scm", cwd=root)
    return root


def test_pipeline(project):
    run("dvc", "repro", cwd=project)
    results = project / "results/tiny"
    table = pd.read_csv(results / "ablations.csv")
    assert table["arm"].tolist() == ["default", "scratch"] and table["top1"].between(0, 100).all()
    runs = pd.read_csv(results / "runs.csv")
    assert runs["images_seen"].tolist() == [16, 16] and set(runs["seed"]) == {0}
    assert "| Default" in (results / "ablations.md").read_text()
    for figure in ("arms", "loss", "top1", "reconstructions"):
        assert (results / f"figures/{figure}.png").read_bytes().startswith(b"\x89PNG")
    executed = json.loads((results / "runs/default-0/pretrain/02_pretrain.ipynb").read_text())
    assert any(cell.get("outputs") for cell in executed["cells"])
    assert "results/tiny/summary.json" in run("dvc", "metrics", "show", cwd=project)

    assert "up to date" in run("dvc", "repro", cwd=project), "a second repro does nothing"

    # prose, outputs and metadata of a notebook, or the code of a figure, re-train nothing
    for path in (project / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        notebook["cells"][0]["source"] = ["another title"]
        notebook["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["hello"]}]
        notebook["metadata"]["saved"] = "by JupyterLab"
        path.write_text(json.dumps(notebook))
    with (project / "simmimlib/figures.py").open("a") as file:
        file.write("# another figure\n")
    output = run("dvc", "repro", cwd=project)
    for stage in ("data@tiny", "pretrain@tiny-default-0", "finetune@tiny-default-0", "scratch@tiny-0"):
        assert f"Stage '{stage}' didn't change" in output
    assert "Running stage 'ablations@tiny'" in output


def test_a_failing_stage_leaves_its_notebook_where_it_says(project):
    shutil.rmtree(project.parent / "images" / "train" / "dark")
    output = run(sys.executable, "-m", "simmimlib.stages", "data", cwd=project, ok=False)
    assert "has classes that" in output and "train lacks: dark" in output
    kept = output.strip().splitlines()[-1].rpartition(" is ")[2]
    assert "Traceback" in (project / kept).read_text()
    assert not (project / "results/tiny/01_data.ipynb").exists()


def test_an_interrupted_repro_goes_on(project):
    """Ctrl-C reaches dvc and the stage; the training saves, and the next repro takes it from there."""
    profile = yaml.safe_load((project / "params.yaml").read_text())
    profile["pretrain"]["epochs"] = 1500
    (project / "params.yaml").write_text(yaml.safe_dump(profile))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["dvc", "repro", "pretrain@tiny-default-0"]
    with subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        log = project / "results/tiny/runs/default-0/pretrain/log.csv"
        while not log.exists() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate()[0].decode()
    assert process.returncode != 0
    step = int(output.rpartition("stopped by a signal after step ")[2].partition(";")[0])
    assert 2 <= step < 3000 and "02_pretrain failed; the notebook with the traceback is .scratch/" in output
    assert f"going on after step {step} of 3000" in run(*command, cwd=project)
    assert len(pd.read_csv(log)) == 1500


def test_a_stage_in_two_processes(project):
    """The first process runs the notebook, the second the loop that the notebook calls."""
    run(sys.executable, "-m", "simmimlib.stages", "data", cwd=project)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run(*torchrun, "-m", "simmimlib.stages", "pretrain", cwd=project)
    folder = project / "results/tiny/runs/default-0/pretrain"
    assert sorted(path.name for path in folder.iterdir()) == [
        "02_pretrain.ipynb",
        "log.csv",
        "metrics.json",
        "model.safetensors",
        "parameters.json",
    ]


def test_heavy_stages_elsewhere(project, tmp_path):
    """A campaign on a machine without DVC and git; its files come back and are taken in by `dvc commit`."""
    profile = yaml.safe_load((project / "params.yaml").read_text()) | {"arms": ["default", "l2"], "seeds": [0, 1]}
    for name in ("profiles/tiny.yaml", "params.yaml"):
        (project / name).write_text(yaml.safe_dump(profile))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(project, elsewhere, ignore=shutil.ignore_patterns(".dvc"))
    bare = tmp_path / "bin"
    bare.mkdir()  # a PATH with neither DVC nor git
    campaign = ("env", f"PATH={bare}", sys.executable, "-m", "simmimlib.campaign")
    assert "| default | 0 |" in run(*campaign, "plan", cwd=elsewhere)
    assert (elsewhere / "results/tiny/plan.md").exists()
    output = run(*campaign, "run", "--jobs", "2", cwd=elsewhere)
    assert "0 runs are recorded, 6 are to do" in output and "0 to do" in output
    runs = pd.read_csv(elsewhere / "results/tiny/runs.csv")
    assert sorted(zip(runs["arm"], runs["seed"], strict=True)) == [
        (arm, seed) for arm in ("default", "l2", "scratch") for seed in (0, 1)
    ]
    assert "6 runs are recorded, 0 are to do" in run(*campaign, "run", cwd=elsewhere)

    run("dvc", "repro", "code", "data@tiny", cwd=project)
    shutil.copytree(elsewhere / "results/tiny/runs", project / "results/tiny/runs")
    run("dvc", "commit", "--force", *(f"{stage}@tiny-{arm}-{seed}" for stage in ("pretrain", "finetune")
        for arm in ("default", "l2") for seed in (0, 1)), "scratch@tiny-0", "scratch@tiny-1", cwd=project)  # fmt: skip
    output = run("dvc", "repro", cwd=project)
    assert "Running stage 'ablations@tiny'" in output and output.count("Running stage") == 1
    assert (project / "results/tiny/figures/reconstructions.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("activate", "nosuch"), "profile = 'nosuch': there is no profiles/nosuch.yaml; known are "),
        (("pretrain", "--arm", "nosuch"), "arm = 'nosuch': there is no arms/nosuch.yaml; known are block_full_40"),
    ],
)
def test_unknown_names(arguments, message):
    assert message in run(sys.executable, "-m", "simmimlib.stages", *arguments, cwd=ROOT, ok=False)


def test_activating_a_profile_keeps_edits(tmp_path):
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copy(ROOT / "profiles/cifar10.yaml", tmp_path / "params.yaml")
    activate = (sys.executable, "-m", "simmimlib.stages", "activate", "quick")
    run(*activate, cwd=tmp_path)
    assert (tmp_path / "params.yaml").read_text() == (ROOT / "profiles/quick.yaml").read_text()
    with (tmp_path / "params.yaml").open("a") as file:
        file.write("extra: 1\n")
    assert "params.yaml has changes" in run(*activate, cwd=tmp_path, ok=False)
    assert "extra: 1" in (tmp_path / "params.yaml").read_text()


def papermill(notebook, out, *parameters, cwd=ROOT, ok=True):
    source = str(ROOT / f"notebooks/{notebook}.ipynb")
    return run("papermill", "-k", "python3", "--no-progress-bar", source, str(out), *parameters, cwd=cwd, ok=ok)


def test_tour(tmp_path):
    papermill("00_tour", tmp_path / "tour.ipynb", "-p", "mask_ratio", "0.5")
    cells = json.loads((tmp_path / "tour.ipynb").read_text())["cells"]
    text = "".join("".join(o.get("text", [])) for c in cells for o in c.get("outputs", []))
    assert "(1, 3072, 6, 6)" in text and "hidden pixels painted over:  0.0" in text
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 5


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("mask_ratio", "1.5", "mask_ratio = 1.5: must be above 0 and at most 1"),
        ("mask_rato", "0.5", "unknown parameter 'mask_rato': did you mean 'mask_ratio'?"),
    ],
)
def test_bad_parameters_stop_in_the_first_cell(tmp_path, parameter, value, message):
    output = papermill("02_pretrain", tmp_path / "out.ipynb", "-p", parameter, value, ok=False)
    assert f"ValueError: {message}" in output
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    executed = [cell for cell in cells if cell.get("execution_count")]
    assert len(executed) == 3, "the parameters, papermill's, and the cell that checks them"
