"""Many runs in the time there is, on a machine with the library and papermill but neither DVC nor git.

    python -m simmimlib.campaign plan                       # what each arm costs here, and in which order they go
    python -m simmimlib.campaign run --minutes 9            # as many runs of the active profile as fit
    python -m simmimlib.campaign run --minutes 9 --jobs 4   # four at a time, where one does not fill the device

Runs go in the order in which they tell most: from scratch, the default and reconstruct-all with every seed; then the
other arms with three seeds; then the rest. A finished run is recorded in ``results/<profile>/runs.csv`` at once, and a
run that is recorded there is not run again. One that is under way when the time is over saves; it goes on at the next
start on this machine.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from simmimlib.runtime import whole_file, write_csv
from simmimlib.settings import run_settings
from simmimlib.stages import run_loop
from simmimlib.tables import load_runs

HEADLINE = ("scratch", "default", "reconstruct_all")
SEEDS = 3  # of the other arms, before any gets more
PATIENCE = 60  # seconds that a run has for saving


def running_order(params: dict) -> list[tuple[str, int]]:
    """All (arm, seed) of a profile, the most telling first."""
    arms, seeds = ["scratch", *params["arms"]], params["seeds"]
    headline = [(arm, seed) for seed in seeds for arm in HEADLINE if arm in arms]
    others = [arm for arm in arms if arm not in HEADLINE]
    rest = [(arm, seed) for part in (seeds[:SEEDS], seeds[SEEDS:]) for arm in others for seed in part]
    return headline + rest


def record(params: dict) -> set[tuple[str, int]]:
    """Writes ``runs.csv`` as it stands and returns the (arm, seed) in it."""
    folder = Path("results", params["profile"])
    runs = load_runs(folder, params, ["scratch", *params["arms"]])
    if runs.empty:
        return set()
    write_csv(folder / "runs.csv", runs)
    return set(zip(runs["arm"], runs["seed"].tolist(), strict=True))


class Run:
    """The stages of one (arm, seed), one process after the other."""

    def __init__(self, params: dict, arm: str, seed: int):
        self.arm, self.seed, self.start = arm, seed, time.monotonic()
        self.stages = [stage for stage in run_settings(params, arm, seed) if stage != "data"]
        self.next_stage()

    def next_stage(self) -> None:
        stage = self.stages.pop(0)
        command = [sys.executable, "-m", "simmimlib.stages", stage, "--arm", self.arm, "--seed", str(self.seed)]
        self.process = subprocess.Popen(command)

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


def run(params: dict, minutes: float, jobs: int) -> None:
    """Works through the order; a run is started only if the longest of its kind so far would still fit."""
    deadline = time.monotonic() + 60 * minutes
    done = record(params)
    todo = [pair for pair in running_order(params) if pair not in done]
    print(f"{len(done)} runs are recorded, {len(todo)} are to do", flush=True)
    running, longest, failed = [], {}, []
    while todo or running:
        left = (deadline - time.monotonic()) / 60
        while todo and len(running) < jobs and longest.get(todo[0][0] == "scratch", 0) < left:
            running.append(Run(params, *todo.pop(0)))
        if not running:
            break
        time.sleep(0.2)
        if left < 0:
            for one in running:
                one.process.send_signal(signal.SIGTERM)  # saves, and ends
            for one in running:
                one.finish()
            print(f"time is over; to go on with: {', '.join(f'{one.arm}-{one.seed}' for one in running)}", flush=True)
            break
        for one in [one for one in running if one.ended()]:
            running.remove(one)
            if one.process.returncode:
                failed.append(f"{one.arm}-{one.seed}")
                continue
            kind = one.arm == "scratch"
            longest[kind] = max(longest.get(kind, 0), one.minutes)
            record(params)
            print(f"{one.arm}-{one.seed}: {one.minutes:.1f} min, {len(todo) + len(running)} to do", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def plan(params: dict) -> None:
    """Times one epoch of each arm's stages on this device; prints the plan and writes results/<profile>/plan.md."""
    cost = {}
    for arm in ["scratch", *params["arms"]]:
        cost[arm] = 0.0
        for stage, values in run_settings(params, arm, 0).items():
            if stage == "data" or (stage == "finetune" and arm != "scratch"):
                continue
            short = {"epochs": 1, "warmup_epochs": 0, "out": f".scratch/plan/{arm}/{stage}"}
            timed = run_loop(stage, values | short)
            cost[arm] += values["epochs"] * timed["wall_seconds"] / 60
    rows, total = [], 0.0
    for arm, seed in running_order(params):
        own = cost[arm] + cost["scratch"] * (arm != "scratch")  # every arm is fine-tuned alike
        total += own
        rows.append(f"| {arm} | {seed} | {own:.1f} | {total:.0f} |")
    device = f"{timed['device']}, {timed['precision']}, {timed['versions']}"
    lines = [f"# Plan of {params['profile']}", "", f"{device}; from one epoch of each arm.", ""]
    lines += ["| arm | seed | minutes | minutes in all |", "|---|---|---|---|", *rows]
    with whole_file(f"results/{params['profile']}/plan.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simmimlib.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["plan", "run"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="run: the time there is (default: no end)")
    parser.add_argument("--jobs", type=int, default=1, help="run: how many runs share the device")
    arguments = parser.parse_args()
    params = yaml.safe_load(Path("params.yaml").read_text())
    if not Path("data", "packed", params["profile"], "manifest.json").is_file():
        subprocess.run([sys.executable, "-m", "simmimlib.stages", "data"], check=True)
    if arguments.what == "plan":
        plan(params)
    else:
        run(params, arguments.minutes, arguments.jobs)


if __name__ == "__main__":
    main()
