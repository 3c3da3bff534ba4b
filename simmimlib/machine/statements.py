"""What counts as a change of code: its statements, without comments, docstrings and layout.

The pipeline's `code` stage writes them into ``results/code/``, a file for each group below and for each notebook, and
the stages that train depend on these files; the key of a rolling checkpoint and the ``code`` of a result come from the
same text. So prose anywhere re-trains nothing, and neither does a figure or a table; a changed statement that can move
a number does.
"""

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).parents[1]
# Group -> what belongs to it, as patterns below simmimlib/. Of the machine's matters those that can move a number.
GROUPS = {
    "model": ("model/*.py", "weights/*.py"),
    "data": ("data/*.py",),
    "train": ("train/*.py",),
    "machine": ("settings.py", "machine/device.py", "machine/distributed.py"),
    "report": ("report/*.py",),
}
# packing a large set takes hours: it has a group of its own
PACKING = ("data/sources.py", "data/decoding.py", "data/packing.py")
GROUPS["packing"] = PACKING
WRITERS = ("weights/card.py", "weights/folders.py", "weights/huggingface.py")  # of trained weights: move no number
TRAINING = ("model", "data", "train", "machine")  # what a training run's numbers follow from, beside its images


def statements(source: str) -> str:
    """Python source without comments, docstrings, layout, types of arguments and results, explanations of settings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # strings that stand alone do nothing; a body needs one statement
            node.body = [child for child in node.body if not _is_text(child)] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setting":
            del node.args[1:]  # the explanation of a setting
    return ast.unparse(_Formatted().visit(tree))


class _Formatted(ast.NodeTransformer):
    """f-strings as calls: how they would be quoted depends on the version of Python."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self.generic_visit(node)
        parts = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
        return ast.Call(ast.Name("joined"), parts, [])  # type: ignore[arg-type]

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.AST:
        self.generic_visit(node)
        spec = [node.format_spec] if node.format_spec else []
        return ast.Call(ast.Name("formatted"), [node.value, ast.Constant(node.conversion), *spec], [])


def group_statements(group: str) -> str:
    """The statements of a group's modules, each under its name."""
    left_out = {"data": PACKING, "model": WRITERS}.get(group, ())
    paths = {path.relative_to(LIBRARY).as_posix(): path for pattern in GROUPS[group] for path in LIBRARY.glob(pattern)}
    kept = sorted(name for name in paths if name not in left_out)
    return "\n".join(f"# {name}\n{statements(paths[name].read_text())}\n" for name in kept)


def notebook_statements(path: Path) -> str:
    """The statements of a notebook's code cells."""
    cells = json.loads(path.read_text())["cells"]
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return "\n".join(statements(source) for source in sources) + "\n"


@cache
def training_code() -> str:
    """Ten hexadecimal digits that change with a statement of the library that a training run's numbers follow from."""
    text = "".join(group_statements(group) for group in TRAINING)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
