"""Many runs of the active profile, side by side where one does not fill the machine, in the order of its `arms`.

    python -m simmimlib.pipeline.campaign repro                     # what `dvc repro` would train; part of `make repro`
    python -m simmimlib.pipeline.campaign plan                      # what each arm costs here, in the order of the runs
    python -m simmimlib.pipeline.campaign run --minutes 9           # as many runs as fit; needs neither DVC nor git
    python -m simmimlib.pipeline.campaign run --minutes 9 --jobs 4  # four at a time, where one does not fill the device
    python -m simmimlib.pipeline.campaign submit --minutes 240      # each run a job of a cluster (cluster.py)

``repro`` leaves each run to a ``dvc repro`` of its own, so that DVC's cache, lock file and rules are those of a single
one. ``run`` is for machines that only train: a finished run is recorded in ``results/<profile>/runs.csv`` at once, and
one that is recorded there is not run again. One that is under way when the time is over saves, and resumes at the next
start on this machine, with the stage that it was in. Without ``--jobs`` there are as many runs at a time as cores, and
on a GPU one.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd

from simmimlib.machine.files import project_root, write_text
from simmimlib.machine.signals import stop_signals
from simmimlib.pipeline.arms import STAGES, packed_folder, stage_parameters
from simmimlib.pipeline.budget import makespan
from simmimlib.pipeline.profiles import check_classes, check_packed, read_params
from simmimlib.pipeline.running import STAGE, Running, by_key, claim, finished, record

NEWS = 60  # seconds between two looks at the runs that are under way
DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]


def run(params: dict, minutes: float, jobs: int) -> None:
    """As many runs as fit; each is recorded in ``runs.csv`` when it has finished."""
    done = set(record(params).get("key", []))
    wanted = {key: of for key, of in by_key(params).items() if key not in done}
    todo = {key: partial(claim, key, params, of) for key, of in wanted.items()}
    print(f"{len(done)} runs are recorded, {len(todo)} are to do, {jobs} at a time", flush=True)
    side_by_side(params, todo, jobs, minutes, lambda: record(params))


def repro(params: dict, jobs: int) -> None:
    """Trains what is not up to date, each run by a ``dvc repro`` of its own; the tables are left to a last one."""
    first = {"code", f"data@{params['profile']}"}
    changed = changed_stages()
    if changed & first:
        subprocess.run([*DVC, "repro", *sorted(first)], check=True)
        changed = changed_stages()
    check_classes(params)
    stale = {stage.partition("@")[2] for stage in changed}
    # `--single-item`: DVC would not look at `code` again while another run holds it to read
    single = [*DVC, "repro", "--single-item"]
    todo = {
        key: partial(Running, key, [[*single, *(f"{stage}@{key}" for stage in STAGES)]])
        for key in params["runs"]
        if key in stale
    }
    if todo:
        print(f"{len(todo)} of {len(params['runs'])} runs are to do, {jobs} at a time", flush=True)
        side_by_side(params, todo, jobs, float("inf"), lambda: finished(params)[0])


def changed_stages() -> set[str]:
    """Names of the stages that are not up to date. DVC says itself, on standard error, why it cannot tell."""
    status = subprocess.run([*DVC, "status", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return set(json.loads(status.stdout))


def side_by_side(
    params: dict, todo: Mapping[str, Callable[[], Running | None]], jobs: int, minutes: float, report: Callable
) -> None:
    """Works through the commands of the runs; one is started only if the longest of its kind so far would still fit.

    Args:
        todo: key of a run -> what starts it; gives None where nothing is to do.
        report: the finished runs as a table, called when one has ended.
    """
    start, total = time.monotonic(), len(todo)
    looked = start
    deadline = start + 60 * minutes
    waiting, failed = list(todo), []
    running: list[Running] = []
    longest: dict[bool, float] = {}  # minutes

    # runs without pre-training are short
    arms = {params["runs"][key]["arm"] for key in todo}
    pretrained = {arm: stage_parameters(params, "pretrain", arm, 0)["epochs"] > 0 for arm in arms}
    trained = {key: pretrained[params["runs"][key]["arm"]] for key in todo}

    with stop_signals() as stopped:
        while waiting or running:
            left = 0 if stopped else (deadline - time.monotonic()) / 60
            while waiting and len(running) < jobs and not stopped:
                if longest.get(trained[waiting[0]], 0) >= left:
                    break
                if one := todo[waiting.pop(0)]():
                    running.append(one)
            if not running:
                break
            time.sleep(0.2)
            if left <= 0:
                for one in running:
                    one.stop()
                for one in running:
                    one.finish()
                print(f"stopped; to resume: {', '.join(one.name for one in running)}", flush=True)
                break
            if time.monotonic() - looked > NEWS:
                looked = time.monotonic()
                for one in running:
                    print(f"  {one.standing()}", flush=True)
            for one in [one for one in running if one.ended()]:
                running.remove(one)
                if one.process.returncode:
                    failed.append(one.name)
                    print(f"{one.name} failed:\n{one.log.read_text()[-2000:]}", flush=True)
                    continue
                longest[trained[one.name]] = max(longest.get(trained[one.name], 0), one.minutes)
                ended = total - len(waiting) - len(running)
                gone = [(trained[other.name], other.minutes) for other in running]
                rest = minutes_left(gone, [trained[key] for key in waiting], longest, jobs)
                print(f"run {ended} of {total}: {outcome(one, report())}; about {rest:.0f} min left", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if stopped:
        sys.exit(f"stopped by {stopped[0]}")


def minutes_left(
    running: list[tuple[bool, float]], waiting: list[bool], longest: dict[bool, float], jobs: int
) -> float:
    """Until all have ended, if none takes longer than the longest of its kind so far (of any, while its has none).

    Args:
        running: of each run under way, whether it is pre-trained, and minutes so far.
        waiting: of each run that is not started, whether it is pre-trained.
        longest: minutes of the longest finished run that is pre-trained, and of the longest that is not.
    """
    expected = [longest.get(kind, max(longest.values())) for kind in (*(kind for kind, _ in running), *waiting)]
    elapsed = [minutes for _, minutes in running] + [0.0] * len(waiting)
    return makespan([max(0.0, whole - gone) for whole, gone in zip(expected, elapsed, strict=True)], jobs)


def outcome(one: Running, runs: pd.DataFrame) -> str:
    """Of a finished run: its accuracy, and how long it took."""
    top1 = runs.loc[runs["key"] == one.name, "top1"]
    said = f"top-1 {top1.iloc[0]:.1f}" if len(top1) else "not in the tables, see below"
    return f"{one.name}, {said}, {one.minutes:.1f} min"


def plan(params: dict) -> None:
    """Times one epoch of each arm's stages on this device; prints the plan and writes results/<profile>/plan.md."""
    from simmimlib.pipeline.stages import run_loop  # imported here: brings torch

    cost: dict[str, float] = {}  # minutes of an arm's pre-training, of an encoder's fine-tuning
    tuned: dict[str, str] = {}  # arm -> its encoder
    for arm in dict.fromkeys(one["arm"] for one in params["runs"].values()):
        cost[arm] = 0.0
        for stage in ("pretrain", "finetune"):
            values = stage_parameters(params, stage, arm, 0)
            tuned[arm] = f"{values['encoder']} {values['encoder_kwargs']}"
            name = tuned[arm] if stage == "finetune" else arm
            if not values["epochs"] or (stage == "finetune" and name in cost):
                continue  # arms of one encoder are fine-tuned alike: that is timed once
            short = {"epochs": 1, "warmup_epochs": 0, "out": f".scratch/plan/{arm}/{stage}"}
            short |= {"checkpoint": ""} if stage == "finetune" else {}
            timed = run_loop(stage, values | short)
            cost[name] = values["epochs"] * timed["wall_seconds"] / 60
    lines = [
        f"# Plan of {params['profile']}",
        "",
        f"{timed['device']}, {timed['precision']}, {timed['versions']}; ",
        "",
    ]
    lines += ["From one epoch of each arm, a run at a time.", "", "| arm | seed | minutes | minutes in all |"]
    lines += ["|---|---|---|---|"]
    total = 0.0
    for one in params["runs"].values():
        minutes = cost[one["arm"]] + cost[tuned[one["arm"]]]
        total += minutes
        lines.append(f"| {one['arm']} | {one['seed']} | {minutes:.1f} | {total:.0f} |")
    write_text(f"results/{params['profile']}/plan.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simmimlib.pipeline.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["repro", "plan", "run", "submit"])
    parser.add_argument("--minutes", type=float, help="run: the time there is (no end); submit: of a job (240)")
    parser.add_argument(
        "--jobs", type=int, help="runs at a time (on a GPU one, else as many as cores; submit: no limit)"
    )
    job = parser.add_argument_group(
        "submit", "The rest is told to sbatch itself: SBATCH_PARTITION, SBATCH_ACCOUNT, ..."
    )
    job.add_argument("--cluster", choices=["slurm", "local"], help="slurm where there is one, else this machine")
    job.add_argument("--nodes", type=int, default=1, help="machines for each run (1)")
    job.add_argument("--gpus-per-node", type=int, default=1, help="GPUs on each of them (1); 0 trains on CPUs")
    job.add_argument("--cpus-per-task", type=int, help="cores for each process (what the cluster gives)")
    given = parser.parse_args()
    os.chdir(project_root())
    try:
        params = read_params()
        if given.what == "repro":
            repro(params, given.jobs or jobs_here())
            return
        if given.what == "submit":
            from simmimlib.pipeline.cluster import submit  # imported here: needs submitit
        if not Path(packed_folder(params), "manifest.json").is_file():
            subprocess.run([*STAGE, "data"], check=True)
        check_packed(params)
        if given.what == "plan":
            plan(params)
        elif given.what == "run":
            run(params, float("inf") if given.minutes is None else given.minutes, given.jobs or jobs_here())
        else:
            machines = (given.cluster, given.nodes, given.gpus_per_node, given.cpus_per_task)
            submit(params, *machines, 240 if given.minutes is None else given.minutes, given.jobs)
    except (ValueError, ImportError) as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


def jobs_here() -> int:
    from simmimlib.machine.device import cores, pick_device  # imported here: brings torch

    return cores() if pick_device().type == "cpu" else 1


if __name__ == "__main__":
    main()
