"""Builds the documentation as a site: `make site`, into site/html.

The pages link to each other and to files of the repository by relative paths. So the whole tree is
copied, and a link to a file or a heading that does not exist is an error.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "site" / "source"


def on_config(config: Any) -> None:
    """Lists the page of each tool. MkDocs calls this once, before it reads the pages."""
    tools = sorted(path.parent.name for path in REPOSITORY.glob("flowtrain/tools/*/command.py"))
    (pages,) = (section["Tools"] for section in config.nav if "Tools" in section)
    pages.extend(f"docs/{name}.md" for name in tools)


def main() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    shutil.rmtree(SOURCE, ignore_errors=True)
    for name in filter(None, listed.stdout.split("\0")):
        (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, SOURCE / name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    raise SystemExit(subprocess.run(command, cwd=REPOSITORY, check=False).returncode)


if __name__ == "__main__":
    main()
