#!/usr/bin/env bash
# Tries the toolkit with each Python that it says it runs with: makes an environment in a scratch
# directory, installs the package as README says for use outside a checkout, runs the command from
# another directory and a short part of the tests, removes the environment, and writes what came of
# it to docs/pythons.json, from which docs/support.md is made. One after the other, as each takes 2 GB
# and minutes.
#
#     tools/pythons.sh             every version found: on the PATH, or pyenv's
#     tools/pythons.sh 3.12        that one
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
unset PYTHONPATH

RECORD=docs/pythons.json
# Settings, losses, the loop with its golden curves, checkpoints, files, forked processes, the verbs.
TESTS=(
  tests/core/test_config.py tests/core/test_worker_pool.py tests/losses tests/run/test_golden.py
  tests/weights/test_checkpoint.py tests/io tests/cli/test_cli.py
)

say() { printf '==> %s\n' "$*" >&2; }

# find_python VERSION : prints a Python of it that can make environments.
find_python() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c "import sys, venv, ensurepip
sys.exit('.'.join(map(str, sys.version_info[:2])) != '$1')" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# attempt VERSION PYTHON SCRATCH : installs and runs; its last line is what the tests said.
attempt() {
  local venv=$3/venv elsewhere=$3/elsewhere
  "$2" -m venv "$venv"
  say "Python $1: pip install ."
  "$venv/bin/python" -m pip install --quiet .
  "$venv/bin/python" -m pip check
  say "Python $1: the package that was installed, in another directory: train, evaluate, export, try"
  mkdir "$elsewhere"
  cd "$elsewhere"
  "$venv/bin/python" -c "import paddle, paddlenlp; print('Paddle', paddle.__version__)"
  "$venv/bin/ernie-train" run sft --run-dir run stages.sft.steps=2 stages.sft.validation=[] \
    stages.sft.validate_every_steps=null 'stages.sft.checkpoint={every_steps: 2}' \
    evaluation.max_examples=2 evaluation.untrained_examples=0
  "$venv/bin/ernie-train" generate run/export --prompt "What is 2 + 3?" --max-new-tokens 8
  "$venv/bin/ernie-train" report run
  cd "$OLDPWD"  # the repository
  say "Python $1: a part of the tests"
  # shellcheck disable=SC2046
  "$venv/bin/python" -m pip install --quiet $(sed -En \
    's/^((pytest|pytest-timeout|hypothesis|jsonschema)==[^ ]+).*/\1/p' requirements-dev.txt)
  "$venv/bin/python" -m pytest -q -p no:cacheprovider --durations=0 --durations-min=60 "${TESTS[@]}"
}

# record VERSION PYTHON STATUS LAST_LINE
record() {
  "$2" - "$RECORD" "$@" <<'PYTHON'
import hashlib, json, pathlib, platform, re, subprocess, sys, tomllib

file, version, _, status, last = sys.argv[1:]
path = pathlib.Path(file)
record = json.loads(path.read_text()) if path.exists() else {}
ours = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["version"]
commit = subprocess.check_output(["git", "rev-parse", "--short=7", "HEAD"], text=True).strip()
record[version] = {
    "python": platform.python_version(),
    "ernie_train": f"{ours} at {commit}",
    "requirements": hashlib.sha256(pathlib.Path("requirements.txt").read_bytes()).hexdigest(),
    "works": status == "0",
    "tests": re.sub(r"\x1b\[[0-9;]*m", "", last).strip("= \n"),
}
path.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")
PYTHON
}

# Its own process, where every failing command ends it: in a condition bash would go on.
if [ "${1:-}" = --attempt ]; then
  shift
  attempt "$@"
  exit
fi

failed=0
for version in "${@:-3.11 3.12}"; do
  for one in $version; do
    if ! python=$(find_python "$one"); then
      say "Python $one: none found, skipped"
      continue
    fi
    scratch=$(mktemp -d)
    trap 'rm -rf -- "$scratch"' EXIT
    status=0
    bash "tools/pythons.sh" --attempt "$one" "$python" "$scratch" 2>&1 | tee "$scratch/log" >&2 || status=1
    record "$one" "$python" "$status" "$(tail -n 1 "$scratch/log")"
    rm -rf -- "$scratch"
    say "Python $one: $([ "$status" -eq 0 ] && echo works || echo FAILS)"
    failed=$((failed | status))
  done
done
exit "$failed"
