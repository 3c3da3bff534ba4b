"""docs/faq.md: its numbers are what its code prints, its links and the names it quotes exist."""

import contextlib
import io
import re

import pytest

from conftest import ROOT

FAQ = (ROOT / "docs/faq.md").read_text()
CODE, PRINTED = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", FAQ, re.DOTALL).groups()
PROSE = re.sub(r"```.*?```", "", FAQ, flags=re.DOTALL)


def test_the_code_prints_the_numbers(monkeypatch):
    monkeypatch.chdir(ROOT)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(CODE, {})
    number = r"\d+\.\d+"
    assert re.sub(number, "", said.getvalue()) == re.sub(number, "", PRINTED)
    for found, shown in zip(re.findall(number, said.getvalue()), re.findall(number, PRINTED), strict=True):
        assert abs(float(found) - float(shown)) < 0.03, (found, shown)  # another machine may round otherwise


def test_measured_numbers_in_the_prose_are_those_printed():
    printed = set(re.findall(r"\d+\.\d+", PRINTED))
    for sentence in re.findall(r"Measured here[^.]*(?:\.\d+[^.]*)*", PROSE):
        numbers = re.findall(r"\b\d+\.\d+", sentence)
        assert numbers and set(numbers) <= printed, sentence


@pytest.mark.parametrize("name", ["faq.md", "results.md"])
def test_links_lead_to_files(name):
    prose = re.sub(r"```.*?```", "", (ROOT / "docs" / name).read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in link]
    assert len(links) > 5
    for link in links:
        path, _, heading = link.partition("#")
        file = ROOT / "docs" / (path or name)
        assert file.is_file(), link
        if heading:
            found = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w-]", "", line.lower().replace(" ", "-")) for line in found], link


@pytest.fixture(scope="module")
def repository():
    """All the text that a quoted name can be of."""
    kinds = ("simmimlib/**/*.py", "tests/**/*.py", "notebooks/*.ipynb", "profiles/*.yaml", "*.yaml", "Makefile")
    paths = [path for kind in kinds for path in ROOT.glob(kind)] + list(ROOT.glob("results/*/runs.csv"))
    return "\n".join([*(path.stem for path in paths), *(path.read_text() for path in paths)])


def test_quoted_names_exist(repository):
    words = {word for code in re.findall(r"`([^`]+)`", PROSE) for word in re.findall(r"\w+", code)}
    names = {word for word in words if not word.isdigit()} - {"python"}
    assert len(names) > 20
    for name in names:
        assert re.search(rf"\b{name}\b", repository), name
