#!/usr/bin/env bash
# One command from images to tables and figures. It sets up .venv from requirements.lock when that is needed,
# then hands over to `python -m hamlet.artifact.build` (or pytest, or JupyterLab). ./run_all.sh --help says what it takes.
# Names are checked here, before any set-up, with nothing but the shell; bash 3.2 (macOS) is enough.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
VENV="$ROOT/.venv"
LOCK="$ROOT/requirements.lock"
COMMANDS="quick smoke paper test lab"
DATASETS="scenes grocery grocery_unseen folder cifar10 flowers102 pets cub200 flickr8k flickr30k coco_captions"
NEEDED_GB=9 # the environment with CUDA libraries takes 7.1 GB

usage() {
  cat <<HELP
./run_all.sh [COMMAND] [OPTIONS]

Commands
  quick   (default) train all configurations on two CPU cores; tables and figures
  smoke   the same road on a few images, in 3 minutes; its numbers mean nothing
  paper   224 px, batch 32, ImageNet weights, 5 seeds; one GPU or more
  test    lint, every test, the notebooks by nbval   (after --: arguments for pytest)
  lab     JupyterLab on the notebooks                (after --: arguments for JupyterLab)

Options
  --dataset NAME    $(echo $DATASETS | sed 's/ /, /g'); default scenes, which needs no download
  --data-root DIR   folder that holds the data set (also: HAMLET_DATA)
  --models A,B      only these: $(models quick | tr '\n' ' ' | sed 's/ $//' | fold -s -w 78 | sed '2,$s/^/                    /')
  --seeds N         number of seeds instead of the profile's
  --jobs N          runs at a time; default one per core, or one per card in the paper profile
  --fresh           set existing results of this profile and data set aside and train again
  --dry-run         say what would be done, how long and how much disk it takes, and stop
  --help            this text

Environment
  HAMLET_PYTHON     the Python (3.11 to 3.13) to build .venv with
  UV_TORCH_BACKEND  e.g. cpu: PyTorch from its own index, a smaller download without CUDA. Those builds are not in
                    requirements.lock: versions are the lock's, hashes of torch and its libraries are not checked.
  An active conda environment made from environment.yml is used instead of .venv.
HELP
}

die() { printf '%s\n' "$@" >&2; exit 2; }  # asked wrongly
fail() { printf '%s\n' "$@" >&2; exit 1; } # asked well, could not be done
profiles() { for f in "$ROOT"/workflow/*.yaml; do f="${f##*/}"; [ "$f" = reports.yaml ] || echo "${f%.yaml}"; done; }
models() { sed -n '/^runs:/,$s/^  - \([A-Za-z0-9_-]*\).*/\1/p' "$ROOT/workflow/$1.yaml"; }
is_in() { local x; for x in $2; do [ "$x" = "$1" ] && return 0; done; return 1; }
listed() { echo $1 | sed 's/ /, /g'; }
whole() { case "$2" in "" | *[!0-9]* | 0* | ?????*) die "$1 takes a whole number from 1 to 9999, got '$2'" ;; esac; }
cores() { nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2; }

# ---- arguments -------------------------------------------------------------------------------------------------
OPTIONS="--dataset --data-root --models --seeds --jobs --fresh --dry-run --help"
COMMAND="" DATASET=scenes MODELS="" SEEDS="" JOBS="" FRESH="" DRY="" DATA_ROOT="${HAMLET_DATA:-}"
REST=()
while [ $# -gt 0 ]; do
  option="$1"; shift
  case "$option" in
    --*=*) set -- "${option#*=}" "$@"; option="${option%%=*}"
           is_in "$option" "--fresh --dry-run --help" && die "$option takes no value" ;;
  esac
  case "$option" in
    --dataset | --data-root | --models | --seeds | --jobs) [ $# -gt 0 ] || die "$option needs a value" ;;
  esac
  case "$option" in
    -h | --help) usage; exit 0 ;;
    --dataset) DATASET="$1"; shift ;;
    --data-root) DATA_ROOT="$1"; shift ;;
    --models) MODELS="$1"; shift; [ -n "${MODELS//,/}" ] || die "--models takes names, got '$MODELS'; valid: $(listed "$(models quick)")" ;;
    --seeds) whole --seeds "$1"; SEEDS="$1"; shift ;;
    --jobs) whole --jobs "$1"; JOBS="$1"; shift ;;
    --fresh) FRESH=1 ;;
    --dry-run) DRY=1 ;;
    --) REST=("$@"); break ;;
    -*) die "unknown option '$option'; valid: $(listed "$OPTIONS")" ;;
    *) [ -z "$COMMAND" ] || die "one command at a time: '$COMMAND' and '$option' were given"
       is_in "$option" "$COMMANDS $(profiles)" || die "unknown command '$option'; valid: $(listed "$COMMANDS")"
       COMMAND="$option" ;;
  esac
