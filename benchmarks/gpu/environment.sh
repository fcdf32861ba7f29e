# The environment of this project on a GPU machine without a network. run.sh and method.sh read it in the root of the repository.
#   PYTHON   the interpreter that has torch
#   WORK     folder for all that is made
#   SITE     folder of the packages that PYTHON lacks
python=${PYTHON:-python3}
work=${WORK:-${TMPDIR:-/tmp}/saro-gpu}
site=${SITE:-$work/site}
mkdir -p "$work/src"
# The root itself must stay off the path: its folder kernels/ would pose as the package of that name.
ln -sfn "$PWD/saro" "$work/src/saro"
ln -sfn "$PWD/kernels/saro_kernels" "$work/src/saro_kernels"
export PYTHONPATH=$site:$work/src:$PWD/benchmarks:$PWD/benchmarks/gpu PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
export SARO_CACHE=$work/cache HF_DATASETS_CACHE=$work/datasets TRITON_CACHE_DIR=$work/triton

# Install the wheels of a folder into SITE, beside the packages of PYTHON. A call that was killed leaves no SITE.
install_wheels() {
    if [[ -d $site ]] || ! compgen -G "$1/*.whl" > /dev/null; then return; fi
    rm -rf "$site.part"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site.part" "$1"/*.whl
    mv "$site.part" "$site"
    "$python" -m compileall -q -j 0 "$site" > "$work/compileall.log" 2>&1 &
}
