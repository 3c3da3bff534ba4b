"""What counts as a change of code."""

import json

import pytest

from simmimlib.machine.statements import (
    GROUPS,
    LIBRARY,
    TRAINING,
    WRITERS,
    group_statements,
    notebook_statements,
    statements,
)

SOURCE = '''"""A module."""
from settings import setting


class A:
    """A class."""

    x: float = setting(1.0, "explained")

    def f(self, y: int) -> int:
        """A method."""
        return y + 1  # a comment
'''


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"""A module."""', '"""Another module."""'),
        ('"""A class."""', '"""Another.\n\n    Longer.\n    """'),
        ('        """A method."""\n', ""),
        ("# a comment", "# another"),
        ("y + 1", "(y\n            + 1)"),
        ("\n\n\n", "\n"),
        ("y: int) -> int", "y: float) -> float"),
        ('"explained"', '"explained better"'),
    ],
)
def test_prose_layout_and_types_of_arguments_do_not_count(before, after):
    assert before in SOURCE
    assert statements(SOURCE.replace(before, after)) == statements(SOURCE)


@pytest.mark.parametrize(
    ("before", "after"),
    [("y + 1", "y + 2"), ("setting(1.0", "setting(2.0"), ("x: float", "x: int"), ("y: int", "y: int = 3")],
)
def test_statements_count(before, after):
    assert before in SOURCE
    assert statements(SOURCE.replace(before, after)) != statements(SOURCE)


@pytest.mark.parametrize(
    ("before", "after"), [("y + 1", "f'{y:.2f} {x}'"), ("f'{y:.2f}'", "f'{y:.3f}'"), ("f'{y!r}'", "f'{y}'")]
)
def test_a_formatted_string_counts_by_its_parts(before, after):
    with_before = SOURCE.replace("y + 1", before)
    assert statements(SOURCE.replace("y + 1", after)) != statements(with_before)


def test_formatted_strings_are_written_the_same_by_every_version_of_python():
    """From Python 3.12 on, quotes within a formatted string may be those around it, and `ast.unparse` writes it so."""
    source = """x = f'{", ".join(names)!r:>{width}} of "{count}"'"""
    assert statements(source) == (
        "x = joined(formatted(', '.join(names), 114, joined('>', formatted(width, -1))), ' of \"', "
        "formatted(count, -1), '\"')"
    )


def test_a_function_of_nothing_but_a_docstring_stays_one():
    compile(statements('def f():\n    """Nothing."""\n'), "f", "exec")


def test_every_module_that_moves_numbers_is_in_one_group():
    found = {}
    for group in GROUPS:
        for line in group_statements(group).splitlines():
            if line.startswith("# "):
                found.setdefault(line[2:], []).append(group)
    assert all(len(groups) == 1 for groups in found.values()), found
    trained = {name for name, (group,) in found.items() if group in (*TRAINING, "packing")}
    folders = ("model", "weights", "data", "train")
    wings = {path.relative_to(LIBRARY).as_posix() for wing in folders for path in LIBRARY.glob(f"{wing}/*.py")}
    assert wings - set(WRITERS) | {"settings.py", "machine/device.py", "machine/distributed.py"} <= trained
    assert not set(WRITERS) & found.keys()
    # what is left out must not be what a run computes with
    imported = "".join(group_statements(group) for group in TRAINING)
    assert not any(path.removesuffix(".py").replace("/", ".") in imported for path in WRITERS)


def test_a_notebook_counts_by_the_statements_of_its_cells(tmp_path):
    def notebook(code, prose="# Title", outputs=()):
        cells = [{"cell_type": "markdown", "source": [prose]}]
        cells += [{"cell_type": "code", "source": [code], "outputs": list(outputs)}]
        (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
        return notebook_statements(tmp_path / "n.ipynb")

    assert notebook("a = 1  # one") == notebook("a = 1", "# Another title", ["seen"]) != notebook("a = 2")
