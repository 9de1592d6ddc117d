"""`make test-everywhere`: the fast tests as on other processors, with other versions, and in random
order. Virtual environments of other versions are made if they are not there.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def kernels(torch: str, one_dnn: str, mkl: str) -> dict[str, str]:
    """What keeps torch and the libraries that it calls from newer instructions."""
    variables = "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"
    return dict(zip(variables, (torch, one_dnn, mkl), strict=True))


# What each adds to the best kernels of this machine, one thread, and .venv.
ENVIRONMENTS = {
    "here": {},
    "sse": kernels("default", "SSE41", "SSE4_2"),
    "avx2": kernels("avx2", "AVX2", "AVX2"),
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "order": {"PYTEST_ADDOPTS": f"--random-order-seed={random.randrange(1000)}"},
    "lowest": {},  # in .venv-lowest, the lowest torch allowed
    "newest": {},  # in .venv-newest, the newest torch on the newest Python here
}
SET = {key for variables in ENVIRONMENTS.values() for key in variables}


def python_of(name: str) -> Path:
    """The interpreter of an environment. Raises `subprocess.CalledProcessError` if pip fails."""
    venv = REPOSITORY / (f".venv-{name}" if name in ("lowest", "newest") else ".venv")
    if not venv.exists():
        pins, base = [], sys.executable
        if name == "lowest":
            needed = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
            pins = [f"{a}=={b}.*" for a, b in re.findall(r'"(torch\w*)>=([\d.]+)"', needed)]
        else:
            names = (f"python3.{minor}" for minor in range(30, 10, -1))
            base = next(p for p in map(shutil.which, names) if p and not subprocess.call([p, "-V"]))
        try:
            subprocess.run([base, "-m", "venv", venv], check=True)
            packages = [*pins, "--editable", f"{REPOSITORY}[dev]"]
            subprocess.run([venv / "bin" / "pip", "install", "--quiet", *packages], check=True)
        except BaseException:
            shutil.rmtree(venv, ignore_errors=True)
            raise
    return venv / "bin" / "python"


def run(name: str, arguments: list[str]) -> tuple[int, str]:
    """The exit code, and a row of the table."""
    variables = ENVIRONMENTS[name]
    said = " ".join(f"{key}={value}" for key, value in variables.items())
    print(f"\n--- {name} {said}", flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in SET} | variables
    started = time.monotonic()
    try:
        words = [python_of(name), "-m", "pytest", "-q", *arguments]
        code = subprocess.call(words, cwd=REPOSITORY, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        return 1, f"{name:10} {error}"
    minutes = (time.monotonic() - started) / 60
    return code, f"{name:10} {'failed' if code else 'passed'} {minutes:7.1f}  {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", action="append", choices=ENVIRONMENTS, help="may be repeated")
    options, arguments = parser.parse_known_args()  # what is left is for pytest
    rows = [run(name, arguments) for name in options.only or ENVIRONMENTS]
    print("\nenvironment result minutes", *(row for _, row in rows), sep="\n")
    sys.exit(any(code for code, _ in rows))


if __name__ == "__main__":
    main()
