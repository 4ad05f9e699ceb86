# Sourced by run-tiny, run-tests and tools/vllm.sh: makes the environments that they need, once.
#
# An environment counts as complete when it holds a stamp: a hash of everything that was installed
# from. It is written last, so that an interrupted installation is taken up again by the next run,
# and a changed requirements file is installed by it. Nothing outside the repository is changed,
# except that missing system packages (python3.11, python3.11-venv, bubblewrap, chromium) are installed
# through apt-get where this user may do that without a password.
#
#   ERNIE_TRAIN_VENV      an environment of your own for the toolkit; nothing is installed in it
#   ERNIE_TRAIN_REFEREE   the same for torch and transformers
#   ERNIE_TRAIN_VLLM      the same for vLLM
#   ERNIE_TRAIN_CHROMIUM  a Chromium to test the report in
#   PYTHON                the Python 3.11 that the environments are made with

export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '==> %s\n' "$*" >&2; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# apt_install PACKAGE... : whether the packages were installed.
apt_install() {
  local as_root=()
  command -v apt-get >/dev/null || return 1
  if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null || return 1
    as_root=(sudo -n)
  fi
  say "Installing $* through apt-get"
  "${as_root[@]}" apt-get -qq update >&2 || true  # an old list may still do
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq install -y --no-install-recommends "$@" >&2
}

# is_python_311 COMMAND : whether it is one, with all that making an environment takes.
is_python_311() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
}

# Sets PYTHON_FOUND to a Python 3.11.
find_python() {
  local candidate attempt
  if [ -n "${PYTHON:-}" ]; then
    is_python_311 "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.11 with venv and ensurepip"
    PYTHON_FOUND=$PYTHON
    return
  fi
  for attempt in 1 2; do
    for candidate in python3.11 /usr/bin/python3.11 python3 python; do
      if command -v "$candidate" >/dev/null && is_python_311 "$candidate"; then
        PYTHON_FOUND=$candidate
        return
      fi
    done
    [ "$attempt" -eq 1 ] && { apt_install python3.11 python3.11-venv || break; }
  done
  fail "Python 3.11 with its venv module is needed (PaddleNLP's pins fix the version)." \
    "Install it (Debian: apt-get install python3.11 python3.11-venv) or name one: PYTHON=/path/to/python3.11"
}

# stamp_of FILE... : hash of the files and of where they are; environments hold absolute paths.
stamp_of() {
  { pwd; cat -- "$@"; } | sha256sum | cut -d' ' -f1
}

# has_stamp DIRECTORY NAME VALUE
has_stamp() {
  [ -x "$1/bin/python" ] && [ "$(cat "$1/$2" 2>/dev/null)" = "$3" ]
}

write_stamp() {
  printf '%s\n' "$3" >"$1/$2.tmp"
  mv -- "$1/$2.tmp" "$1/$2"
}

# lock NAME : waits while another run installs.
lock() {
  command -v flock >/dev/null || return 0
  exec 9>"$1.lock"
  flock -n 9 || { say "Waiting for another installation into $1"; flock 9; }
}

unlock() {
  command -v flock >/dev/null || return 0
  exec 9>&-
}

# make_venv DIRECTORY : an environment with a pip that works.
make_venv() {
  "$1/bin/python" -m pip --version >/dev/null 2>&1 && return
  find_python
  say "Making the environment $1 with $("$PYTHON_FOUND" --version)"
  "$PYTHON_FOUND" -m venv --clear "$1"
}

# pip_install PYTHON ARGUMENT... : installs; in a terminal it shows which package it is at.
pip_install() {
  local python=$1 line
  shift
  if [ ! -t 2 ]; then
    "$python" -m pip install --quiet "$@"
    return
  fi
  "$python" -m pip install --progress-bar off "$@" |
    while IFS= read -r line; do printf '\r\033[K    %.70s' "$line" >&2; done || return
  printf '\r\033[K' >&2
}

