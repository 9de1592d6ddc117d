"""The notebooks run, have the outputs of their code, and use public names only."""

import ast
import json
import re
import runpy

import pytest
from helpers import REPOSITORY

# By how much a printed number may differ from run to run.
NOTEBOOKS = {"tour": 0.0, "from_scratch": 0.15}  # it trains, which rounding of any kind changes
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def path_of(name):
    return REPOSITORY / "notebooks" / f"{name}.ipynb"


def cells(name, kind):
    notebook = json.loads(path_of(name).read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def code(name):
    return ["".join(cell["source"]) for cell in cells(name, "code")]


def test_every_notebook_is_tested():
    assert {*(REPOSITORY / "notebooks").glob("*.ipynb")} == {*map(path_of, NOTEBOOKS)}


@each_notebook
def test_it_is_small_and_has_its_outputs(name):
    assert path_of(name).stat().st_size < 300_000
    counts = [cell["execution_count"] for cell in cells(name, "code")]
    assert counts == list(range(1, len(code(name)) + 1))
    outputs = [output for cell in cells(name, "code") for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)  # no warnings
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    shown = re.findall(r"^(show\(|Image\()", "\n".join(code(name)), re.MULTILINE)
    assert len(pictures) == len(shown)


@each_notebook
def test_it_uses_public_names_that_exist(name):
    for source in code(name):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:  # a module, or a name in one
                    exec(f"from {node.module} import {alias.name}")
            named = [str(getattr(node, key, "")) for key in ("id", "attr", "name")]
            assert [each for each in named if re.match(r"_[^_]", each)] == []


@each_notebook
def test_it_reads_well_and_leads_to_pages_that_exist(name):
    text = "\n".join("".join(cell["source"]) for cell in cells(name, "markdown"))
    lines = "\n".join([text, *code(name)]).splitlines()
    assert [line for line in lines if len(line) > 104] == []
    links = [x for x in re.findall(r"\]\(([^)#]+)", text) if not x.startswith("https://arxiv.org/")]
    assert len(links) > 3
    assert [x for x in links if not (path_of(name).parent / x).is_file()] == []
    assert "/home/" not in path_of(name).read_text() and "http" not in "\n".join(code(name))


def test_a_flow_from_scratch_is_150_lines_of_torch():
    *plain, _ = code("from_scratch")
    assert sum(bool(line.strip()) for line in "\n".join(plain).splitlines()) <= 150
    assert "flowtrain" not in "\n".join(plain)


@each_notebook
def test_the_site_shows_it(name):
    page_of = runpy.run_path(str(REPOSITORY / "docs" / "site.py"))["page_of"]
    page = page_of(json.loads(path_of(name).read_text(encoding="utf-8")))
    outputs = [output for cell in cells(name, "code") for output in cell["outputs"]]
    assert all(f"```python\n{source}\n```" in page for source in code(name))
    assert all("".join(output.get("text", "")) in page for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert page.count("](data:image/png;base64,") == len(pictures)


@pytest.mark.slow
@each_notebook
def test_it_runs_and_prints_the_same(name, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(path_of(name), 4)
    before = printed(notebook)
    client(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    words, numbers = split(printed(notebook))
    assert words == split(before)[0]  # figures have two or three digits
    assert numbers == pytest.approx(split(before)[1], rel=0, abs=NOTEBOOKS[name])
    assert list(tmp_path.iterdir()) == []


def printed(notebook):
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def split(text):
    """Its words without numbers, and its numbers."""
    number = r"\d[\d,]*\.?\d*"
    found = [float(each.replace(",", "")) for each in re.findall(number, text)]
    return re.sub(number, "#", text), found
