"""Many runs in the time there is, on a machine with the library and papermill but neither DVC nor git.

    python -m simmimlib.pipeline.campaign plan                       # what each arm costs here, in the order of the runs
    python -m simmimlib.pipeline.campaign run --minutes 9            # as many runs of the active profile as fit
    python -m simmimlib.pipeline.campaign run --minutes 9 --jobs 4   # four at a time, where one does not fill the device

Runs go in the order of the profile's `arms`. A finished run is recorded in ``results/<profile>/runs.csv`` at once, and
a run that is recorded there is not run again. One that is under way when the time is over saves, and resumes at the
next start on this machine. On a CPU each run has a thread of its own, and without ``--jobs`` there are as many as cores.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil

from simmimlib.machine.files import project_root, write_csv, write_text
from simmimlib.machine.signals import stop_signals
from simmimlib.pipeline.arms import STAGES, packed_folder, read_params, stage_parameters, wanted_runs
from simmimlib.report.runs import load_runs

PATIENCE = 60  # seconds that a run has for saving


def record(params: dict) -> pd.DataFrame:
    """Writes ``runs.csv`` as it stands, if there is a finished run, and returns it."""
    folder = Path("results", params["profile"])
    runs, left_out = load_runs(folder, wanted_runs(params))
    for line in left_out:
        print(line, flush=True)
    if not runs.empty:
        write_csv(folder / "runs.csv", runs)
    return runs


def names_of(runs: pd.DataFrame) -> list[str]:
    return [] if runs.empty else (runs["arm"] + "-" + runs["seed"].astype(str)).tolist()


class Running:
    """The stages of one (arm, seed), one process after the other."""

    def __init__(self, params: dict, arm: str, seed: int, threads: int):
        self.name, self.start = f"{arm}-{seed}", time.monotonic()
        self.arguments = ["--arm", arm, "--seed", str(seed)]
        self.environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self.log = Path(f".scratch/{params['profile']}-{self.name}.log")
        self.log.parent.mkdir(exist_ok=True)
        self.log.unlink(missing_ok=True)
        epochs = {stage: stage_parameters(params, stage, arm, seed).get("epochs", 1) for stage in STAGES}
        self.trained = epochs["pretrain"] > 0  # runs without pre-training are short
        self.stages = list(STAGES)
        self.next_stage()

    def next_stage(self) -> None:
        command = [sys.executable, "-m", "simmimlib.pipeline.stages", self.stages.pop(0), *self.arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def ended(self) -> bool:
        """True when nothing of it is left to do or one of its stages failed."""
        if self.process.poll() is None:
            return False
        if self.process.returncode == 0 and self.stages:
            self.next_stage()
            return False
        return True

    def finish(self) -> None:
        """Waits for a process that was asked to stop; one that does not (its notebook was just starting) is killed."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                process.kill()

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.start) / 60


def run(params: dict, minutes: float, jobs: int, threads: int) -> None:
    """Works through the order; a run is started only if the longest of its kind so far would still fit."""
    start = time.monotonic()
    deadline = start + 60 * minutes
    done = names_of(record(params))
    wanted = [(one["arm"], one["seed"]) for one in params["runs"].values()]
    todo = [(arm, seed) for arm, seed in wanted if f"{arm}-{seed}" not in done]
    total = len(todo)
    print(f"{len(done)} runs are recorded, {total} are to do, {jobs} at a time", flush=True)
    running: list[Running] = []
    longest: dict[bool, float] = {}
    failed = []
    with stop_signals() as stopped:
        while todo or running:
            left = 0 if stopped else (deadline - time.monotonic()) / 60
            while todo and len(running) < jobs and not stopped:
                kind = stage_parameters(params, "pretrain", *todo[0])["epochs"] > 0
                if longest.get(kind, 0) >= left:
                    break
                running.append(Running(params, *todo.pop(0), threads))
            if not running:
                break
            time.sleep(0.2)
            if left <= 0:
                for one in running:
                    one.process.send_signal(signal.SIGTERM)  # saves, and ends
                for one in running:
                    one.finish()
                print(f"stopped; to resume: {', '.join(one.name for one in running)}", flush=True)
                break
            for one in [one for one in running if one.ended()]:
                running.remove(one)
                if one.process.returncode:
                    failed.append(one.name)
                    print(f"{one.name} failed:\n{one.log.read_text()[-2000:]}", flush=True)
                    continue
                longest[one.trained] = max(longest.get(one.trained, 0), one.minutes)
                ended = total - len(todo) - len(running)
                print(f"run {ended} of {total}: {outcome(one, record(params), ended, total, start)}", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def outcome(one: Running, runs: pd.DataFrame, ended: int, total: int, start: float) -> str:
    """Of a finished run: its accuracy, how long it took, and how long the others will."""
    top1 = dict(zip(names_of(runs), runs.get("top1", []), strict=True)).get(one.name)
    left = (time.monotonic() - start) / ended * (total - ended) / 60
    return f"{one.name}, top-1 {top1:.1f}, {one.minutes:.1f} min; about {left:.0f} min left"


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
    lines = [f"# Plan of {params['profile']}", "", f"{timed['device']}, {timed['precision']}, {timed['versions']}; ", ""]
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
    parser.add_argument("what", choices=["plan", "run"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="run: the time there is (default: no end)")
    parser.add_argument("--jobs", type=int, help="run: how many share the device (default: a GPU one, else one a core)")
    arguments = parser.parse_args()
    os.chdir(project_root())
    try:
        params = read_params()
    except ValueError as error:
        sys.exit(str(error))
    if not Path(packed_folder(params), "manifest.json").is_file():
        subprocess.run([sys.executable, "-m", "simmimlib.pipeline.stages", "data"], check=True)
    if arguments.what == "plan":
        plan(params)
        return
    from simmimlib.machine.device import pick_device  # imported here: brings torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_cpu = pick_device().type == "cpu"
    jobs = arguments.jobs or (cores if on_cpu else 1)
    run(params, arguments.minutes, jobs, threads=max(1, cores // jobs) if on_cpu else 0)


if __name__ == "__main__":
    main()