done
COMMAND="${COMMAND:-quick}"
is_in "$DATASET" "$DATASETS" || die "unknown data set '$DATASET'; valid: $(listed "$DATASETS")"
if is_in "$COMMAND" "test lab"; then
  [ -z "$MODELS$SEEDS$FRESH" ] && [ "$DATASET" = scenes ] || die "$COMMAND takes --jobs, --data-root and --dry-run alone"
else
  [ ${#REST[@]} -eq 0 ] || die "arguments after -- are for test and lab alone"
  for name in $(echo "$MODELS" | tr ',' ' '); do
    is_in "$name" "$(models "$COMMAND")" ||
      die "unknown model '$name' in profile $COMMAND; valid: $(listed "$(models "$COMMAND")")"
  done
fi
if [ -n "$DATA_ROOT" ]; then
  [ -d "$DATA_ROOT" ] || die "data root '$DATA_ROOT' is not a folder; create it or name another with --data-root"
  HAMLET_DATA="$(cd "$DATA_ROOT" && pwd -P)"
  export HAMLET_DATA
elif [ "$DATASET" = folder ] && [ -z "$DRY" ]; then
  die "--dataset folder needs --data-root DIR: your images as DIR/<class>/<image>"
fi

# ---- environment -----------------------------------------------------------------------------------------------
# Prints what the set-up depends on; another text than the stamp's means another set-up.
fingerprint() {
  "$1" - "$LOCK" "$ROOT" "${UV_TORCH_BACKEND:-}" 2>/dev/null <<'PY'
import hashlib, platform, sys
lock, root, backend = sys.argv[1:]
assert (3, 11) <= sys.version_info < (3, 14)
print(hashlib.sha256(open(lock, "rb").read()).hexdigest(), platform.python_version(), backend or "lock", root)
PY
}

ready() { [ -f "$VENV/.hamlet-stamp" ] && [ "$(cat "$VENV/.hamlet-stamp")" = "$(fingerprint "$VENV/bin/python")" ]; }

# True where the interpreter holds the locked versions of what matters.
matches_lock() {
  "$1" - "$LOCK" 2>/dev/null <<'PY'
import re, sys
from importlib.metadata import version
assert (3, 11) <= sys.version_info < (3, 14)
locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", open(sys.argv[1]).read(), re.M))
for name in ("torch", "torchvision", "timm", "transformers", "snakemake", "papermill", "pandas", "pytest"):
    assert version(name).split("+")[0] == locked[name], name
PY
}

find_python() { # a pyenv shim may exist and not run: only what answers counts
  local candidate
  for candidate in ${HAMLET_PYTHON:+"$HAMLET_PYTHON"} python3.13 python3.12 python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
      command -v "$candidate"
      return 0
    fi
    [ "$candidate" != "${HAMLET_PYTHON:-}" ] || fail "HAMLET_PYTHON=$candidate is no Python 3.11 to 3.13 that runs"
  done
  fail "No Python 3.11, 3.12 or 3.13 was found. On Debian or Ubuntu: sudo apt install python3 python3-venv" \
    "(where that is older than 3.11: install one with uv, pyenv or conda and name it in HAMLET_PYTHON)"
}

make_venv() { # empty .venv, and uv: the one on PATH, or one of its own in .venv/bootstrap
  local python="$1"
  UV_BIN="$(command -v uv || true)"
  if [ -n "$UV_BIN" ] && ! "$UV_BIN" --version >/dev/null 2>&1; then UV_BIN=""; fi
  if [ -n "$UV_BIN" ]; then
    [ -x "$VENV/bin/python" ] || "$UV_BIN" venv --quiet --python "$python" --allow-existing "$VENV"
    return
  fi
  local pip=("$python" -m pip)
  if [ ! -x "$VENV/bin/python" ]; then
    if "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      "$python" -m venv "$VENV"
    elif "$python" -c 'import pip, venv' >/dev/null 2>&1; then
      "$python" -m venv --without-pip "$VENV"
    else
      local apt="python3-venv"
      case "$python" in */python3.*) apt="${python##*/}-venv" ;; esac
      fail "$python has neither venv nor pip. On Debian or Ubuntu: sudo apt install $apt"
    fi
  fi
  if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then pip=("$VENV/bin/python" -m pip); fi
  UV_BIN="$VENV/bootstrap/bin/uv"
  [ -x "$UV_BIN" ] || "${pip[@]}" install --quiet --disable-pip-version-check --target "$VENV/bootstrap" uv ||
    fail "uv could not be installed with pip: is the package index reachable? (proxy: HTTPS_PROXY; mirror: PIP_INDEX_URL)"
}

install_locked() {
  # uv's progress bars are for a terminal; elsewhere only its closing list of 216 packages would show.
  local QUIET=""
  [ -t 2 ] || QUIET=--quiet
  if [ -z "${UV_TORCH_BACKEND:-}" ]; then
    "$UV_BIN" $QUIET pip sync --python "$VENV/bin/python" --require-hashes "$LOCK"
    return
  fi
  # Another build of torch brings libraries and hashes of its own: it is resolved without hashes, held to the lock's
  # versions; all the rest is installed from the lock, hashes checked.
  local own='^(torch|torchvision|triton|faiss-cpu|faiss-gpu|nvidia-[a-z0-9-]+|cuda-[a-z]+)=='
  awk -v own="$own" '/^[a-z0-9]/ {keep = ($0 !~ own)} keep' "$LOCK" >"$VENV/rest.lock"
  sed -n 's/^\([a-z0-9][^\\]*\).*/\1/p' "$VENV/rest.lock" >"$VENV/rest.versions"
  sed -n -E 's/^((torch|torchvision|faiss-cpu|faiss-gpu)==[^\\]*).*/\1/p' "$LOCK" >"$VENV/torch.in"
  "$UV_BIN" $QUIET pip install --python "$VENV/bin/python" --constraint "$VENV/rest.versions" -r "$VENV/torch.in" &&
  (unset UV_TORCH_BACKEND
   "$UV_BIN" $QUIET pip install --python "$VENV/bin/python" --no-deps --require-hashes -r "$VENV/rest.lock")
}

set_up() {
  local python free other started
  started="$(date +%s)"
  if [ -f "$VENV/.hamlet-incomplete" ]; then
    other="$(cat "$VENV/.hamlet-incomplete")"
    [ -z "$other" ] || ! kill -0 "$other" 2>/dev/null || fail "another set-up of $VENV is running (process $other)"
    echo "An interrupted set-up is begun anew."
    rm -rf "$VENV"
  fi
  if [ -e "$VENV" ] && ! fingerprint "$VENV/bin/python" >/dev/null; then
    fail "$VENV exists, but holds no Python 3.11 to 3.13 that runs: move it away, then start again"
  fi
  python="$(find_python)"
  free=$(($(df -Pk "$ROOT" | awk 'NR == 2 {print $4}') / 1000000))
  if [ ! -e "$VENV" ]; then
    echo "Setting up $VENV with $python: about $NEEDED_GB GB ($free GB free), 1 to 10 minutes by your network."
    [ "$free" -ge $NEEDED_GB ] || [ -n "${UV_TORCH_BACKEND:-}" ] ||
      fail "Not enough disk: $NEEDED_GB GB wanted, $free GB free. UV_TORCH_BACKEND=cpu needs about 3 GB."
    mkdir "$VENV"
    echo $$ >"$VENV/.hamlet-incomplete"
  else
    echo "Bringing $VENV in line with requirements.lock."
    # One that this script made may be made anew if this is interrupted; anyone else's is only brought in line.
    [ ! -f "$VENV/.hamlet-stamp" ] || mv "$VENV/.hamlet-stamp" "$VENV/.hamlet-incomplete"
    [ ! -f "$VENV/.hamlet-incomplete" ] || echo $$ >"$VENV/.hamlet-incomplete"
  fi
  make_venv "$python"
  install_locked || fail "" "The set-up did not finish: is the package index reachable? (proxy: HTTPS_PROXY; mirror:" \
    "UV_DEFAULT_INDEX; a certificate of your own: SSL_CERT_FILE). The same command begins it anew."
  "$VENV/bin/python" -c 'import torch, torchvision, torchvision.ops, faiss, timm' ||
    fail "The packages are there but do not load (message above). Often another torch is mixed in through PYTHONPATH or" \
      "a wheel lying on disk: unset PYTHONPATH, move .venv away, start again."
  # A .pth file, so that `.venv/bin/python -m hamlet.artifact.run` finds the package from any folder.
  "$VENV/bin/python" -c 'import sys, sysconfig; open(sysconfig.get_path("purelib") + "/hamlet-root.pth", "w").write(sys.argv[1] + "\n")' "$ROOT"
  fingerprint "$VENV/bin/python" >"$VENV/.hamlet-stamp"
  rm -f "$VENV/.hamlet-incomplete"
  echo "Set-up done in $(($(date +%s) - started)) s."
}

PYTHON="$VENV/bin/python"
READY=""
if [ -n "${CONDA_PREFIX:-}" ] && matches_lock "$CONDA_PREFIX/bin/python"; then
  PYTHON="$CONDA_PREFIX/bin/python" READY=1
  echo "Using the active conda environment $CONDA_PREFIX."
elif [ "${CONDA_DEFAULT_ENV:-}" = hamlet ]; then
  fail "The active conda environment 'hamlet' does not hold the versions of requirements.lock." \
    "Bring it in line: conda env update -f environment.yml   (or deactivate it: .venv is used then)"
elif ready; then
  READY=1
fi

if [ -n "$DRY" ]; then
  [ -n "$READY" ] || echo "would set up $VENV from requirements.lock first (about $NEEDED_GB GB, 1 to 10 minutes)"
  case "$COMMAND" in
    test) echo "would run ruff, pytest and the notebooks by nbval (about 9 minutes on two cores)"; exit 0 ;;
    lab) echo "would start JupyterLab on $ROOT/notebooks"; exit 0 ;;
  esac
  if [ -z "$READY" ]; then
    chosen="${MODELS:-$(models "$COMMAND")}"
    count=$(echo "$chosen" | tr ',' ' ' | wc -w)
    seeds="${SEEDS:-$(sed -n 's/^seeds: *\([0-9]*\).*/\1/p' "$ROOT/workflow/$COMMAND.yaml")}"
    echo "then $COMMAND on $DATASET: $((count)) configurations x $seeds seeds, less what is there already;" \
      "efficiency; tables/$COMMAND/$DATASET and figures/$COMMAND/$DATASET"
    exit 0
  fi
