#!/usr/bin/env bash
# Builds the image from ../Dockerfile without a Docker engine, and tries it. Run it as root:
# `bash docker/check.sh [SUITE]`.
#
# SUITE is the Debian release of the base image, which debootstrap makes: trixie by default. Another
# release has another Python, such as 3.11 in bookworm. pip takes torch from where this machine's
# pip would. On the usual index that is the CUDA build of several gigabytes.
#
# From the environment:
#   BASE_IMAGE      an image to build on instead of debootstrap's, such as python:3.12-slim
#   MIRROR          where debootstrap gets packages; by default this machine's apt mirror
#   PIP_ARGS        the build argument of that name
#   TORCH_INDEX     an index with another build of torch, and TORCH_INDEX_CUDA: the CUDA of that build,
#                   12, 13 or 0. A second image is then built from it, without a compiler and extras.
#   CHECK_DIR       a folder for images and runs, which is kept; by default a new one, which is removed
#   STORAGE_DRIVER  how buildah keeps layers: vfs (works everywhere, copies) by default, or overlay
set -euo pipefail

suite=${1:-trixie}
here=$(cd "$(dirname "$0")/.." && pwd)
image=localhost/flowtrain-check
container=flowtrain-check
uid=1000 # the Dockerfile's own

die() { echo "docker/check.sh: $*" >&2; exit 2; }
step() { echo; echo "== $*"; }
checked=()
ok() { checked+=("$*"); echo "ok: $*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
check() { local what=$1; shift; if "$@"; then ok "$what"; else fail "$what"; fi; }

[ "$(id -u)" = 0 ] || die "needs root, for chroot and debootstrap"
for tool in buildah unshare chroot setpriv; do
    command -v "$tool" > /dev/null || die "$tool is missing; on Debian: apt-get install buildah debootstrap util-linux"
done

if [ -n "${CHECK_DIR:-}" ]; then
    mkdir -p "$CHECK_DIR"
    dir=$(cd "$CHECK_DIR" && pwd)
else
    dir=$(mktemp -d "${TMPDIR:-/var/tmp}/flowtrain-check.XXXXXX")
fi

driver=${STORAGE_DRIVER:-vfs}
unset STORAGE_DRIVER
b() { buildah --storage-driver "$driver" --root "$dir/storage" --runroot "$dir/run" "$@"; }

init= # the process that is process 1 in the container, while one runs
clean_up() {
    status=$?
    [ -z "$init" ] || kill -KILL "$init" 2> /dev/null || true
    b rm "$container" "$container-base" "$container-context" "$container-second" > /dev/null 2>&1 || true
    if [ -z "${CHECK_DIR:-}" ]; then
        b rmi --all --force > /dev/null 2>&1 || true
        mountpoint -q "$dir/storage/$driver" && umount "$dir/storage/$driver" || true
        rm -rf --one-file-system "$dir"
    fi
    exit "$status"
}
trap clean_up EXIT
trap 'echo "FAILED: line $LINENO: $BASH_COMMAND" >&2' ERR
trap 'exit 130' INT
trap 'exit 143' TERM

# buildah raises limits that are not given. That needs a capability which root in a virtual machine or
# container may lack.
limits=(--ulimit nofile=20000:20000)
processes=$(ulimit -u)
[ "$processes" = unlimited ] || limits+=(--ulimit "nproc=$processes:$processes")

# --- the base image -------------------------------------------------------------------------------

if [ -n "${BASE_IMAGE:-}" ]; then
    base=$BASE_IMAGE
    described="BASE_IMAGE=$base"
else
    command -v debootstrap > /dev/null || die "debootstrap is missing; on Debian: apt-get install debootstrap"
    base=localhost/flowtrain-check-base:$suite
    described="debootstrap $suite"
    if ! b inspect --type image "$base" > /dev/null 2>&1; then
        mirror=${MIRROR:-$(
            codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
            apt-get indextargets --format '$(REPO_URI) $(RELEASE)' | awk -v r="$codename" '$1 ~ /^https?:/ && $2 == r { print $1; exit }'
        )}
        [ -n "$mirror" ] || die "MIRROR is not set, and apt's configuration names none"
        step "base image: debootstrap $suite"
        b from --name "$container-base" scratch > /dev/null
        root=$(b mount "$container-base")
        debootstrap --variant=minbase --include=python3,python3-dev,python3-venv,ca-certificates "$suite" "$root" "$mirror" > "$dir/debootstrap.log" 2>&1 \
            || { tail -n 20 "$dir/debootstrap.log" >&2; fail "debootstrap $suite"; }
        rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
        b umount "$container-base" > /dev/null
        b commit --rm -q "$container-base" "$base" > /dev/null
    fi
fi

# --- build ----------------------------------------------------------------------------------------

# The build reads this machine's certificates and pip configuration (an index, a folder of wheels,
# constraints). They are mounted for the build only, and not part of the Dockerfile or the image.
mounts=()
certificates=/etc/ssl/certs/ca-certificates.crt
[ ! -f "$certificates" ] || mounts+=(-v "$certificates:$certificates:ro")
if python3 -m pip --version > /dev/null 2>&1; then
    python3 - "$dir/pip.conf" > "$dir/pip-paths" << 'PYTHON'
import ast, pathlib, subprocess, sys

listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
sections, paths = {}, set()
for line in sorted(listing.splitlines(), key=lambda line: line.startswith(":env:")):  # the environment wins
    name, _, value = line.partition("=")
    section, _, key = name.partition(".")
    value = ast.literal_eval(value)
    sections.setdefault("global" if section == ":env:" else section, {})[key] = value
    paths.update(word.removeprefix("file://") for word in value.split() if word.removeprefix("file://").startswith("/"))
with open(sys.argv[1], "w") as file:
    for section, values in sections.items():
        print(f"[{section}]", *(f"{k} = {v}".replace("\n", "\n    ") for k, v in values.items()), sep="\n", file=file)
print(*sorted(path for path in paths if pathlib.Path(path).exists()), sep="\n")
PYTHON
    chmod a+r "$dir/pip.conf"
    mounts+=(-v "$dir/pip.conf:/etc/pip.conf:ro")
    while read -r path; do
        [ -z "$path" ] || [ "$path" = "$certificates" ] || mounts+=(-v "$path:$path:ro")
    done < "$dir/pip-paths"
fi

# A Docker engine applies .dockerignore to all that a build sees, but buildah only to COPY. So the
# context is filtered first.
step "build context, as .dockerignore leaves it"
printf 'FROM scratch\nCOPY . /\n' | b bud --isolation chroot -q -t "$image-context" -f - "$here" > /dev/null
b from --name "$container-context" "$image-context" > /dev/null
context=$(b mount "$container-context")
(cd "$context" && du -sh . && ls -A)
foreign=$(cd "$context" && find . -type f | grep -v -E '^./(flowtrain/.*\.(py|typed|jinja)|configs/[a-z_]*\.yaml|pyproject\.toml|README\.md|LICENSE)$' || true)
check "the build context holds the package, its configurations and nothing else" [ -z "$foreign" ]

# build TAG [NAME=VALUE]...: builds an image with these build arguments.
build() {
    local tag=$1 arguments=() argument; shift
    for argument in "BASE_IMAGE=$base" "PIP_ARGS=${PIP_ARGS:-}" "$@"; do arguments+=(--build-arg "$argument"); done
    b bud --isolation chroot --layers "${limits[@]}" "${arguments[@]}" "${mounts[@]}" -t "$tag" -f "$here/Dockerfile" "$context"
}

step "buildah bud on $described"
# Which torch pip takes is not known before. The image is for one CUDA, and a build that has another
# torch fails and names it.
cuda=13
if ! build "$image" > "$dir/build.log" 2>&1; then
    cuda=$(grep -o -m 1 'build with --build-arg CUDA=[0-9]*' "$dir/build.log" | grep -o '[0-9]*$') \
        || { tail -n 30 "$dir/build.log" >&2; fail "the Dockerfile builds on $described"; }
    ok "a build whose torch is for another CUDA than the argument says fails, and says CUDA=$cuda"
    build "$image" "CUDA=$cuda"
fi
ok "the Dockerfile builds on $described, with CUDA=$cuda"

if [ -n "${TORCH_INDEX:-}" ]; then
    step "a second image, from TORCH_INDEX"
    build "$image-second" "TORCH_INDEX=$TORCH_INDEX" "CUDA=${TORCH_INDEX_CUDA:?}" COMPILER= EXTRAS=
    b from "${limits[@]}" --name "$container-second" "$image-second" > /dev/null
    second() { b run --isolation chroot "$container-second" "$@"; }
    second python -c 'import torch; print("torch", torch.__version__, "from TORCH_INDEX")'
    second flowtrain train --dry-run
    check "the second image has no compiler and no extras" \
        [ "$(second sh -c 'command -v g++ gcc cc; pip list 2> /dev/null | grep -E "^(constriction|torchdiffeq) "' || true)" = "" ]
    ok "an image with torch from TORCH_INDEX, for CUDA=$TORCH_INDEX_CUDA, builds and runs"
    b rm "$container-second" > /dev/null
fi
b rm "$container-context" > /dev/null

# --- what the image says --------------------------------------------------------------------------

config() { b inspect --type image --format "$1" "$image"; }
mapfile -t entrypoint < <(config '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' | sed '/^$/d')
mapfile -t cmd < <(config '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' | sed '/^$/d')
mapfile -t environment < <(config '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' | sed '/^$/d')
workdir=$(config '{{.OCIv1.Config.WorkingDir}}')
check "ENTRYPOINT is [flowtrain], CMD [--help], USER flowtrain" \
    [ "${entrypoint[*]} / ${cmd[*]} / $(config '{{.OCIv1.Config.User}}')" = "flowtrain / --help / flowtrain" ]
volumes=$(config '{{range $path, $_ := .OCIv1.Config.Volumes}}{{$path}} {{end}}')
check "volumes are declared for data, runs and cache" [ "$volumes" = "/app/cache /app/data /app/runs " ]

check "the driver that the image requires, and the folder of compiled code" \
    [ "$(printf '%s\n' "${environment[@]}" | grep -c -x -e "NVIDIA_REQUIRE_CUDA=cuda>=$cuda.0" -e TORCHINDUCTOR_CACHE_DIR=/app/cache/inductor)" = 2 ]

b from "${limits[@]}" --name "$container" "$image" > /dev/null
root=$(b mount "$container")
left_over=$(find "$root"/{root/.cache,home/flowtrain/.cache,src,tmp,app} -mindepth 1 ! -path "$root/app/*" 2> /dev/null | head || true)
check "no cache of pip's, no copy of the source and no temporary file is left in the image" [ -z "$left_over" ]
echo "size of the image's files: $(du -sh --one-file-system "$root" | cut -f1), of which /opt/venv: $(du -sh "$root/opt/venv" | cut -f1)"

# --- the demo, as the image's user, with mounted volumes ------------------------------------------

# `run [OPTION]... -- ARGUMENT...` is `docker run [OPTION]... IMAGE ARGUMENT...`.
run() {
    local options=()
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    b run --isolation chroot "${options[@]}" "$container" "${entrypoint[@]}" "$@"
}
python() { b run --isolation chroot "${volume_options[@]}" "$container" python "$@"; }

mkdir -p "$dir/data" "$dir/runs"
rm -rf "$dir/data/"* "$dir/runs/"*
chown "$uid:$uid" "$dir/data" "$dir/runs"
volume_options=(-v "$dir/data:/app/data" -v "$dir/runs:/app/runs")
runs=$dir/runs
short=(--set train.num_steps=60 --set train.log_every=20)

step "as the image's user"
who=$(b run --isolation chroot "$container" sh -c 'echo "$(id -u):$(id -g) $(pwd) $HOME"')
check "the user is $uid, not root, in /app" [ "$who" = "$uid:$uid /app /home/flowtrain" ]
run -- "${cmd[@]}" > "$dir/help.log"
check "the image without arguments prints the help" grep -q Usage "$dir/help.log"
run -- train --help > "$dir/train-help.log"
check "the configurations came with the package" grep -q glow_digits.yaml "$dir/train-help.log"
python -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__, "built for CUDA", torch.version.cuda)'