# install_toolkit run|tests : sets VENV to an environment with what that needs.
install_toolkit() {
  local requirements=requirements.txt stamp
  VENV=${ERNIE_TRAIN_VENV:-$PWD/.venv}
  if [ -n "${ERNIE_TRAIN_VENV:-}" ]; then
    [ -x "$VENV/bin/python" ] || fail "ERNIE_TRAIN_VENV=$VENV has no bin/python"
    say "Using the environment $VENV"
    return
  fi
  stamp=$(stamp_of requirements.txt pyproject.toml)
  if [ "$1" = tests ]; then
    requirements=requirements-dev.txt
    stamp=$(stamp_of requirements.txt requirements-dev.txt pyproject.toml)
  fi
  has_stamp "$VENV" ".complete-$1" "$stamp" && return
  lock "$VENV"
  if ! has_stamp "$VENV" ".complete-$1" "$stamp"; then
    make_venv "$VENV"
    say "Installing $requirements into $VENV (about 2 GB; takes some minutes)"
    pip_install "$VENV/bin/python" -r "$requirements"
    pip_install "$VENV/bin/python" --no-deps -e .
    # What the tests need includes what a run needs.
    write_stamp "$VENV" .complete-run "$(stamp_of requirements.txt pyproject.toml)"
    [ "$1" = run ] || write_stamp "$VENV" ".complete-$1" "$stamp"
  fi
  unlock
}

# install_referee : exports ERNIE_TRAIN_REFEREE, an environment with torch and transformers.
install_referee() {
  local directory stamp
  directory=${ERNIE_TRAIN_REFEREE:-$PWD/.venv-referee}
  if [ -n "${ERNIE_TRAIN_REFEREE:-}" ]; then
    [ -x "$directory/bin/python" ] || fail "ERNIE_TRAIN_REFEREE=$directory has no bin/python"
    say "Using the referee environment $directory"
    return
  fi
  export ERNIE_TRAIN_REFEREE=$directory
  stamp=$(stamp_of requirements-referee.txt requirements-referee-457.txt)
  has_stamp "$directory" .complete "$stamp" && return
  lock "$directory"
  if ! has_stamp "$directory" .complete "$stamp"; then
    make_venv "$directory"
    say "Installing requirements-referee.txt into $directory (torch and transformers, for tests only)"
    pip_install "$directory/bin/python" -r requirements-referee.txt
    rm -rf -- "$directory/transformers-4.57"
    pip_install "$directory/bin/python" --no-deps \
      --target "$directory/transformers-4.57" -r requirements-referee-457.txt
    write_stamp "$directory" .complete "$stamp"
  fi
  unlock
}

# install_vllm : sets VLLM to an environment with vLLM for CPUs (3.5 GB), which few need.
install_vllm() {
  local stamp
  VLLM=${ERNIE_TRAIN_VLLM:-$PWD/.venv-vllm}
  if [ -n "${ERNIE_TRAIN_VLLM:-}" ]; then
    [ -x "$VLLM/bin/python" ] || fail "ERNIE_TRAIN_VLLM=$VLLM has no bin/python"
    say "Using the environment $VLLM"
    return
  fi
  stamp=$(stamp_of requirements-vllm.txt)
  has_stamp "$VLLM" .complete "$stamp" && return
  lock "$VLLM"
  if ! has_stamp "$VLLM" .complete "$stamp"; then
    make_venv "$VLLM"
    say "Installing requirements-vllm.txt into $VLLM (about 3 GB)"
    pip_install "$VLLM/bin/python" --no-deps -r requirements-vllm.txt
    write_stamp "$VLLM" .complete "$stamp"
  fi
  unlock
}

# install_chromium : the report is tested in it. Not fatal where it is missing.
install_chromium() {
  [ -n "${ERNIE_TRAIN_CHROMIUM:-}" ] || command -v chromium >/dev/null && return
  apt_install chromium && command -v chromium >/dev/null && return
  say "chromium is missing, so the report is not tested in a browser; install it as root:" \
    "apt-get install chromium"
}

# install_bubblewrap : it confines the programs that a model writes. Not fatal where it is missing.
install_bubblewrap() {
  command -v bwrap >/dev/null && return
  apt_install bubblewrap && command -v bwrap >/dev/null && return
  say "bubblewrap is missing, so programs that a model writes are not run or scored;" \
    "install it as root: apt-get install bubblewrap"
}
