# shellcheck shell=bash
# The job that every launcher runs. Sourced, never run; each value can be set in the environment.
# The YAML launchers repeat these values, and a test compares them with this file.

CONFIG="${CONFIG:-configs/arithmetic.py}"
WORKDIR="${WORKDIR:-runs/arithmetic}"
PYTHON="${PYTHON:-python}"

# The same command resumes a run that was stopped (EX_TEMPFAIL of sysexits.h) or killed (128 +
# SIGKILL). Any other code but 0 is a fault that a restart would only repeat.
RETRY_CODE=75
KILLED_CODE=137
is_retried() { (($1 == RETRY_CODE || $1 == KILLED_CODE)); }
MAX_RESTARTS="${MAX_RESTARTS:-20}"
RESTART_DELAY="${RESTART_DELAY:-10}" # seconds

# Sets the array JOB: the command line of one process of the job, `s2d-jax run`. It names the
# module, because the console script of the environment that PYTHON chooses need not be on the PATH.
# Arguments: further flags of the command.
# shellcheck disable=SC2034  # the launchers read it
set_job() { JOB=("$PYTHON" -m s2d_jax.main "--config=$CONFIG" "--workdir=$WORKDIR" "$@"); }

# Sets dry_run to 1 where the first argument is --dry-run, else to 0; the launcher shifts by it.
read_dry_run() {
  if [[ "${1:-}" == --dry-run ]]; then dry_run=1; else dry_run=0; fi
}

# Runs its arguments; in a dry run it prints them instead.
run() { if ((dry_run)); then quote "$@"; else "$@"; fi; }

# Prints its arguments as one line that bash reads back as the same words.
quote() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# Runs its arguments again while their exit code is retried, at most MAX_RESTARTS times more, and
# returns their last exit code.
retry() {
  local code restarts
  for ((restarts = 0; ; restarts++)); do
    code=0
    "$@" || code=$?
    is_retried "$code" || return "$code"
    if ((restarts >= MAX_RESTARTS)); then break; fi
    echo "Stopped with its state saved; restart $((restarts + 1)) of at most $MAX_RESTARTS." >&2
    sleep "$RESTART_DELAY"
  done
  echo "Gave up after $restarts restarts: raise MAX_RESTARTS or run the same command again." >&2
  return "$code"
}

# Exits unless every host can reach WORKDIR.
require_shared_workdir() {
  if [[ "$WORKDIR" != gs://* && "$WORKDIR" != s3://* ]]; then
    echo "All hosts must share the work folder, not $WORKDIR: set WORKDIR=gs://bucket/run." >&2
    exit 64
  fi
}
