#!/usr/bin/env bash
# Run `make ablation`, then the evaluation of `make saro`, on a GPU machine without a network, in at most TOTAL seconds
# (default 500). Run it in the root of the repository, where prepare_method.sh has left .method.
#   bash benchmarks/gpu/method.sh                           the same command goes on where it was stopped
#   SYNTH="--op.draws 8" bash benchmarks/gpu/method.sh OUTPUT=output/more OP="--limit 940"
# RW, SRPO, SYNTH and EVALUATE are options of the stages, behind those of this file; arguments are variables of `make`.
# JOBS stages at a time (default 6) share the GPU. Results go to OUT: numbers, and no text of a prompt or an answer.
set -euo pipefail
begin=$SECONDS
cd "$(dirname "$0")/../.."
. benchmarks/gpu/environment.sh

# 1. Join what travelled in parts, whatever call brought it.
content=$work/method
if [[ ! -d $content ]]; then
    (cd .method && sha256sum --check --quiet sums) || { echo 'method.sh: send the parts of .method that are missing' >&2; exit 3; }
    rm -rf "$content.part"
    mkdir -p "$content.part"
    cat .method/part-* | tar -C "$content.part" -x
    tar -C "$content.part" -xJf "$content.part/data.tar.xz"
    mv "$content.part" "$content"
fi
install_wheels "$content/wheels"
# The demo model comes from here.
export PIP_NO_INDEX=1 PIP_FIND_LINKS=$content/model

# 2. Programs for the Makefile, which then installs nothing. Each notes its time, and its messages have a file of their own.
export METHOD_TIMES=$work/times.tsv METHOD_LOGS=$work/logs METHOD_PYTHON=$python
programs=$work/venv/bin
mkdir -p "$programs" "$METHOD_LOGS"
printf '#!/bin/sh\nexec bash %q -m saro "$@"\n' "$PWD/benchmarks/gpu/timed.sh" > "$programs/saro"
chmod +x "$programs/saro"
touch "$work/venv/.torch" "$work/venv/.demo"

# 3. Run. What is stopped writes a checkpoint first.
defaults="--train.save_every 0 --train.samples 0 --data.pack_tokens 8192"
variables=(
    VENV="$work/venv" LAUNCH="bash benchmarks/gpu/timed.sh" OUTPUT="$work/output" DATA="$content"
    RW="$defaults ${RW:-}" SRPO="$defaults ${SRPO:-}"
    SYNTH="--load.batch 512 ${SYNTH:-}" EVALUATE="--load.batch 512 ${EVALUATE:-}"
    "$@"
)
output=$work/output
for variable in "$@"; do
    if [[ $variable == OUTPUT=* ]]; then output=${variable#OUTPUT=}; fi
done
unset RW SRPO SYNTH EVALUATE
export NO_PROGRESS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
run() {
    local left=$((${TOTAL:-500} - SECONDS + begin))
    if ((left < 1)); then return 124; fi
    timeout "$left" make --keep-going --jobs="${JOBS:-6}" "$1" "${variables[@]}" >> "$work/make.log" 2>&1
}
nvidia-smi --query-gpu=name,utilization.gpu,memory.used --format=csv,noheader -l 2 > "$work/gpu.csv" 2> /dev/null &
watch=$!
# Made now, it is there when the first stage needs it; a stage that comes earlier waits for it.
"$python" -c 'from saro.demo import demo_model; demo_model()' 2> "$METHOD_LOGS/demo_model.log" &
code=0
run ablation || code=$?
if [[ $code != 124 ]]; then run saro || code=$?; fi
flock --wait 25 "$METHOD_LOGS/running.lock" true || echo 'method.sh: a stage was still running 25 s after its time ended'
kill "$watch" 2> /dev/null || true

# 4. Bring home.
"$python" benchmarks/gpu/method_results.py --run "$output/saro" --work "$work" --out "${OUT:-$work/out}"
tail -n 5 "$work/make.log"
echo "method.sh: exit code $code after $((SECONDS - begin)) s; the same command goes on where it was stopped"
exit "$code"
