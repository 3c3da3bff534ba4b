"""Parameters cells of notebooks: generated from a settings class, and read back into one.

``python -m simmimlib.notebook`` (part of ``make format``) writes the cells of all notebooks; a test compares them.
"""

import ast
import json
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from simmimlib.machine.files import project_root, whole_file
from simmimlib.settings import Settings

WIDTH = 88  # columns of a notebook cell in JupyterLab at its usual width
NOTEBOOKS = {  # whose settings each notebook's parameters are
    "00_tour": "simmimlib.report.tour:TourSettings",
    "01_data": "simmimlib.data.sources:DataSettings",
    "02_pretrain": "simmimlib.train.settings:PretrainSettings",
    "03_finetune": "simmimlib.train.settings:FinetuneSettings",
    "04_ablations": "simmimlib.report.tables:TableSettings",
    "05_probe": "simmimlib.train.settings:ProbeSettings",
    "06_use": "simmimlib.report.use:UseSettings",
    "07_own_images": "simmimlib.pipeline.own_images:OwnImagesSettings",
}
FIRST = "# Parameters: change them here, or from outside with `papermill -p name value`"
S = TypeVar("S", bound=Settings)


def from_notebook(settings: type[S], namespace: dict) -> S:
    """The settings that a notebook's parameters cell, and papermill's injected one after it, assign.

    Also moves to the project's root, so that relative paths mean the same in JupyterLab (started in ``notebooks/``)
    and under papermill.

    Args:
        namespace: the notebook's ``globals()``.

    Raises:
        ValueError: no parameters cell has run, an unknown name, a value that is not allowed.
    """
    os.chdir(project_root())
    cells = list(_assignments(namespace["In"]))
    # the notebook's own cell is the last that assigns most of the names; papermill's follows it
    own = [
        i
        for i, (_, values) in enumerate(cells)
        if 2 * len(values.keys() & set(settings.names())) > len(settings.names())
    ]
    if not own:
        raise ValueError("no parameters cell has been run: run the notebook from its first cell")
    found: dict[str, ast.expr] = cells[own[-1]][1]
    for source, values in cells[own[-1] + 1 :]:
        if source.lstrip().startswith("# Parameters\n"):  # how papermill begins it
            found = found | values
    return settings.from_values({name: _value(node, namespace[name]) for name, node in found.items()})


def _assignments(cells: list[str]) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Of each cell that ran, its source and what it assigns at the top level."""
    for source in cells:
        try:
            body = ast.parse(source).body
        except SyntaxError:  # a cell magic, or a cell that failed
            continue
        values = {}
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                values[node.target.id] = node.value
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                values[node.targets[0].id] = node.value
        yield source, values


def _value(node: ast.expr, now: object) -> object:
    """What the cell says; a later cell may have used the name for something else. ``now`` where it is no literal."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return now


def parameters_cell(settings: type[Settings]) -> str:
    """Source of the parameters cell: a line for each setting, explained; a dict that is too wide over several lines.

    papermill reads the explanation off the last line of an assignment.
    """
    defaults, lines = settings(), [FIRST]
    for name in settings.names():
        value = getattr(defaults, name)
        text = json.dumps(value) if isinstance(value, str | dict) else repr(value)
        start, about = f"{name}: {type(value).__name__} = ", settings.about.get(name, "")
        line = f"{start}{text}  # {about}"
        if len(line) > WIDTH and isinstance(value, dict):
            inner = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            line = f"{start}{{\n{inner},\n}}  # {about}"
        lines.append(line)
    return "\n".join(lines)


def settings_of(notebook: str) -> type[Settings]:
    module, name = NOTEBOOKS[notebook].split(":")
    return getattr(import_module(module), name)


def main() -> None:
    for name in NOTEBOOKS:
        path = project_root() / f"notebooks/{name}.ipynb"
        before = path.read_text()
        content = json.loads(before)
        (cell,) = (cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", []))
        cell["source"] = parameters_cell(settings_of(name)).splitlines(keepends=True)
        after = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        if after != before:
            with whole_file(Path(path)) as temporary:
                temporary.write_text(after)
            print(f"{path.name}: parameters cell written again")


if __name__ == "__main__":
    main()
