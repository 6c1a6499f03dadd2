#!/usr/bin/env bash
# One command from images to tables and figures. It sets up .venv from requirements.lock when that is needed, then hands
# over to Python (hamlet.artifact.build), pytest, JupyterLab or MkDocs. bash 3.2 (macOS) is enough.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
VENV="$ROOT/.venv" LOCK="$ROOT/requirements.lock" NEEDED_GB=9 # with CUDA libraries it takes 7.1 GB
COMMANDS="quick smoke pretrained ablation captions paper all test lab endurance docs"

die() { printf '%s\n' "$@" >&2; exit 2; }  # asked wrongly
fail() { printf '%s\n' "$@" >&2; exit 1; } # asked well, could not be done

# ---- the command: a wrong one ends before any set-up; everything else is checked by Python -----------------------
COMMAND="" DRY="" JOBS="" OPTION="" EXTRA="" COUNT=0
for word in "$@"; do
  COUNT=$((COUNT + 1))
  case "$OPTION" in
    --jobs) JOBS="$word"; OPTION=""; continue ;;
    ?*) OPTION=""; continue ;;
  esac
  case "$word" in
    -h | --help) cat "$ROOT/workflow/help.txt"; exit 0 ;;
    --dry-run) DRY=1 ;;
    --jobs) OPTION="$word" ;;
    --dataset | --data-root | --name | --split-by | --models | --seeds) OPTION="$word" EXTRA=1 ;;
    --) break ;;
    -*) EXTRA=1 ;;
    *) case " $COMMANDS " in *" $word "*) ;; *) die "unknown command '$word'; valid: ${COMMANDS// /, }" ;; esac
       [ -z "$COMMAND" ] || die "one command at a time: '$COMMAND' and '$word' were given"
       COMMAND="$word" ;;
  esac
done
COMMAND="${COMMAND:-quick}"
case "$COMMAND" in
  test | lab | endurance | docs) shift "$COUNT" # what follows -- is for pytest, JupyterLab or MkDocs
    [ -z "$EXTRA" ] || die "$COMMAND takes --jobs N and --dry-run alone; other arguments go after --" ;;
  *) [ "${word:-}" != -- ] || die "arguments after -- are for test, lab, endurance and docs alone" ;;
esac

# ---- environment -------------------------------------------------------------------------------------------------
fingerprint() { # what a set-up depends on; another text than the stamp's means another set-up
  "$1" -c 'import hashlib, platform, sys; assert (3, 11) <= sys.version_info < (3, 14)
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), platform.python_version(), *sys.argv[2:])' \
    "$LOCK" "${UV_TORCH_BACKEND:-lock}" "$ROOT" 2>/dev/null
}
matches_lock() { # true where the interpreter holds the locked versions of what matters
  "$1" -c 'import re, sys; from importlib.metadata import version; assert (3, 11) <= sys.version_info < (3, 14)
locked = set(re.findall(r"^([a-z0-9-]+==[^ ]+)", open(sys.argv[1]).read(), re.M))
for n in "torch torchvision timm transformers snakemake papermill pandas pytest".split():
    assert n + "==" + version(n).split("+")[0] in locked, n' "$LOCK" 2>/dev/null
}
find_python() { # a pyenv shim may exist and not run: only what answers counts
  local candidate
  for candidate in ${HAMLET_PYTHON:+"$HAMLET_PYTHON"} python3.13 python3.12 python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
      command -v "$candidate"; return
    fi
    [ "$candidate" != "${HAMLET_PYTHON:-}" ] || fail "HAMLET_PYTHON=$candidate is no Python 3.11 to 3.13 that runs"
  done
  fail "No Python 3.11, 3.12 or 3.13 was found. On Debian or Ubuntu: sudo apt install python3 python3-venv" \
    "(where that is older than 3.11: install one with uv, pyenv or conda and name it in HAMLET_PYTHON)"
}
make_venv() { # empty .venv, and uv: the one on PATH, or one of its own in .venv/bootstrap
  UV_BIN="$(command -v uv || true)"
  if [ -n "$UV_BIN" ] && "$UV_BIN" --version >/dev/null 2>&1; then
    [ -x "$VENV/bin/python" ] || "$UV_BIN" venv --quiet --python "$1" --allow-existing "$VENV"; return
  fi
  local pip="$1"
  [ -x "$VENV/bin/python" ] || "$1" -m venv "$VENV" 2>/dev/null || "$1" -m venv --without-pip "$VENV" ||
    fail "$1 has no venv. On Debian or Ubuntu: sudo apt install python3-venv"
  ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || pip="$VENV/bin/python"
  UV_BIN="$VENV/bootstrap/bin/uv"
  [ -x "$UV_BIN" ] || "$pip" -m pip install --quiet --disable-pip-version-check --target "$VENV/bootstrap" uv ||
    fail "uv could not be installed with pip: is the package index reachable? (proxy: HTTPS_PROXY; mirror: PIP_INDEX_URL;" \
      "no pip at all: sudo apt install python3-venv)"
}
install_locked() {
  local quiet="" own='^(torch|torchvision|triton|faiss-cpu|faiss-gpu|nvidia-[a-z0-9-]+|cuda-[a-z]+)=='
  [ -t 2 ] || quiet=--quiet # uv's progress bars are for a terminal
  if [ -z "${UV_TORCH_BACKEND:-}" ]; then
    "$UV_BIN" $quiet pip sync --python "$VENV/bin/python" --require-hashes "$LOCK"; return
  fi
  # another build of torch brings libraries and hashes of its own: held to the lock's versions, the rest to its hashes
  awk -v own="$own" '/^[a-z0-9]/ {keep = ($0 !~ own)} keep' "$LOCK" >"$VENV/rest.lock"
  sed -n 's/^\([a-z0-9][^\\]*\).*/\1/p' "$VENV/rest.lock" >"$VENV/rest.versions"
  sed -n -E 's/^((torch|torchvision|faiss-cpu|faiss-gpu)==[^\\]*).*/\1/p' "$LOCK" >"$VENV/torch.in"
  "$UV_BIN" $quiet pip install --python "$VENV/bin/python" --constraint "$VENV/rest.versions" -r "$VENV/torch.in" &&
    UV_TORCH_BACKEND= "$UV_BIN" $quiet pip install --python "$VENV/bin/python" --no-deps --require-hashes -r "$VENV/rest.lock"
}
set_up() {
  local mark="$VENV/.hamlet-incomplete" other free started=$SECONDS python
  other="$(cat "$mark" 2>/dev/null || true)"
  [ -z "$other" ] || ! kill -0 "$other" 2>/dev/null || fail "another set-up of $VENV is running (process $other)"
  [ ! -f "$mark" ] || { echo "An interrupted set-up is begun anew."; rm -rf "$VENV"; }
  [ ! -e "$VENV" ] || fingerprint "$VENV/bin/python" >/dev/null ||
    fail "$VENV exists, but holds no Python 3.11 to 3.13 that runs: move it away, then start again"
  python="$(find_python)"
  if [ ! -e "$VENV" ]; then
    free=$(($(df -Pk "$ROOT" | awk 'NR == 2 {print $4}') / 1000000))
    echo "Setting up $VENV with $python: about $NEEDED_GB GB ($free GB free), 1 to 10 minutes by your network."
    [ "$free" -ge $NEEDED_GB ] || [ -n "${UV_TORCH_BACKEND:-}" ] ||
      fail "Not enough disk: $NEEDED_GB GB wanted, $free GB free. UV_TORCH_BACKEND=cpu needs about 3 GB."
    mkdir "$VENV"; echo $$ >"$mark"
  else # one that this script made may be made anew if this is interrupted; anyone else's is only brought in line
    echo "Bringing $VENV in line with requirements.lock."
    [ ! -f "$VENV/.hamlet-stamp" ] || { rm "$VENV/.hamlet-stamp"; echo $$ >"$mark"; }
  fi
  make_venv "$python"
  install_locked || fail "" "The set-up did not finish: is the package index reachable? (proxy: HTTPS_PROXY; mirror:" \
    "UV_DEFAULT_INDEX; a certificate of your own: SSL_CERT_FILE). The same command begins it anew."
  "$VENV/bin/python" -c 'import torch, torchvision, torchvision.ops, faiss, timm' ||
    fail "The packages are there but do not load (message above). Often another torch is mixed in through PYTHONPATH or" \
      "a wheel lying on disk: unset PYTHONPATH, move .venv away, start again."
  # a .pth file, so that `.venv/bin/python -m hamlet` finds the package from any folder
  echo "$ROOT" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/hamlet-root.pth"
  fingerprint "$VENV/bin/python" >"$VENV/.hamlet-stamp"
  rm -f "$mark"
  echo "Set-up done in $((SECONDS - started)) s."
}

