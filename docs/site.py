"""Builds the documentation as a site: `make site`, into site/html.

The pages link to each other and to files of the repository by relative paths. So the whole tree is
copied, and a link to a file or a heading that does not exist is an error. A notebook becomes a page
of its texts, code and outputs.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "site" / "source"


def on_config(config: Any) -> None:
    """Lists the notebooks, and the page of each tool. MkDocs calls this once, before the pages."""
    pages = {
        "Notebooks": sorted(f"notebooks/{each.stem}.md" for each in SOURCE.glob("notebooks/*.md")),
        "Tools": sorted(
            f"docs/{each.parent.name}.md"
            for each in REPOSITORY.glob("flowtrain/tools/*/command.py")
        ),
    }
    for section in config.nav:
        for name in section.keys() & pages.keys():
            section[name].extend(pages[name])


def on_page_markdown(markdown: str, **others: Any) -> str:
    """Leads links to notebooks to their pages. MkDocs calls this for each page."""
    return markdown.replace(".ipynb)", ".md)")


def page_of(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown. A figure of an output is in the page itself."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        text, figures = "", []
        for output in cell.get("outputs", []):
            data = output.get("data", output)
            if "image/png" in data:
                png = "".join(data["image/png"]).strip()
                figures.append(f"![Output](data:image/png;base64,{png})")
            else:
                text += "".join(data.get("text", data.get("text/plain", [])))
        parts += [f"```text\n{text.rstrip()}\n```"] if text else []
        parts += figures
    return "\n\n".join(parts) + "\n"


def main() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    shutil.rmtree(SOURCE, ignore_errors=True)
    for name in filter(None, listed.stdout.split("\0")):
        (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, SOURCE / name)
    for file in SOURCE.glob("notebooks/*.ipynb"):
        page = page_of(json.loads(file.read_text(encoding="utf-8")))
        file.with_suffix(".md").write_text(page, encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    raise SystemExit(subprocess.run(command, cwd=REPOSITORY, check=False).returncode)


if __name__ == "__main__":
    main()
