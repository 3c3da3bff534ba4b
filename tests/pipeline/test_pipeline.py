"""The pipeline, run as a user runs it, on a few tiny images."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pandas as pd
import pytest
import yaml
from project import CAMPAIGN, STAGES, contents, environment, read_profile, run, tiny_project, write_profile

from simmimlib.report.records import runs_in

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path):
    return tiny_project(tmp_path)


def edit(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def stages_that_ran(output):
    return re.findall(r"Running stage '([^']+)'", output)


def stages_to_run(project):
    """What `dvc status` finds changed, without the pipeline's first and last stage."""
    run("dvc", "repro", "code", cwd=project)
    status = json.loads(run("dvc", "status", "--json", cwd=project))
    return {stage.partition("@")[0] for stage in status} - {"code", "ablations"}


def test_pipeline(project):
    run("dvc", "repro", cwd=project)
    results = project / "results/tiny"
    table = pd.read_csv(results / "ablations.csv")
    assert table["arm"].tolist() == ["default", "scratch"] and table["mean"].between(0, 100).all()
    runs = pd.read_csv(results / "runs.csv")
    assert runs["images_seen"].tolist() == [16, 16] and set(runs["seed"]) == {0}
    assert runs["pretrain_images_seen"].tolist() == [32, 0] and runs["probe_linear"].between(0, 100).all()
    markdown = (results / "ablations.md").read_text()
    assert "| Default" in markdown and "Raw pixels: linear probe" in markdown
    shown = re.findall(r"!\[[^]]*\]\((figures/[^)]*)\)", markdown)
    assert {f"figures/pretraining-{name}.png" for name in ("blocks", "loss", "top1", "reconstructions")} < set(shown)
    for figure in shown:
        assert (results / figure).read_bytes().startswith(b"\x89PNG")
    report = (results / "report.html").read_text()
    assert report.count("data:image/png;base64,") == len(shown) and "Raw pixels: linear probe" in report
    (results / "report.html").unlink()
    assert "results/tiny/report.html is written" in run(*STAGES, "report", cwd=project)
    assert (results / "report.html").read_text() == report
    assert "must be there: make repro PROFILE=quick writes it" in run(*STAGES, "report", "quick", cwd=project, ok=False)
    executed = json.loads((results / "runs/default-0/pretrain/02_pretrain.ipynb").read_text())
    assert any(cell.get("outputs") for cell in executed["cells"])
    assert "results/tiny/summary.json" in run("dvc", "metrics", "show", cwd=project)

    assert "up to date" in run("dvc", "repro", cwd=project), "a second repro does nothing"

    # prose, outputs and metadata of a notebook, a docstring, a comment, layout, a type and the code of a figure or a
    # table re-train nothing
    for path in (project / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        notebook["cells"][0]["source"] = ["another title"]
        notebook["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["hello"]}]
        notebook["metadata"]["saved"] = "by JupyterLab"
        path.write_text(json.dumps(notebook))
    library = project / "simmimlib"
    for path in library.rglob("*.py"):
        edit(path, '"""', '"""Another first word. ')
    edit(library / "train/loop.py", "run.optimizer.step()\n", "run . optimizer.step ( )  # a comment\n")
    edit(library / "model/simmim.py", "mask: Tensor", "mask: 'Tensor'")
    (library / "report/figures.py").write_text((library / "report/figures.py").read_text() + "\nANOTHER = 1\n")
    (library / "report/tables.py").write_text((library / "report/tables.py").read_text() + "\nANOTHER = 1\n")
    assert stages_to_run(project) == set()
    assert stages_that_ran(run("dvc", "repro", cwd=project)) == ["ablations@tiny"]

    # the table of a profile whose file was edited is the active one's; both are named
    edit(project / "profiles/tiny.yaml", "epochs: 2", "epochs: 3")
    said = run(*STAGES, "refresh", cwd=project)
    assert "profiles/tiny.yaml was edited (pretrain.epochs: 3 -> 2) and params.yaml counts" in said


def test_mae_and_fcmae_beside_simmim(tmp_path):
    """Another encoder and other methods are arms like any other, from pre-training to tables and pictures."""
    project = tiny_project(
        tmp_path,
        arms={"default": 1, "mae": 1, "mae_depth_2": 1, "convnext_scratch": 1, "fcmae": 1},
        pretrain={"mask_patch_size": 8, "epochs": 2, "batch_size": 8},
        convnext={
            "encoder": "convnextv2_atto",
            "encoder_kwargs": {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
        },
    )
    run(*STAGES, "data", cwd=project)
    run(*CAMPAIGN, "run", "--jobs", "2", cwd=project)
    run(*STAGES, "ablations", cwd=project)
    given = json.loads((project / "results/tiny/runs/fcmae-0/finetune/parameters.json").read_text())["finetune"]
    assert given["encoder"] == "convnextv2_atto"
    markdown = (project / "results/tiny/ablations.md").read_text()
    assert "| ConvNeXtV2 from scratch | 1 |" in markdown and "| FCMAE | 1 |" in markdown
    probes = markdown.partition("## How deep a decoder")[2].partition("what the arms cost")[2]
    first, second = re.findall(r"\| (MAE, decoder of \d block.*) \|", probes)[:2]
    operations = [float(row.split(" | ")[4]) for row in (first, second)]
    assert 0 < operations[0] < operations[1]
    for picture in ("convolutions-reconstructions", "method-blocks", "decoder_depth-depth"):
        assert (project / f"results/tiny/figures/{picture}.png").is_file()


@pytest.mark.parametrize(
    ("module", "before", "after", "stages"),
    [
        ("model/targets.py", "(prediction - target).abs()", "(target - prediction).abs()", {"pretrain", "finetune"}),
        ("data/crops.py", "ASPECT_RATIO = (3 / 4, 4 / 3)", "ASPECT_RATIO = (4 / 5, 5 / 4)", {"pretrain", "finetune"}),
        ("train/optim.py", "eps=1e-8", "eps=1e-6", {"pretrain", "finetune"}),
        ("machine/device.py", "COMPILE_STEPS = 2000", "COMPILE_STEPS = 1000", {"pretrain", "finetune"}),
        ("settings.py", "return float(value)", "return float(value + 0)", {"pretrain", "finetune"}),
        ("data/decoding.py", "CHUNK = 1024", "CHUNK = 512", {"data"}),
        ("pipeline/arms.py", "def packed_folder", "ANOTHER = 1\n\n\ndef packed_folder", set()),
        ("machine/progress.py", "class Progress", "ANOTHER = 1\n\n\nclass Progress", set()),
    ],
)
def test_which_statements_count(packed_and_trained, module, before, after, stages):
    """A changed statement in what numbers follow from makes the training stages stale; another does not."""
    path = packed_and_trained / "simmimlib" / module
    kept = path.read_text()
    try:
        edit(path, before, after)
        assert stages_to_run(packed_and_trained) == (stages | {"probe"} if "pretrain" in stages else stages)
    finally:
        path.write_text(kept)


@pytest.fixture(scope="module")
def packed_and_trained(tmp_path_factory):
    """A project whose stages are up to date (committed without having been run: nothing here looks at numbers)."""
    root = tiny_project(tmp_path_factory.mktemp("stale"), arms={"default": 1})
    run("dvc", "repro", "code", "data@tiny", cwd=root)
    stages = [f"{stage}@tiny-default-0" for stage in ("pretrain", "finetune", "probe")]
    for stage in ("pretrain", "finetune", "probe"):
        folder = root / f"results/tiny/runs/default-0/{stage}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("no model")
    run("dvc", "commit", "--force", *stages, cwd=root)
    return root


def test_runs_side_by_side_end_as_dvc_repro_does(project, tmp_path):
    """Two at a time or one: the same bytes, the same lock file but for times, and nothing left to do."""
    write_profile(project, read_profile(project) | {"arms": {"default": 2, "scratch": 2}})
    run(*STAGES, "activate", "tiny", cwd=project)
    output = run(*CAMPAIGN, "repro", "--jobs", "2", cwd=project)
    assert "4 of 4 runs are to do, 2 at a time" in output and "run 4 of 4: " in output and "min left" in output
    assert stages_that_ran(run("dvc", "repro", cwd=project)) == ["ablations@tiny"]
    assert "up to date" in run("dvc", "repro", cwd=project)
    assert run(*CAMPAIGN, "repro", cwd=project).strip() == ""

    results = project / "results/tiny/runs"
    names = ("model.safetensors", "log.csv", "confusion.csv", "blocks.csv")
    side_by_side, count = contents(results, *names), len(read_profile(project)["arms"])
    assert len(side_by_side) == 2 * count * (2 + 3 + 1)
    lock = (project / "dvc.lock").read_text()
    (project / "dvc.lock").unlink()
    for folder in (results, project / ".dvc/cache"):
        subprocess.run(["rm", "-rf", folder], check=True)
    run("dvc", "repro", cwd=project)
    assert contents(results, *names) == side_by_side
    assert yaml.safe_load((project / "dvc.lock").read_text())["stages"].keys() == yaml.safe_load(lock)["stages"].keys()


def test_a_run_of_other_parameters_is_named_and_left_out(project):
    run("dvc", "repro", cwd=project)
    edit(project / "params.yaml", "epochs: 2", "epochs: 3")  # of pre-training
    run(*STAGES, "ablations", cwd=project, ok=False)
    output = json.loads((project / ".scratch/tiny-04_ablations.ipynb").read_text())
    assert "there is no finished run of the default arm" in json.dumps(output)
    # the runs of one arm are retrained; the other's are named
    run("dvc", "repro", "finetune@tiny-default-0", "probe@tiny-default-0", cwd=project)
    run(*STAGES, "ablations", cwd=project)
    markdown = (project / "results/tiny/ablations.md").read_text()
    left_out = "- results/tiny/runs/scratch-0 is left out: its pretrain was given"
    assert "| Default" in markdown and left_out not in markdown, "scratch has no epochs of its own to change"

    # a run under way, here of a seed that the profile does not want: not in the curves either
    runs = project / "results/tiny/runs"
    shutil.copytree(runs / "default-0", runs / "default-1")
    header, *rows = (runs / "default-1/finetune/log.csv").read_text().splitlines()
    (runs / "default-1/finetune/log.csv").write_text("\n".join([header, rows[0].rpartition(",")[0] + ","]) + "\n")
    run(*STAGES, "ablations", cwd=project)
    shutil.rmtree(runs / "default-1")

    edit(project / "params.yaml", "labelled_images: 8", "labelled_images: 6")
    run("dvc", "repro", "finetune@tiny-default-0", cwd=project)
    run(*STAGES, "ablations", cwd=project)
    markdown = (project / "results/tiny/ablations.md").read_text()
    why = "its finetune was given other finetune parameters than params.yaml gives now (labelled_images = 8, not 6)"
    assert f"- results/tiny/runs/scratch-0 is left out: {why}" in markdown

    # other data settings: refused, as long as the packed images are those of before
    edit(project / "params.yaml", "size: 16", "size: 32")
    said = run(*STAGES, "pretrain", cwd=project, ok=False)
    assert "data/packed/tiny was packed with other settings" in said and "size: 16 -> 32" in said


def test_a_failing_stage_leaves_its_notebook_where_it_says(project):
    subprocess.run(["rm", "-r", project.parent / "images" / "train" / "dark"], check=True)
    output = run(*STAGES, "data", cwd=project, ok=False)
    assert "has classes that" in output and "train lacks: dark" in output
    kept = output.strip().splitlines()[-1].rpartition(" is ")[2]
    assert "Traceback" in (project / kept).read_text()
    assert not (project / "results/tiny/01_data.ipynb").exists()


def test_a_failing_run_is_shown_and_the_others_go_ahead(project):
    profile = read_profile(project)
    profile["arms"] = {"default": 1, "head_inverse_swin_t": 1, "scratch": 1}
    profile["pretrain"]["batch_size"] = 8
    write_profile(project, profile)
    run(*STAGES, "activate", "tiny", cwd=project)
    edit(project / "arms.yaml", "pretrain: {head: inverse_swin_t}", "pretrain: {head: inverse_swin_t, batch_size: 17}")
    run(*STAGES, "refresh", cwd=project)
    output = run(*CAMPAIGN, "repro", "--jobs", "1", cwd=project, ok=False)
    assert "batch_size = 17: must be at most 16, the images to train on" in output
    assert "failed: tiny-head_inverse_swin_t-0" in output and "tiny-scratch-0, top-1" in output


def test_what_stops_dvc_is_shown(project):
    """A machine that went down while DVC wrote can leave its lock on files empty."""
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text("")
    output = run(*CAMPAIGN, "repro", cwd=project, ok=False)
    assert "rwlock" in output and "Traceback" not in output


def test_an_interrupted_repro_resumes(project):
    """Ctrl-C reaches dvc and the stage; the training saves, and the next repro takes it from there."""
    profile = read_profile(project)
    profile["pretrain"]["epochs"] = 1500
    write_profile(project, profile)
    run(*STAGES, "activate", "tiny", cwd=project)
    command = ["dvc", "repro", "pretrain@tiny-default-0"]
    with subprocess.Popen(
        command,
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        log = project / "results/tiny/runs/default-0/pretrain/log.csv"
        while not log.exists() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate()[0].decode()
    assert process.returncode != 0
    step = int(output.rpartition("stopped by a signal after step ")[2].partition(";")[0])
    assert 2 <= step < 3000 and "02_pretrain failed; the notebook with the traceback is .scratch/" in output
    assert f"resuming after step {step} of 3000" in run(*command, cwd=project)
    assert len(pd.read_csv(log)) == 1500


def test_an_interrupted_campaign_resumes(project):
    """SIGTERM to `campaign repro`: what it started saves, nothing is left running, and the next call resumes."""
    profile = read_profile(project)
    profile["pretrain"]["epochs"] = 1500
    write_profile(project, profile | {"arms": {"default": 2}})
    run(*STAGES, "activate", "tiny", cwd=project)
    with subprocess.Popen(
        [*CAMPAIGN, "repro", "--jobs", "2"],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        logs = [project / f"results/tiny/runs/default-{seed}/pretrain/log.csv" for seed in (0, 1)]
        while not all(log.exists() for log in logs) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output = process.communicate()[0].decode()
    assert process.returncode != 0 and "stopped; to resume: tiny-default-0, tiny-default-1" in output, output
    for seed in (0, 1):
        assert "stopped by a signal after step" in (project / f".scratch/tiny-default-{seed}.log").read_text()
    run(*CAMPAIGN, "repro", "--jobs", "2", cwd=project)
    for seed, log in enumerate(logs):
        assert "resuming after step" in (project / f".scratch/tiny-default-{seed}.log").read_text()
        assert len(pd.read_csv(log)) == 1500


def test_a_stage_in_two_processes(project):
    """The first process runs the notebook, the second the loop that the notebook calls."""
    run(*STAGES, "data", cwd=project)
    torchrun = (STAGES[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run(*torchrun, *STAGES[1:], "pretrain", cwd=project)
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
    write_profile(project, read_profile(project) | {"arms": {"default": 2, "scratch": 2, "l2": 1}})
    run(*STAGES, "activate", "tiny", cwd=project)
    elsewhere = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", project, elsewhere], check=True)
    bare = tmp_path / "bin"
    bare.mkdir()  # a PATH with neither DVC nor git
    campaign = ("env", f"PATH={bare}", *CAMPAIGN)
    assert "| default | 0 |" in run(*campaign, "plan", cwd=elsewhere)
    assert (elsewhere / "results/tiny/plan.md").exists()
    output = run(*campaign, "run", "--jobs", "2", cwd=elsewhere / "notebooks")  # a sub-folder is fine
    assert "0 runs are recorded, 5 are to do" in output and "run 5 of 5" in output
    runs = pd.read_csv(elsewhere / "results/tiny/runs.csv")
    assert sorted(zip(runs["arm"], runs["seed"], strict=True)) == [
        ("default", 0), ("default", 1), ("l2", 0), ("scratch", 0), ("scratch", 1)]  # fmt: skip
    assert "5 runs are recorded, 0 are to do" in run(*campaign, "run", cwd=elsewhere)

    run("dvc", "repro", "code", "data@tiny", cwd=project)
    subprocess.run(["cp", "-r", elsewhere / "results/tiny/runs", project / "results/tiny/runs"], check=True)
    stages = [f"{stage}@{key}" for stage in ("pretrain", "finetune", "probe")
              for key in yaml.safe_load((project / "params.yaml").read_text())["runs"]]  # fmt: skip
    run("dvc", "commit", "--force", *stages, cwd=project)
    assert stages_that_ran(run("dvc", "repro", cwd=project)) == ["ablations@tiny"]
    assert (project / "results/tiny/figures/loss-reconstructions.png").exists()

    # runs.csv and curves.csv, which the campaign wrote, are enough for the tables and for the figures of numbers
    elsewhere_results = elsewhere / "results/tiny"
    subprocess.run(["rm", "-rf", elsewhere_results / "runs"], check=True)
    run(*STAGES, "ablations", cwd=elsewhere)
    markdown = (elsewhere_results / "ablations.md").read_text()
    assert "| L2 | 1 |" in markdown and "![arms](figures/arms.png)" in markdown
    numbers = ["loss-loss.png", "loss-top1.png", "loss-blocks.png"]
    assert contents(elsewhere_results / "figures", *numbers) == contents(project / "results/tiny/figures", *numbers)
    assert not (elsewhere_results / "figures/loss-reconstructions.png").exists()

    # with the predictions, of which the other machine wrote a picture an arm, also for the reconstructions
    shutil.copytree(project / "results/tiny/predictions", elsewhere_results / "predictions", dirs_exist_ok=True)
    run(*STAGES, "ablations", cwd=elsewhere)
    picture = ["loss-reconstructions.png"]
    assert contents(elsewhere_results / "figures", *picture) == contents(project / "results/tiny/figures", *picture)

    # without its curves a figure that shows a run stays, one that is not there shows the others
    figures, before = elsewhere_results / "figures", contents(elsewhere_results / "figures", *numbers, *picture)
    curves = pd.read_csv(elsewhere_results / "curves.csv", dtype={"settings": str})
    curves[curves["arm"] != "l2"].to_csv(elsewhere_results / "curves.csv", index=False)
    for path in (elsewhere_results / "predictions").glob("l2-*.png"):
        path.unlink()
    (figures / "loss-top1.png").unlink()
    run(*STAGES, "ablations", cwd=elsewhere)
    after = contents(figures, *numbers, *picture)
    assert [name for name in before if before[name] != after[name]] == ["loss-top1.png"]
    assert runs_in(figures / "loss-top1.png") == {"default-0", "default-1"}
    assert "Drawn when" not in (elsewhere_results / "ablations.md").read_text()

    # the other way round it stays, too; the tables say that some of it is missing
    curves[(curves["arm"] != "default") | (curves["seed"] != 1)].to_csv(elsewhere_results / "curves.csv", index=False)
    run(*STAGES, "ablations", cwd=elsewhere)
    assert contents(figures, *numbers, *picture) == after
    markdown = (elsewhere_results / "ablations.md").read_text()
    assert re.findall("Drawn when some of these runs were not there: (.*)", markdown) == ["top1."]


def test_too_few_minutes_start_nothing_that_would_not_fit(project):
    output = run(*CAMPAIGN, "run", "--minutes", "0", cwd=project, ok=True)
    assert "0 runs are recorded, 2 are to do" in output and "run 1 of" not in output