PYTHON="$VENV/bin/python"
if [ -n "${CONDA_PREFIX:-}" ] && matches_lock "$CONDA_PREFIX/bin/python"; then
  PYTHON="$CONDA_PREFIX/bin/python"; echo "Using the active conda environment $CONDA_PREFIX."
elif [ "${CONDA_DEFAULT_ENV:-}" = hamlet ]; then
  fail "The active conda environment 'hamlet' does not hold the versions of requirements.lock." \
    "Bring it in line: conda env update -f environment.yml   (or deactivate it: .venv is used then)"
elif [ ! -f "$VENV/.hamlet-stamp" ] || [ "$(cat "$VENV/.hamlet-stamp")" != "$(fingerprint "$PYTHON")" ]; then
  [ -z "$DRY" ] || { echo "would set up $VENV first (about $NEEDED_GB GB, 1 to 10 minutes), then $COMMAND"; exit 0; }
  set_up
fi

# ---- the work ----------------------------------------------------------------------------------------------------
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PATH="$(dirname "$PYTHON"):$PATH" PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 # not the hamlet that one stands in
unset PYTHONDONTWRITEBYTECODE # some images set it; then every process would compile 4,000 modules, 12 s each
case "$COMMAND" in test | lab | endurance | docs) [ -z "$DRY" ] || { echo "would run $COMMAND"; exit 0; } ;; esac
case "$COMMAND" in
  lab) [ "$(id -u)" -ne 0 ] || set -- --allow-root "$@"
       exec "$PYTHON" -m jupyterlab --notebook-dir "$ROOT/notebooks" "$@" ;;
  docs) cd "$ROOT"; exec "$PYTHON" -m mkdocs build --strict "$@" ;;
  endurance) cd "$ROOT"; export HAMLET_ENDURANCE_MINUTES="${HAMLET_ENDURANCE_MINUTES:-60}" OMP_NUM_THREADS=1
    exec "$PYTHON" -m pytest tests/endurance "$@" ;;
  test) cd "$ROOT"; status=0
    export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 # two single-thread processes are faster than one with two threads
    "$PYTHON" -m ruff check . || status=1
    "$PYTHON" -m ruff format --check . || status=1
    "$PYTHON" -m pytest -n "${JOBS:-auto}" --maxprocesses 8 --dist loadscope --nbval-lax --nbval-current-env \
      tests notebooks "$@" || status=$?
    exit "$status" ;;
esac
exec "$PYTHON" -m hamlet.artifact.build "$@"
