#!/usr/bin/env bash
# Everything that only a GPU can show, one command on a machine with nothing built yet:
#
#     bash benchmarks/gpu_proof.sh                  all parts, the most telling first
#     bash benchmarks/gpu_proof.sh build tests      some of them
#
# Parts stand alone (after `build`) and each command in them is stopped after 8 minutes; what it
# wrote until then stays. Results go to benchmarks/results/<gpu>/.
# Works offline where torch, triton, cmake, ninja, pybind11 and pytest are installed.
set -uo pipefail
cd "$(dirname "$0")/.."

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z_')
results=benchmarks/results/${gpu:?no NVIDIA GPU found by nvidia-smi}
mkdir -p "$results"
export PYTHONUNBUFFERED=1
failed=()

part() { # name, command...: runs it against the clock, its output kept beside the results
  local name=$1
  shift
  echo "== $name: $*"
  timeout 8m "$@" 2>&1 | tee "$results/$name.log" || failed+=("$name")
}

build() {
  part build env RESNET_FUSED_CUDA=on pip install --no-build-isolation --no-deps .
  part environment python -m resnet_fused.env
}

tests() {
  part tests pytest -q -m gpu tests
}

throughput() {
  part throughput python benchmarks/throughput.py --device cuda --dtype bfloat16 \
    --batch 1 32 256 --json "$results/throughput.json" --plot "$results/throughput.png"
}

layers() {
  part layers python benchmarks/layers.py --batch 256 --json "$results/layers_256.json"
  part layers_1 python benchmarks/layers.py --batch 1 --json "$results/layers_1.json"
}

training() {
  part training python benchmarks/training.py --model resnet50 resnet18 --batch 64 256 \
    --seconds 1 --json "$results/training.json" --plot "$results/training.png"
}

sanitizer() {
  local tool
  for tool in memcheck racecheck initcheck; do
    part "sanitizer_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      python "$(command -v pytest)" -q -m gpu -x tests/test_cuda_kernel.py tests/test_cuda_conv.py
  done
}

for name in "${@:-build tests throughput layers training sanitizer}"; do
  for one in $name; do "$one"; done
done
if ((${#failed[@]})); then
  echo "failed or out of time: ${failed[*]}; see $results/*.log" >&2
  exit 1
fi
echo "results are in $results"
