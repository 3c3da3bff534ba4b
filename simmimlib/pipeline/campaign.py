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
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
from filelock import FileLock

from simmimlib.machine.files import project_root, read_json, write_csv, write_text
from simmimlib.machine.signals import stop_signals
from simmimlib.pipeline.arms import STAGES, packed_folder, run_folder, stage_parameters, wanted_runs
from simmimlib.pipeline.budget import makespan
from simmimlib.pipeline.profiles import check_classes, check_packed, read_params
from simmimlib.report.runs import load_runs

PATIENCE = 60  # seconds that a run has for saving
NEWS = 60  # seconds between two looks at the runs that are under way
DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]
STAGE = [sys.executable, "-m", "simmimlib.pipeline.stages"]


class Running:
    """One run of the profile: its commands, one after the other, each in a process group of its own."""

    def __init__(self, name: str, trained: bool, commands: list[list[str]]):
        self.name, self.trained, self.start = name, trained, time.monotonic()
        self.commands = list(commands)
        self.log = Path(f".scratch/{name}.log")
        self.log.parent.mkdir(exist_ok=True)
        self.log.unlink(missing_ok=True)
        self.next_command()

    def next_command(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.commands.pop(0),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Slurm says by it that a job's time is nearly over, to every process; whoever started this one stops it
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )

    def ended(self) -> bool:
        """True when nothing of it is left to do or one of its commands failed."""
        if self.process.poll() is None:
            return False
        if self.process.returncode == 0 and self.commands:
            self.next_command()
            return False
        return True

    def stop(self) -> None:
        """What Ctrl-C does to a command in a terminal: a training saves, and ends."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def finish(self) -> None:
        """Waits for a run that was asked to stop; one that does not (its notebook was just starting) is killed."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended just now
                for process in psutil.Process(self.process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            self.process.kill()

    def standing(self) -> str:
        """Where it stands: the last line of its log, of a training its epoch, loss or accuracy, and seconds left."""
        lines = self.log.read_text(errors="replace").split("\n")
        return f"{self.name}, {self.minutes:.1f} min: {next((line for line in reversed(lines) if line.strip()), '...')}"

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.start) / 60


def run(params: dict, minutes: float, jobs: int) -> None:
    """As many runs as fit; each is recorded in ``runs.csv`` when it has finished."""
    done = set(record(params).get("key", []))
    todo = {key: commands(params, wanted) for key, wanted in by_key(params).items() if key not in done}
    todo = {key: left for key, left in todo.items() if left}  # another campaign may have finished one meanwhile
    print(f"{len(done)} runs are recorded, {len(todo)} are to do, {jobs} at a time", flush=True)
    side_by_side(params, todo, jobs, minutes, lambda: record(params))


def repro(params: dict, jobs: int) -> None:
    """Trains what is not up to date, each run by a ``dvc repro`` of its own; the tables are left to a last one."""
    subprocess.run([*DVC, "repro", "--quiet", "code", f"data@{params['profile']}"], check=True)
    check_classes(params)
    status = subprocess.run([*DVC, "status", "--json"], check=True, capture_output=True, text=True)
    stale = {stage.partition("@")[2] for stage in json.loads(status.stdout)}
    # `--single-item`: DVC would not look at `code` again while another run holds it to read
    single = [*DVC, "repro", "--single-item"]
    todo = {key: [[*single, *(f"{stage}@{key}" for stage in STAGES)]] for key in params["runs"] if key in stale}
    if todo:
        print(f"{len(todo)} of {len(params['runs'])} runs are to do, {jobs} at a time", flush=True)
        side_by_side(params, todo, jobs, float("inf"), lambda: finished(params)[0])


