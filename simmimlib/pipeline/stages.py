"""Runs a notebook as a pipeline stage, with the active profile's values and one arm's changes.

    python -m simmimlib.pipeline.stages activate quick              # params.yaml becomes profiles/quick.yaml
    python -m simmimlib.pipeline.stages code                        # what counts as a change of code, to results/code/
    python -m simmimlib.pipeline.stages data
    python -m simmimlib.pipeline.stages pretrain --arm l2 --seed 0
    python -m simmimlib.pipeline.stages finetune --arm l2 --seed 0
    python -m simmimlib.pipeline.stages probe --arm l2 --seed 0
    python -m simmimlib.pipeline.stages ablations
    python -m simmimlib.pipeline.stages report cifar10-cpu          # results/cifar10-cpu/report.html, from its tables
    python -m simmimlib.pipeline.stages dry-run imagenet-100ep      # a few steps of a profile on generated images

Needs papermill, neither DVC nor git. The executed notebook lands beside the stage's other files when it has finished;
when it fails it stays in ``.scratch/`` with the traceback, and the command ends non-zero. A training stage that was
killed resumes when it is started again; SIGTERM and Ctrl-C let it save first.

Started in several processes (``torchrun``, ``srun``; see ``machine/distributed.py``), the first one runs the notebook
and the others the loop that the notebook calls.

On the CPU a stage computes with one thread, as torchrun's processes do, so that its numbers do not depend on how many
runs share the machine (``campaign.py`` gives each core one); ``OMP_NUM_THREADS`` overrides it.
"""

import argparse
import os
import sys
from pathlib import Path

from simmimlib.machine.files import project_root, write_text
from simmimlib.machine.statements import GROUPS, group_statements, notebook_statements
from simmimlib.pipeline.arms import STAGES, data_parameters, run_folder, stage_parameters, wanted_runs
from simmimlib.pipeline.execute import run_notebook
from simmimlib.pipeline.profiles import activate, check_packed, read_params, refresh
from simmimlib.pipeline.report import write_report

ENVIRONMENT = {  # of a process that trains, where the user's own does not say otherwise
    "OMP_NUM_THREADS": "1",
    # glibc's malloc would return a step's memory to the system, which clears it page by page for the next step
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


def run_stage(stage: str, arm: str, seed: int) -> None:
    """A training stage of one run."""
    os.environ.update(ENVIRONMENT | os.environ)  # read by what this process starts
    params = read_params()
    check_packed(params)
    values = stage_parameters(params, stage, arm, seed)
    if _number_of_this_process() > 0:
        run_loop(stage, values)
        return
    data = wanted_runs(params)[0]["stages"]["data"]
    run_notebook(STAGES[stage], values, run_folder(params, arm, seed) / stage, {"data": data, stage: values})


def run_loop(stage: str, values: dict) -> dict:
    """What the notebook of a training stage calls, without the notebook; returns the metrics."""
    # imported here: the stages themselves run in a kernel of their own
    from simmimlib.train import finetune, pretrain, probe, settings

    calls = {
        "pretrain": lambda: pretrain.pretrain(settings.PretrainSettings.from_values(values)),
        "finetune": lambda: finetune.finetune(settings.FinetuneSettings.from_values(values)),
        "probe": lambda: probe.probe_blocks(settings.ProbeSettings.from_values(values)),
    }
    return calls[stage]()


def write_code() -> None:
    """The statements of each group of modules and of each notebook, to results/code/."""
    for group in GROUPS:
        write_text(f"results/code/{group}.py", group_statements(group))
    for path in sorted(Path("notebooks").glob("*.ipynb")):
        write_text(f"results/code/{path.stem}.py", notebook_statements(path))


def _number_of_this_process() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simmimlib.pipeline.stages", description=__doc__.split("\n")[0])
    stages = ["activate", "refresh", "code", "data", *STAGES, "ablations", "report", "dry-run"]
    parser.add_argument("stage", choices=stages)
    parser.add_argument("name", nargs="?", help="the profile to activate or to try (quick), to report (the active one)")
    parser.add_argument("--arm", default="default", help="an arm of arms.yaml")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.chdir(project_root())
    if not Path("dvc.yaml").exists():
        parser.error("run this in the project's folder (the one that holds dvc.yaml) or below it")
    try:
        match arguments.stage:
            case "activate":
                activate(arguments.name or "quick")
            case "refresh":
                refresh()
            case "code":
                write_code()
            case "dry-run":
                from simmimlib.pipeline.dry_run import dry_run  # imported here: brings torch

                dry_run(arguments.name or "quick")
            case "data" | "ablations" if _number_of_this_process() > 0:
                pass  # the first process does it alone
            case "data":
                params = read_params()
                run_notebook("01_data", data_parameters(params), Path("results", params["profile"]))
            case "ablations":
                folder = Path("results", read_params()["profile"])
                run_notebook("04_ablations", {"out": str(folder)}, folder)
                write_report()
            case "report":
                print(f"{write_report(arguments.name or '')} is written")
            case stage:
                run_stage(stage, arguments.arm, arguments.seed)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
