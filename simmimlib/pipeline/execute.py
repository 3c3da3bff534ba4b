"""A notebook as a stage of the pipeline: run by papermill, whole results, traceback kept, signals passed on."""

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from simmimlib.machine.files import write_json

SCRATCH = Path(".scratch")


def run_notebook(notebook: str, parameters: dict, folder: Path, given: dict | None = None) -> None:
    """Executes ``notebooks/<notebook>.ipynb`` and puts the executed copy into ``folder``.

    Exits with the error's name and message, and the place of the notebook with the traceback, when it fails.

    Args:
        given: written to ``parameters.json`` beside it, by which ``report.runs`` tells what a run was given.
    """
    papermill = _import_papermill()
    from nbclient.exceptions import DeadKernelError  # imported here, like papermill: other stages do not need them
    from traitlets.config import Config

    SCRATCH.mkdir(exist_ok=True)
    scratch = SCRATCH / "-".join([*folder.parts[1:], f"{notebook}.ipynb"])
    try:
        # sockets that are files: a TCP port that was free may be taken before the kernel comes to bind it
        with tempfile.TemporaryDirectory() as sockets, signals_to_the_kernel():
            papermill.execute_notebook(
                f"notebooks/{notebook}.ipynb",
                str(scratch),
                parameters,
                kernel_name="python3",
                shutdown_kernel="immediate",  # its files are written: waiting for it to tidy up costs a second a stage
                config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
            )
    except papermill.PapermillExecutionError as error:
        sys.exit(f"{error.ename}: {error.evalue}\n{notebook} failed; the notebook with the traceback is {scratch}")
    except DeadKernelError:
        sys.exit(
            f"{notebook}: the process that ran the notebook died; the system kills one that takes too much memory. "
            f"Start the stage again to resume from its last checkpoint. The notebook so far is {scratch}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if given is not None:
        write_json(folder / "parameters.json", given)
    shutil.move(scratch, folder / f"{notebook}.ipynb")


def _import_papermill():
    # jsonschema would load a grammar to check one string format, which no notebook uses: it takes over a second, as
    # long as the rest of papermill. It does without where the grammar cannot be imported.
    grammar = "rfc3987_syntax"
    hidden = grammar not in sys.modules
    if hidden:
        sys.modules[grammar] = None  # type: ignore[assignment]
    try:
        import papermill
    finally:
        if hidden:
            del sys.modules[grammar]
    return papermill


@contextmanager
def signals_to_the_kernel() -> Iterator[None]:
    """SIGINT and SIGTERM reach the training, which saves; the notebook then fails, and the stage with it."""
    import psutil  # imported here: comes with the notebooks' kernel

    def pass_on(number, frame):
        kernels = psutil.Process().children()
        if not kernels:
            raise KeyboardInterrupt("stopped before the notebook was started")
        for kernel in kernels:
            with suppress(psutil.NoSuchProcess):  # a cluster has signalled it too
                kernel.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
