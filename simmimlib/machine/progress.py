"""Long work shows itself: a bar with rate and time left when interactive, one line an epoch in batch. No torch here."""

import os
import sys
import time

from tqdm import tqdm


def interactive() -> bool:
    """True in a terminal or in a notebook opened by Jupyter (which names the notebook in JPY_SESSION_NAME)."""
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ


class Progress:
    """Counts images through a run.

    Args:
        title: shown in front.
        images, seconds: what an interrupted run had reached.
        quiet: shows nothing; for all processes of a run but the first.
    """

    def __init__(
        self, title: str, epochs: int, images_per_epoch: int, images: int = 0, seconds: float = 0.0, quiet: bool = False
    ):
        self.title, self.epochs, self.quiet = title, epochs, quiet
        self.images = images
        self.start = time.perf_counter() - seconds
        total, hidden = epochs * images_per_epoch, quiet or not interactive()
        self.bar = tqdm(total=total, initial=images, desc=title, unit="img", disable=hidden, dynamic_ncols=True)

    def step(self, images: int) -> None:
        self.images += images
        self.bar.update(images)

    def show(self, **numbers: float) -> None:
        """Puts the latest numbers behind the bar."""
        self.bar.set_postfix_str(_numbers(numbers), refresh=False)

    def epoch(self, row: dict) -> None:
        """Prints the numbers of a finished epoch (``row["epoch"]`` counts from 1) where there is no bar."""
        self.show(**row)
        if self.bar.disable:
            left = self.seconds / row["epoch"] * (self.epochs - row["epoch"])
            numbers = f"{_numbers(row)}, {self.images / self.seconds:.4g} img/s, {left:.0f} s left"
            self.say(f"epoch {row['epoch']}/{self.epochs}: {numbers}")

    def say(self, message: str) -> None:
        if not self.quiet:
            tqdm.write(f"{self.title} {message}", file=sys.stdout)
            sys.stdout.flush()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def close(self) -> None:
        self.bar.close()


def _numbers(row: dict) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float))