fi
[ -n "$READY" ] || set_up

# ---- the work --------------------------------------------------------------------------------------------------
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$(dirname "$PYTHON"):$PATH"
export PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE # many images of Python set it; then every process would compile 4,000 modules, 12 s each
case "$COMMAND" in
  lab)
    [ "$(id -u)" -ne 0 ] || REST=(--allow-root ${REST[@]+"${REST[@]}"})
    exec "$PYTHON" -m jupyterlab --notebook-dir "$ROOT/notebooks" ${REST[@]+"${REST[@]}"}
    ;;
  test)
    cd "$ROOT"
    status=0
    workers="${JOBS:-$(cores)}"
    [ "$workers" -le 8 ] || workers=8
    # Two single-thread processes are faster than one with two threads.
    export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
    "$PYTHON" -m ruff check . || status=1
    "$PYTHON" -m ruff format --check . || status=1
    "$PYTHON" -m pytest -n "$workers" --dist loadscope --nbval-lax --nbval-current-env tests notebooks \
      ${REST[@]+"${REST[@]}"} || status=$?
    exit "$status"
    ;;
esac
set -- "$COMMAND" --dataset "$DATASET"
[ -z "$MODELS" ] || set -- "$@" --models "$MODELS"
[ -z "$SEEDS" ] || set -- "$@" --seeds "$SEEDS"
[ -z "$JOBS" ] || set -- "$@" --jobs "$JOBS"
[ -z "$FRESH" ] || set -- "$@" --fresh
[ -z "$DRY" ] || set -- "$@" --dry-run
cd "$ROOT"
exec "$PYTHON" -m hamlet.artifact.build "$@"
