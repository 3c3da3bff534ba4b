"""Runs a notebook as a pipeline stage, with the active profile's values and one arm's changes.

    python -m simmimlib.stages activate quick              # params.yaml becomes profiles/quick.yaml
    python -m simmimlib.stages data
    python -m simmimlib.stages pretrain --arm l2 --seed 0
    python -m simmimlib.stages finetune --arm l2 --seed 0
    python -m simmimlib.stages ablations
    python -m simmimlib.stages dry-run imagenet-100ep      # a few steps of a profile on generated images

Needs papermill, neither DVC nor git. The executed notebook lands beside the stage's other files when it has finished;
when it fails it stays in ``.scratch/`` with the traceback, and the command ends non-zero. A training stage that was
killed goes on where it was when it is started again; SIGTERM and Ctrl-C let it save first.

Started in several processes (``torchrun``, ``srun``; see ``launch.py``), the first one runs the notebook and the others
the loop that the notebook calls.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import yaml

from simmimlib.settings import load_yaml, project_root, stage_parameters

SCRATCH = Path(".scratch")


def run_notebook(notebook: str, parameters: dict, folder: Path) -> None:
    """Executes ``notebooks/<notebook>.ipynb`` and puts the executed copy into ``folder``."""
    # A grammar that jsonschema would load to check one string format, which no notebook uses: it takes over a second,
    # as long as the rest of papermill.
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill  # imported here: activating a profile does not need it
    from nbclient.exceptions import DeadKernelError

    SCRATCH.mkdir(exist_ok=True)
    scratch = SCRATCH / "-".join([*folder.parts[1:], f"{notebook}.ipynb"])
    try:
        with signals_to_the_kernel():
            papermill.execute_notebook(
                f"notebooks/{notebook}.ipynb",
                str(scratch),
                parameters,
                kernel_name="python3",
                shutdown_kernel="immediate",  # its files are written: waiting for it to tidy up costs a second a stage
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
            )
    except papermill.PapermillExecutionError as error:
        sys.exit(f"{error.ename}: {error.evalue}\n{notebook} failed; the notebook with the traceback is {scratch}")
    except DeadKernelError:
        sys.exit(
            f"{notebook}: the process that ran the notebook died; the system kills one that takes too much memory. "
            f"Start the stage again to go on from its last checkpoint. The notebook so far is {scratch}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if "seed" in parameters:  # by which tables.py tells whether a run is the one it looks for
        (folder / "parameters.json").write_text(json.dumps(parameters, indent=1) + "\n")
    shutil.move(scratch, folder / f"{notebook}.ipynb")


@contextmanager
def signals_to_the_kernel():
    """SIGINT and SIGTERM reach the training, which saves; the notebook then fails, and the stage with it."""
    import psutil  # imported here: comes with the notebooks' kernel

    def pass_on(number, frame):
        kernels = psutil.Process().children()
        if not kernels:
            raise KeyboardInterrupt("stopped before the notebook was started")
        for kernel in kernels:
            kernel.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_loop(stage: str, parameters: dict) -> dict:
    """What the notebook of a training stage calls, without the notebook; returns the metrics."""
    # imported here: the stages themselves run in a kernel of their own
    from simmimlib.finetune import FinetuneSettings, finetune
    from simmimlib.pretrain import PretrainSettings, pretrain

    settings, loop = {"pretrain": (PretrainSettings, pretrain), "finetune": (FinetuneSettings, finetune)}[stage]
    return loop(settings.from_values(parameters))


def activate(name: str) -> None:
    """Copies a profile to params.yaml, unless params.yaml holds edits that are in no profile."""
    active = Path("params.yaml")
    wanted = load_yaml("profile", name)
    if active.exists():
        current = yaml.safe_load(active.read_text())
        profiles = [yaml.safe_load(path.read_text()) for path in Path("profiles").glob("*.yaml")]
        if current == wanted:
            return
        if current not in profiles:
            sys.exit(
                "params.yaml has changes that no file of profiles/ has: keep them as profiles/<new name>.yaml (with "
                "that name as its `profile`), or drop them with `git checkout params.yaml`, then try again"
            )
    shutil.copyfile(f"profiles/{name}.yaml", ".params.partial.yaml")
    Path(".params.partial.yaml").replace(active)


def dry_run(name: str) -> None:
    """Two steps of a profile's pre-training and two of its fine-tuning: its model, its recipe, but noise for images.

    Shows that a profile starts, on any machine; batches are of two images, so the numbers mean nothing.
    """
    import numpy as np  # imported here, like the loops: the other stages run in a kernel of their own
    from PIL import Image

    from simmimlib.packing import pack
    from simmimlib.sources import DataSettings

    params = load_yaml("profile", name)
    folder = SCRATCH / "dry-run" / name
    rng = np.random.default_rng(0)
    for i, part in enumerate(("train/a", "train/b", "val/a", "val/b")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for j in range(2):
            noise = rng.integers(0, 256, (300, 400 + 10 * i, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / part / f"{j}.png")
    packed = {"data": str(folder / "packed"), "batch_size": 2, "epochs": 1}
    size = {key: params["data"][key] for key in ("size", "channels", "statistics")}
    pack(DataSettings(data="folder", path=str(folder), out=packed["data"], **size))
    for stage in ("pretrain", "finetune"):
        _, values, _ = stage_parameters(stage, params, "default", 0)
        values |= {**packed, "out": str(folder / stage)}
        if stage == "finetune":
            values |= {"checkpoint": str(folder / "pretrain" / "model.safetensors"), "labels": 0}
        metrics = run_loop(stage, values)
        print(f"{name} {stage}: loss {metrics['loss']:.3f}, {metrics['images_per_second']:.2f} images/s")
    shutil.rmtree(folder)  # weights of full-size models, trained on noise


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simmimlib.stages", description=__doc__.split("\n")[0])
    stages = ["activate", "data", "pretrain", "finetune", "ablations", "dry-run"]
    parser.add_argument("stage", choices=stages)
    parser.add_argument("name", nargs="?", default="quick", help="the profile to activate or to try")
    parser.add_argument("--arm", default="default", help="a file of arms/, without .yaml")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (project_root() / "dvc.yaml").exists():
        parser.error("run this in the project's folder (the one that holds dvc.yaml)")
    try:
        if arguments.stage == "activate":
            return activate(arguments.name)
        if arguments.stage == "dry-run":
            return dry_run(arguments.name)
        params = yaml.safe_load(Path("params.yaml").read_text())
        notebook, parameters, folder = stage_parameters(arguments.stage, params, arguments.arm, arguments.seed)
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) > 0:
            run_loop(arguments.stage, parameters)
            return
        run_notebook(notebook, parameters, folder)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
