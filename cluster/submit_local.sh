#!/usr/bin/env bash
# Starts a Ray head on this machine, submits a study to it as a job, follows the job, and stops the head again.
#   cluster/submit_local.sh STUDY [options of `sae-ray run`]
# Give --root as an absolute path: a job runs in a temporary copy of this checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -d .venv ]; then PATH="$PWD/.venv/bin:$PATH"; fi

free_port() { python -c 'from jobs.cluster import free_port; print(free_port())'; }

# Ray listens on the machine's network address, not only on loopback. A random token keeps others out.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
export no_proxy=127.0.0.1
dashboard=$(free_port)
scratch=$(mktemp -d /tmp/sae-ray.XXXX)

# `ray start` with more patience than it has on a busy machine, and with free ports, so that it does not clash with
# another Ray on this machine.
ray_start='from jobs.cluster import allow_slow_starts as allow; allow(); from ray.scripts.scripts import main; main()'
setsid python -c "$ray_start" start --head --block --disable-usage-stats --num-cpus "${NUM_CPUS:-4}" --temp-dir "$scratch" \
    --port "$(free_port)" --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" \
    --ray-client-server-port "$(free_port)" >"$scratch/head.log" 2>&1 &
head=$!
following=$head
stop() {
    kill -TERM -- "$following" "-$head" 2>/dev/null || true
    # Left alone, Ray waits half a minute for processes that have nothing left to do.
    for _ in $(seq 5); do
        kill -0 "$head" 2>/dev/null || break
        sleep 1
    done
    kill -KILL -- "-$head" 2>/dev/null || true
    # The job has a session of its own, and the token that nobody else knows.
    for pid in $(grep -lzs "RAY_AUTH_TOKEN=$RAY_AUTH_TOKEN" /proc/[0-9]*/environ | cut -d/ -f3); do
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait "$head" 2>/dev/null || true
    rm -rf "$scratch" 2>/dev/null || { sleep 1; rm -rf "$scratch"; } || true
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Bash attends to a signal at once only while it waits for what runs in the background.
submit() {
    ray job submit "$@" &
    following=$!
    wait "$following"
}
export RAY_ADDRESS="http://127.0.0.1:$dashboard"
for _ in $(seq 30); do
    if submit -- true >/dev/null 2>&1; then break; fi # the head responds before it can run jobs
    kill -0 "$head" 2>/dev/null || { cat "$scratch/head.log" >&2; exit 1; }
    sleep 1
done
submit --working-dir . -- python -m jobs.study "$@"
