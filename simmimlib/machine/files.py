"""Files: written whole or not at all, found from the project's root. No torch here."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


def project_root() -> Path:
    """The nearest folder at or above the working folder that holds dvc.yaml; the working folder if none does."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").exists()), here)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its place only if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{path}: could not be written ({error}); {free / 1e9:.1f} GB are free there") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> None:
    """Raises OSError now rather than after hours of training, if results could not be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"out = {str(folder)!r}: must be a folder that can be written to ({error})") from error


def write_text(path: str | Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


def read_json(path: str | Path) -> dict:
    """What a JSON file holds; {} if there is none."""
    return json.loads(Path(path).read_text()) if Path(path).is_file() else {}


def write_json(path: str | Path, values: dict) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_csv(
    path: str | Path, rows: "list[dict] | np.ndarray | pd.DataFrame", columns: list[str] | None = None
) -> None:
    import pandas as pd  # imported here: half a second that a stage's own process can do without

    with whole_file(path) as temporary:
        pd.DataFrame(rows, columns=columns).to_csv(temporary, index=False)
