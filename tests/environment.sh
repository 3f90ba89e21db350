# Sourced by tests/unit and tests/run, in the root of the checkout: installs the packages that
# config/requirements/development.txt pins into .venv, unless they are installed.

# Without compiled modules every worker and every daemon compiles all of them anew, for seconds.
unset PYTHONDONTWRITEBYTECODE

# Runs a command and prints its output only if it fails.
quietly() {
  local output status=0
  output=$("$@" 2>&1) || status=$?
  ((status == 0)) || printf '%s\n' "$output"
  return "$status"
}

install_environment() {
  local lock=config/requirements/development.txt stamp=.venv/requirements.sha256 wanted
  wanted=$(cat "$lock" pyproject.toml | sha256sum)
  [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]] || return 0
  printf '\n== .venv from %s (%s s)\n' "$lock" "$SECONDS"
  [[ -x .venv/bin/pip ]] || python3 -m venv --clear .venv
  quietly .venv/bin/pip install --disable-pip-version-check --require-hashes -r "$lock"
  quietly .venv/bin/pip install --disable-pip-version-check --no-deps -e .
  echo "$wanted" >"$stamp"
}
