#!/usr/bin/env bash
# Measure this project on a GPU, in one call of at most TOTAL seconds (default 480). Run it in the root of the repository.
#   bash benchmarks/gpu/run.sh                  all steps
#   bash benchmarks/gpu/run.sh probe srpo       only these
#   DRY=1 bash benchmarks/gpu/run.sh            all steps on tiny sizes, on a CPU
# Packages in .whl (see prepare.sh) are installed beside those of PYTHON, into SITE. Results go to OUT.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
work=${WORK:-${TMPDIR:-/tmp}/saro-gpu}
site=${SITE:-$work/site}
mkdir -p "$work/src"
if [[ -d .whl && ! -d $site && ${DRY:-0} != 1 ]]; then
    rm -rf "$site.part"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site.part" .whl/*.whl
    mv "$site.part" "$site"
    "$python" -m compileall -q -j 0 "$site" > "$work/compileall.log" 2>&1 &
fi
# The root itself must stay off the path: its folder kernels/ would pose as the package of that name.
ln -sfn "$PWD/saro" "$work/src/saro"
ln -sfn "$PWD/kernels/saro_kernels" "$work/src/saro_kernels"
export PYTHONPATH=$site:$work/src:$PWD/benchmarks:$PWD/benchmarks/gpu PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
export SARO_CACHE=$work/cache HF_DATASETS_CACHE=$work/datasets TRITON_CACHE_DIR=$work/triton
exec "$python" benchmarks/gpu/gpu_suite.py --work "$work" --out "${OUT:-$work/out}" --total "${TOTAL:-480}" "$@"
