#!/usr/bin/env bash
# Measure this project on a GPU, in one call of at most TOTAL seconds (default 480). Run it in the root of the repository.
#   bash benchmarks/gpu/run.sh                  all steps
#   bash benchmarks/gpu/run.sh probe srpo       only these
#   DRY=1 bash benchmarks/gpu/run.sh            all steps on tiny sizes, on a CPU
# Packages in .whl (see prepare.sh) are installed beside those of PYTHON, into SITE. Results go to OUT.
set -euo pipefail
cd "$(dirname "$0")/../.."
. benchmarks/gpu/environment.sh
if [[ ${DRY:-0} != 1 ]]; then install_wheels .whl; fi
exec "$python" benchmarks/gpu/gpu_suite.py --work "$work" --out "${OUT:-$work/out}" --total "${TOTAL:-480}" "$@"
