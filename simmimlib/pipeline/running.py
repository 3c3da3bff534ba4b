"""One run of the profile: the commands that it lacks, the process that works through them, and its record.

Used by campaigns on one machine (``campaign.py``) and by the jobs of a cluster (``cluster.py``).
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
from filelock import BaseFileLock, FileLock, Timeout

from simmimlib.machine.files import read_json, write_csv
from simmimlib.pipeline.arms import STAGES, packed_folder, run_folder, wanted_runs
from simmimlib.report.records import load_curves
from simmimlib.report.runs import load_runs

PATIENCE = 60  # seconds that a run has for saving
STAGE = [sys.executable, "-m", "simmimlib.pipeline.stages"]


class Running:
    """One run of the profile: its commands, one after the other, each in a process group of its own."""

    def __init__(self, name: str, commands: list[list[str]], lock: BaseFileLock | None = None):
        self.name, self.start, self.lock = name, time.monotonic(), lock
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
        self.release()
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
        self.release()

    def release(self) -> None:
        """Lets other processes work on it."""
        if self.lock:
            self.lock.release()

    def standing(self) -> str:
        """Where it stands: the last line of its log, of a training its epoch, loss or accuracy, and seconds left."""
        lines = self.log.read_text(errors="replace").split("\n")
        return f"{self.name}, {self.minutes:.1f} min: {next((line for line in reversed(lines) if line.strip()), '...')}"

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.start) / 60


def claim(key: str, params: dict, wanted: dict, process: int = 0) -> Running | None:
    """Starts what a run lacks, of which no other campaign or job can then start a stage.

    Args:
        key: of the run in the profile.
        process: number of this process, where several on as many machines train the run together.

    Returns:
        None where it lacks nothing, or where another campaign or job is at it, which is said.
    """
    name = f"{key}-{process}" if process else key
    Path(".scratch").mkdir(exist_ok=True)
    lock = FileLock(f".scratch/{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{key} is left out: another campaign or job is at it", flush=True)
        return None
    if todo := commands(params, wanted):
        return Running(name, todo, lock)
    lock.release()
    return None


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
    """Writes ``runs.csv`` and ``curves.csv`` as they stand, if a run has finished; returns the runs with their ``key``.

    One process at a time, wherever it runs: what the last one writes holds the runs of all.
    """
    Path(".scratch").mkdir(exist_ok=True)
    with FileLock(f".scratch/{params['profile']}-runs.csv.lock"):
        runs, left_out = finished(params)
        if not runs.empty:
            folder = Path("results", params["profile"])
            write_csv(folder / "runs.csv", runs.drop(columns="key"))
            write_csv(folder / "curves.csv", load_curves(folder, runs))
    for line in left_out:
        print(line, flush=True)
    return runs