def side_by_side(params: dict, todo: dict[str, list], jobs: int, minutes: float, report: Callable) -> None:
    """Works through the commands of the runs; one is started only if the longest of its kind so far would still fit.

    Args:
        todo: key of a run -> its commands.
        report: the finished runs as a table, called when one has ended.
    """
    start, total = time.monotonic(), len(todo)
    looked = start
    deadline = start + 60 * minutes
    waiting, failed = list(todo), []
    running: list[Running] = []
    longest: dict[bool, float] = {}  # minutes

    def trained(key: str) -> bool:
        """Whether a run is pre-trained: those that are not are short."""
        one = params["runs"][key]
        return stage_parameters(params, "pretrain", one["arm"], one["seed"])["epochs"] > 0

    with stop_signals() as stopped:
        while waiting or running:
            left = 0 if stopped else (deadline - time.monotonic()) / 60
            while waiting and len(running) < jobs and not stopped:
                if longest.get(trained(waiting[0]), 0) >= left:
                    break
                running.append(Running(waiting[0], trained(waiting[0]), todo[waiting.pop(0)]))
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
                longest[one.trained] = max(longest.get(one.trained, 0), one.minutes)
                ended = total - len(waiting) - len(running)
                rest = minutes_left(running, [trained(key) for key in waiting], longest, jobs)
                print(f"run {ended} of {total}: {outcome(one, report())}; about {rest:.0f} min left", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if stopped:
        sys.exit(f"stopped by {stopped[0]}")


def minutes_left(running: list[Running], waiting: list[bool], longest: dict[bool, float], jobs: int) -> float:
    """Until all have ended, if none takes longer than the longest of its kind so far (of any, while its has none).

    Args:
        waiting: of each run that is not started, whether it is pre-trained.
        longest: minutes of the longest finished run that is pre-trained, and of the longest that is not.
    """
    expected = [longest.get(kind, max(longest.values())) for kind in (*(one.trained for one in running), *waiting)]
    elapsed = [one.minutes for one in running] + [0.0] * len(waiting)
    return makespan([max(0.0, whole - gone) for whole, gone in zip(expected, elapsed, strict=True)], jobs)


def outcome(one: Running, runs: pd.DataFrame) -> str:
    """Of a finished run: its accuracy, and how long it took."""
    top1 = runs.loc[runs["key"] == one.name, "top1"]
    said = f"top-1 {top1.iloc[0]:.1f}" if len(top1) else "not in the tables, see below"
    return f"{one.name}, {said}, {one.minutes:.1f} min"


def by_key(params: dict) -> dict[str, dict]:
    """``wanted_runs`` by their keys."""
    return dict(zip(params["runs"], wanted_runs(params), strict=True))


def commands(params: dict, wanted: dict) -> list[list[str]]:
    """The stages that a run lacks, as commands; all from the first that is not finished with what ``wanted`` holds."""
    arm, seed, given = wanted["arm"], wanted["seed"], wanted["stages"]
    folder, stages = run_folder(params, arm, seed), list(STAGES)
    digest = read_json(Path(packed_folder(params), "manifest.json")).get("digest")
    while stages and is_finished(folder / stages[0], {"data": given["data"], stages[0]: given[stages[0]]}, digest):
        del stages[0]
    for stage in stages:  # what is there comes from an earlier training
        (folder / stage / "metrics.json").unlink(missing_ok=True)
    return [[*STAGE, stage, "--arm", arm, "--seed", str(seed)] for stage in stages]


def is_finished(folder: Path, given: dict, digest: str | None) -> bool:
    """Whether a stage saw these images, was given these values and came to its end: its notebook is written last."""
    seen, ended = read_json(folder / "metrics.json").get("data_digest"), folder / f"{STAGES[folder.name]}.ipynb"
    return seen == digest and read_json(folder / "parameters.json") == given and ended.is_file()


def finished(params: dict) -> tuple[pd.DataFrame, list[str]]:
    """The finished runs with their ``key`` in the profile, and a line for each that cannot be taken."""
    runs, left_out = load_runs(Path("results", params["profile"]), wanted_runs(params))
    if not runs.empty:
        runs.insert(0, "key", params["profile"] + "-" + runs["arm"] + "-" + runs["seed"].astype(str))
    return runs, left_out


def record(params: dict) -> pd.DataFrame:
    """Writes ``runs.csv`` as it stands, if there is a finished run; returns its runs with their ``key``.

    One process at a time, wherever it runs: what the last one writes holds the runs of all.
    """
    Path(".scratch").mkdir(exist_ok=True)
    with FileLock(f".scratch/{params['profile']}-runs.csv.lock"):
        runs, left_out = finished(params)
        if not runs.empty:
            write_csv(Path("results", params["profile"], "runs.csv"), runs.drop(columns="key"))
    for line in left_out:
        print(line, flush=True)
    return runs


def plan(params: dict) -> None:
    """Times one epoch of each arm's stages on this device; prints the plan and writes results/<profile>/plan.md."""
    from simmimlib.pipeline.stages import run_loop  # imported here: brings torch

    cost: dict[str, float] = {}
    for arm in dict.fromkeys(one["arm"] for one in params["runs"].values()):
        cost[arm] = 0.0
        for stage in ("pretrain", "finetune"):
            values = stage_parameters(params, stage, arm, 0)
            if not values["epochs"] or (stage == "finetune" and "finetune" in cost):
                continue  # every arm is fine-tuned alike: it is timed once
            short = {"epochs": 1, "warmup_epochs": 0, "out": f".scratch/plan/{arm}/{stage}"}
            short |= {"checkpoint": ""} if stage == "finetune" else {}
            timed = run_loop(stage, values | short)
            minutes = values["epochs"] * timed["wall_seconds"] / 60
            cost |= {"finetune": minutes} if stage == "finetune" else {arm: minutes}
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
        total += cost[one["arm"]] + cost["finetune"]
        lines.append(f"| {one['arm']} | {one['seed']} | {cost[one['arm']] + cost['finetune']:.1f} | {total:.0f} |")
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
    from simmimlib.machine.device import pick_device  # imported here: brings torch

    if pick_device().type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