step "train, evaluate, sample and interpolate the demo (60 steps)"
run "${volume_options[@]}" -- train "${short[@]}"
run "${volume_options[@]}" -- evaluate --json runs/glow_digits/result.json
run "${volume_options[@]}" -- sample --num-images 16 --out runs/glow_digits/samples.npz
run "${volume_options[@]}" -- sample --num-images 16
run "${volume_options[@]}" -- interpolate --pairs 2
for file in config.yaml metrics.jsonl summary.json result.json samples.npz sample.png interpolate.png; do
    [ -s "$runs/glow_digits/$file" ] || fail "train, evaluate, sample and interpolate: no $file in the volume"
done
ls "$runs"/glow_digits/checkpoints/last* "$runs"/glow_digits/checkpoints/best* "$runs"/glow_digits/events.out.tfevents.* "$runs"/glow_digits/samples/*.png
ok "train, evaluate, sample and interpolate of the demo write their files to the mounted runs"
foreign=$(find "$runs/glow_digits" ! \( -uid "$uid" -gid "$uid" \) | head)
check "every file of the run belongs to $uid:$uid" [ -z "$foreign" ]
bits=$(python -c 'import json; print(json.load(open("runs/glow_digits/result.json"))["bits_per_dim"])')
check "evaluate reports a figure below log2(17) = 4.09 bits/dim: $bits" awk -v b="$bits" 'BEGIN { exit !(b > 0 && b < 4.09) }'

step "data from the mounted volume, read-only"
python - << 'PYTHON'
from pathlib import Path

import numpy as np
from PIL import Image

images = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 1), dtype=np.uint8)
np.savez("data/noise.npz", x_train=images[:32], x_test=images[32:])
for tree in ("noise", "other"):
    for i, image in enumerate(images):
        file = Path("data", tree, "train" if i < 32 else "test", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(file)
PYTHON
read_only=(-v "$dir/data:/app/data:ro" -v "$runs:/app/runs")
tiny=(--set data.validation=8 --set train.num_steps=2 --set train.batch_size=8)
run "${read_only[@]}" -- train --set data.name=npz --set data.path=data/noise.npz "${tiny[@]}" --run-dir runs/npz
run "${read_only[@]}" -- train --set data.name=folder --set data.path=data/noise --set data.size=8 "${tiny[@]}" --run-dir runs/folder
check "data sets npz and folder train from a volume that is mounted read-only" \
    [ -s "$runs/npz/summary.json" -a -s "$runs/folder/summary.json" ]

step "a user that has no name in the image, as docker run --user makes"
mkdir -p "$dir/other"
rm -rf "$dir/other/"*
chown 12345:12345 "$dir/other"
b run --isolation chroot --user 0:0 "$container" rm -rf /app/cache/folder # as in a new container
run --user 12345:12345 -v "$dir/other:/app/runs" -v "$dir/data:/app/data:ro" -- \
    train --set data.name=folder --set data.path=data/other --set data.size=8 "${tiny[@]}" --run-dir runs/folder
run --user 12345:12345 -v "$dir/other:/app/runs" -- sample --num-images 4
check "train and sample work as user 12345, and the files are that user's" \
    [ -s "$dir/other/folder/sample.png" -a -z "$(find "$dir/other" ! -uid 12345)" ]

step "compiled code, for a user that has no name"
b run --isolation chroot --user 12345:12345 "$container" python - << 'PYTHON'
import torch

x = torch.arange(100.0)
assert torch.equal(torch.compile(lambda x: x * 2 + 1)(x), x * 2 + 1)
PYTHON
check "torch.compile works as user 12345 and keeps its code in the cache" \
    [ -n "$(b run --isolation chroot "$container" find /app/cache/inductor -name '*.so')" ]

step "two processes, with the torchrun of the image"
b run --isolation chroot "${volume_options[@]}" "$container" torchrun --standalone --nproc-per-node 2 \
    -m flowtrain train "${tiny[@]}" --run-dir runs/two | tee "$dir/two.log"
check "torchrun in the image trains with two processes" \
    [ -n "$(grep '2 processes' "$dir/two.log")" -a -n "$(grep '"finished": true' "$runs/two/summary.json")" ]

# --- signals --------------------------------------------------------------------------------------

# buildah's chroot isolation has no process namespace. Here the entry point is process 1 of a new
# namespace, as in Docker. Such a process gets only the signals that it has a handler for.
step "docker stop: SIGTERM to process 1 during train, then the same command again"
# start LOG ARGUMENT...: in the background; sets `init` to the number, outside, of the container's
# process 1.
start() {
    local log=$1; shift
    unshare --mount --pid --fork bash -c '
        root=$1 runs=$2 uid=$3 workdir=$4; shift 4
        mount --bind "$runs" "$root/app/runs"
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        cd "$root"
        exec chroot --userspec "$uid:$uid" . env -i --default-signal=INT --chdir="$workdir" "$@"
    ' start "$root" "$runs" "$uid" "$workdir" "${environment[@]}" "${entrypoint[@]}" "$@" > "$log" 2>&1 &
    outer=$!
    for _ in $(seq 100); do
        init=$(tr -d ' ' 2> /dev/null < "/proc/$outer/task/$outer/children" || true)
        [ -z "$init" ] || return 0
        sleep 0.05
    done
    fail "no process in the container: $(cat "$log")"
}
# stop SIGNAL PATTERN LOG: sends the signal once the log has the pattern, waits as long as docker stop
# would, and sets `code`.
stop() {
    local _
    for _ in $(seq 1800); do
        if grep -q "$2" "$3" || ! kill -0 "$init" 2> /dev/null; then break; fi
        sleep 0.1
    done
    inside=$(awk '/^NSpid:/ { print $NF }' "/proc/$init/status" 2> /dev/null || true)
    kill "-$1" "$init" || true
    for _ in $(seq 100); do
        kill -0 "$init" 2> /dev/null || break
        sleep 0.1
    done
    kill -KILL "$init" 2> /dev/null || true
    code=0
    wait "$outer" || code=$?
    init=
    cat "$3"
}
command=(train --set train.num_steps=200 --set train.log_every=10 --run-dir runs/stopped)
log=$dir/stopped.log
start "$log" "${command[@]}"
stop TERM '^step 10/' "$log"
check "flowtrain is process 1 in the container" [ "$inside" = 1 ]
check "SIGTERM during train: exit code 143 (it was $code)" [ "$code" = 143 ]
stopped_at=$(grep -o '"step": [0-9]*' "$runs/stopped/summary.json" | grep -o '[0-9]*')
check "a checkpoint of step $stopped_at was saved" \
    [ "$stopped_at" -ge 10 -a "$stopped_at" -lt 200 -a -n "$(ls "$runs"/stopped/checkpoints/last*)" ]
run "${volume_options[@]}" -- "${command[@]}" | tee "$dir/resumed.log"
first=$(grep -o -m 1 '^step [0-9]*/' "$dir/resumed.log" | grep -o '[0-9]*')
check "the same command goes on from there (its first line is of step $first) and finishes" \
    [ "$first" -gt "$stopped_at" -a -n "$(grep '"finished": true' "$runs/stopped/summary.json")" ]

step "docker stop and Ctrl-C during evaluate"
for signal in TERM:143 INT:130; do
    start "$dir/evaluate.log" evaluate runs/glow_digits --draws 5000 --json result.json
    stop "${signal%:*}" '^evaluating' "$dir/evaluate.log"
    check "SIG${signal%:*} during evaluate: exit code ${signal#*:} (it was $code)" [ "$code" = "${signal#*:}" ]
done

step "checked, on $described"
printf '  %s\n' "${checked[@]}"
echo "NOT checked here:"
echo "  a GPU (docker run --gpus all, NVIDIA_REQUIRE_CUDA, Triton): nothing here passes one to a container"
[ -n "${TORCH_INDEX:-}" ] || echo "  another build of torch: TORCH_INDEX was not given"
echo "  a Docker engine: the build and the runs were buildah's, with chroot for isolation, and without docker's network, seccomp or limits"
[ -n "${BASE_IMAGE:-}" ] || echo "  the default base image of the Dockerfile: the base was made with debootstrap"
