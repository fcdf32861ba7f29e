#!/usr/bin/env bash
# Fetch into .whl what a GPU machine without a network lacks beside torch (about 22 MiB). Run it where a network is.
#   bash benchmarks/gpu/prepare.sh
# The versions are those of constraints.txt. PYTHON_VERSION is that of the GPU machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
packages=(transformers peft bitsandbytes jsonargparse docstring_parser typeshed_client rich filelock gguf liger-kernel trl
    datasets dill multiprocess httpx2 httpcore2 truststore)
rm -rf .whl
mkdir .whl
wanted=(cut-cross-entropy==25.1.1)
for package in "${packages[@]}"; do
    pinned=$(grep -i "^$package==" constraints.txt) || { echo "constraints.txt has no $package" >&2; exit 1; }
    wanted+=("$pinned")
done
platforms=(manylinux_2_{17,24,27,28}_x86_64 manylinux2014_x86_64 manylinux1_x86_64)
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
    --implementation cp "${platforms[@]/#/--platform=}" --dest .whl "${wanted[@]}"
mkdir .whl/slim
"$python" benchmarks/gpu/slim_wheel.py .whl/bitsandbytes-*.whl .whl/slim
mv .whl/slim/*.whl .whl/
rmdir .whl/slim
du -sh .whl
