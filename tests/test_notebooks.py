"""The notebooks run, have the outputs of their code, and use public names only."""

import ast
import json
import re
import runpy

import pytest
from helpers import REPOSITORY

TOUR = REPOSITORY / "notebooks" / "tour.ipynb"


def cells(kind):
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def code():
    return ["".join(cell["source"]) for cell in cells("code")]


def test_it_is_small_and_has_its_outputs():
    assert TOUR.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in cells("code")] == list(range(1, len(code()) + 1))
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)  # no warnings
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == len(re.findall(r"^(show\(|Image\()", "\n".join(code()), re.MULTILINE))


def test_it_uses_public_names_that_exist():
    for source in code():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:  # a module, or a name in one
                    exec(f"from {node.module} import {alias.name}")
            named = [getattr(node, key, None) for key in ("id", "attr", "name")]
            assert [name for name in named if str(name).startswith("_")] == []


def test_it_reads_well_and_leads_to_pages_that_exist():
    text = "\n".join("".join(cell["source"]) for cell in cells("markdown"))
    assert [line for line in "\n".join([text, *code()]).splitlines() if len(line) > 104] == []
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 3 and [x for x in links if not (TOUR.parent / x).is_file()] == []
    assert "/home/" not in TOUR.read_text() and "http" not in "\n".join(code())


def test_the_site_shows_it():
    page_of = runpy.run_path(str(REPOSITORY / "docs" / "site.py"))["page_of"]
    page = page_of(json.loads(TOUR.read_text(encoding="utf-8")))
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert all(f"```python\n{source}\n```" in page for source in code())
    assert all("".join(output.get("text", "")) in page for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert page.count("](data:image/png;base64,") == len(pictures)


@pytest.mark.slow
def test_it_runs_and_prints_the_same(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(TOUR, 4)
    before = printed(notebook)
    client(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert printed(notebook) == before  # figures have two or three digits
    assert list(tmp_path.iterdir()) == []


def printed(notebook):
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
