"""Kills a training run at random moments, starts it again each time, and prints how often (used by test_resume.py).

    python tests/train/killed_runs.py pretrain '{"out": ..., ...}' 20

Imports once and forks each attempt, since only the children ever compute.
"""

import json
import os
import random
import signal
import sys
import time

from simmimlib.train import losses, resume
from simmimlib.train.finetune import finetune
from simmimlib.train.pretrain import pretrain
from simmimlib.train.settings import FinetuneSettings, PretrainSettings

LOOPS = {"pretrain": (PretrainSettings, pretrain), "finetune": (FinetuneSettings, finetune)}


def main(loop: str, values: str, kills: int) -> None:
    settings, run = LOOPS[loop]
    losses.CHECK_STEPS, resume.SAVE_SECONDS, resume.SAVE_SHARE = 2, 0.0, 1e9  # save at every second step
    moments, finished = random.Random(0), 0
    while kills:
        child = os.fork()
        if not child:
            run(settings.from_values(json.loads(values)))
            os._exit(0)
        time.sleep(moments.uniform(0.0, 0.5))
        if os.waitpid(child, os.WNOHANG)[0]:
            finished += 1  # it was faster: the next attempt starts anew
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills -= 1
    child = os.fork()
    if not child:
        run(settings.from_values(json.loads(values)))
        os._exit(0)
    sys.exit(os.waitpid(child, 0)[1] or print(f"finished {finished} times between the kills, and once after them"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
