# flowtrain in a container, for a CPU or (docker run --gpus all) an NVIDIA GPU. PyPI's torch for
# Linux is built for CUDA 13. See docs/servers.md.
#
#   docker build -t flowtrain .
#   docker run --rm --gpus all -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" \
#       flowtrain train --config glow_cifar.yaml
#
# `make docker-check` builds this file, and runs the demo in the image.

# Any image with Python >= 3.11, its headers and venv module, apt-get and `useradd`.
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

# What `train.compile` needs: Triton and torch's inductor write C and C++. Without them, an empty
# COMPILER makes a smaller image in which all else works.
ARG COMPILER="g++"
RUN if [ -n "${COMPILER}" ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends ${COMPILER} \
        && rm -rf /var/lib/apt/lists/*; \
    fi

# An index to take torch from instead of PyPI's builds: for CUDA 12 (drivers from 525 on), or for
# CPUs.
ARG TORCH_INDEX=""

# Further options for pip.
ARG PIP_ARGS=""

# Optional parts: archives (compress) and continuous flows (cnf).
ARG EXTRAS="compress cnf"

ENV PATH=/opt/venv/bin:$PATH

# The dependencies, which are gigabytes, have a layer of their own. A change of the source does not
# build it again.
RUN --mount=type=bind,source=pyproject.toml,target=/tmp/pyproject.toml \
    python3 -m venv /opt/venv \
    && if [ -n "${TORCH_INDEX}" ]; then \
        pip install --no-cache-dir --index-url "${TORCH_INDEX}" torch torchvision; \
    fi \
    && python -c 'import sys, tomllib; project = tomllib.load(open("/tmp/pyproject.toml", "rb"))["project"]; \
        parts = [project["optional-dependencies"][name] for name in sys.argv[1:]]; \
        print(*project["dependencies"], *sum(parts, []), sep="\n")' ${EXTRAS} \
    | pip install --no-cache-dir ${PIP_ARGS} -r /dev/stdin

RUN --mount=type=bind,target=/src \
    pip install --no-cache-dir --no-deps ${PIP_ARGS} /src \
    && pip check \
    && flowtrain --version

# The generation of CUDA that torch is built for: 13, 12, or 0 for a build for CPUs. A host whose
# driver is too old for it then refuses to start the container, and says why.
ARG CUDA=13
RUN python -c 'import sys, torch; built = (torch.version.cuda or "0").partition(".")[0]; \
        built == sys.argv[1] or sys.exit(f"torch {torch.__version__} was installed: build with " \
        f"--build-arg CUDA={built}, or with another TORCH_INDEX")' "${CUDA}"

# The number of the user. If it is that of the owner of the mounted folders, no run needs --user.
ARG UID=1000

# The folders are open to all, so that `docker run --user` works with a number that has no name here.
# Another user of the base image may have the number: root (0), or `ubuntu` (1000).
RUN useradd --non-unique --uid "${UID}" --create-home flowtrain \
    && install -d -o flowtrain -g flowtrain -m 1777 /home/flowtrain /app /app/data /app/runs /app/cache

# Some versions of torch ask for the user's name to name their cache of compiled code, and
# `docker run --user` gives none.
ENV HOME=/home/flowtrain \
    FLOWTRAIN_CACHE=/app/cache \
    TORCHINDUCTOR_CACHE_DIR=/app/cache/inductor \
    TRITON_CACHE_DIR=/app/cache/triton \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=${CUDA}.0"

USER flowtrain
WORKDIR /app
VOLUME ["/app/data", "/app/runs", "/app/cache"]

# No shell in between: flowtrain is process 1, and `docker stop` reaches it.
ENTRYPOINT ["flowtrain"]
CMD ["--help"]
