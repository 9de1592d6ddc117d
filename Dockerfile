# flowtrain in a container, for a CPU or (docker run --gpus all) an NVIDIA GPU. PyPI's torch for
# Linux includes CUDA.
#
#   docker build -t flowtrain .
#   docker run --rm --gpus all -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" \
#       flowtrain train --config glow_cifar.yaml
#
# docker/check.sh builds this file and tries the image without a Docker engine.

# Any image with Python >= 3.11, its venv module and `useradd`.
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

# Further options for pip, such as --extra-index-url URL to take torch from another index.
ARG PIP_ARGS=""

# Optional parts: archives (compress) and continuous flows (cnf).
ARG EXTRAS="compress cnf"

ENV PATH=/opt/venv/bin:$PATH

# The dependencies, which are gigabytes, have a layer of their own. A change of the source does not
# build it again.
RUN --mount=type=bind,source=pyproject.toml,target=/tmp/pyproject.toml \
    python3 -m venv /opt/venv \
    && python -c 'import sys, tomllib; project = tomllib.load(open("/tmp/pyproject.toml", "rb"))["project"]; \
        parts = [project["optional-dependencies"][name] for name in sys.argv[1:]]; \
        print(*project["dependencies"], *sum(parts, []), sep="\n")' ${EXTRAS} \
    | pip install --no-cache-dir ${PIP_ARGS} -r /dev/stdin

RUN --mount=type=bind,target=/src \
    pip install --no-cache-dir --no-deps ${PIP_ARGS} /src \
    && pip check \
    && flowtrain --version

# The number of the user. If it is that of the owner of the mounted folders, no run needs --user.
ARG UID=1000

# The folders are open to all, so that `docker run --user` works with a number that has no name here.
RUN useradd --uid "${UID}" --create-home flowtrain \
    && install -d -o flowtrain -g flowtrain -m 1777 /home/flowtrain /app /app/data /app/runs /app/cache

ENV HOME=/home/flowtrain \
    FLOWTRAIN_CACHE=/app/cache \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER flowtrain
WORKDIR /app
VOLUME ["/app/data", "/app/runs", "/app/cache"]

# No shell in between: flowtrain is process 1, and `docker stop` reaches it.
ENTRYPOINT ["flowtrain"]
CMD ["--help"]
