"""A copy of the project with a tiny profile, and commands in it as a user gives them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from conftest import ROOT, TINY, write_images

PARTS = ("notebooks", "simmimlib", "profiles", "arms.yaml", "dvc.yaml", ".dvcignore")
STAGES = (sys.executable, "-m", "simmimlib.pipeline.stages")
CAMPAIGN = (sys.executable, "-m", "simmimlib.pipeline.campaign")


def environment() -> dict:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": "."}


def run(*command, cwd, ok=True) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output[-5000:]
    return output


def copy_project(root: Path) -> Path:
    root.mkdir()
    # mine.yaml: a user's own profile, by the README's name, which tests write too
    left_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "mine.yaml")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, root / part, ignore=left_out)
        else:
            shutil.copy(source, root / part)
    return root


def tiny_project(folder: Path, **changes) -> Path:
    """A copy of the project in ``folder`` whose active profile is tiny, but for ``changes``; with DVC, without git."""
    root = copy_project(folder / "project")
    write_images(folder / "images")
    profile = {
        "profile": "tiny",
        "seeds": [0, 1],
        "arms": {"default": 1, "scratch": 1},
        "data": {"data": "folder", "path": str(folder / "images"), "size": 16, "channels": 3},
        "model": {"encoder": "vit_tiny_patch16_224", "encoder_kwargs": TINY, "image_size": 16},
        "pretrain": {"mask_patch_size": 4, "epochs": 2, "batch_size": 8},
        "finetune": {"labelled_images": 8, "epochs": 2, "batch_size": 4},
        "probe": {"labelled_images": 8, "k": 3},
    }
    write_profile(root, profile | changes)
    run(*STAGES, "activate", "tiny", cwd=root)
    run("dvc", "init", "-q", "--no-scm", cwd=root)
    return root


def write_profile(root: Path, profile: dict) -> None:
    (root / "profiles/tiny.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))


def read_profile(root: Path) -> dict:
    return yaml.safe_load((root / "profiles/tiny.yaml").read_text())


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    """Path -> bytes of the files of these names below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in folder.rglob(name)}
