#!/usr/bin/env bash
# Everything that only a GPU can show, one command on a machine with nothing built yet:
#
#     bash benchmarks/gpu_proof.sh                  the parts below, the most telling first
#     bash benchmarks/gpu_proof.sh training         one of them: build, environment, tests,
#                                                   tuning, throughput, training, layers, networks,
#                                                   sanitizer, pages
#     bash benchmarks/gpu_proof.sh cuda             the CUDA kernels alone, build included
#     bash benchmarks/gpu_proof.sh every            all five networks, dtypes and batch sizes too
#     bash benchmarks/gpu_proof.sh inference-resnet34-float16-1,8,512      one part of `every`
#
# Parts stand alone (after `build`), and none takes more than 8 minutes: a command that would is
# stopped, and what it wrote until then stays. Results go to benchmarks/results/<gpu>/, the choices
# of kernels that tuning made among them; `pages` renders all into docs/results.md.
# Works offline where torch, triton, cmake, ninja, pybind11, pytest and pytest-xdist are installed.
set -uo pipefail
cd "$(dirname "$0")/.."

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z_')
: "${gpu:?no NVIDIA GPU found by nvidia-smi}"
results=benchmarks/results/${gpu#nvidia_}
mkdir -p "$results"
export PYTHONUNBUFFERED=1
export RESNET_FUSED_CACHE_DIR=$PWD/$results/tuning
failed=()

run() { # name, seconds, command...: runs it against the clock, its output kept beside the results
  local name=$1 seconds=$2
  shift 2
  echo "== $name: $*"
  timeout -k 15 "$seconds" "$@" 2>&1 | tee "$results/$name.log" || failed+=("$name")
}

# With the simulator, which the tests hold against the hardware, primitive by primitive.
build() {
  run build "${1:-450}" env RESNET_FUSED_CUDA=on RESNET_FUSED_HOST_SIM=on \
    pip install --no-build-isolation --no-deps .
}

environment() {
  run environment 60 python -m resnet_fused.env
}

# Kernels compile in every test process; measuring them is the benchmarks' business.
gpu_tests() { # name, seconds, what to leave out or to take
  local name=$1 seconds=$2
  shift 2
  run "$name" "$seconds" env RESNET_FUSED_TUNE=off pytest -q -m gpu -n "$(nproc)" "$@"
}

tests() {
  gpu_tests tests 450 tests --ignore-glob='*test_training*' --ignore=tests/test_gpu.py
}

# Full-size images, a thousand runs, two streams, tensors past 2^31 elements: in one process, which
# then has the memory to itself.
networks() {
  run networks 460 env RESNET_FUSED_TUNE=off pytest -q -m gpu tests/test_gpu.py
}

# The cache keeps what a stopped run has measured.
tuning() {
  run tuning 450 python -m resnet_fused.tune --batch 256 32 1
}

throughput() {
  run throughput 460 python benchmarks/throughput.py --device cuda --dtype bfloat16 --new-batch \
    --batch 256 1 32 --json "$results/throughput.json" --plot "$results/throughput.png"
}

inference() { # network, dtype, batch sizes with commas between; without what compiles for minutes
  local name=inference_$1_$2_${3//,/_}
  run "$name" 460 python benchmarks/throughput.py --device cuda --arch "$1" --dtype "$2" --quick \
    --rounds 5 --batch ${3//,/ } --json "$results/$name.json" --plot "$results/$name.png"
}

every() {
  local network dtype batches
  for batches in 256,1 64,8 512,128,32; do
    for dtype in bfloat16 float16; do
      for network in resnet50 resnet18 resnet101 resnet34 resnet152; do
        inference "$network" "$dtype" "$batches"
      done
    done
  done
}

# What the CUDA kernels have to show, build included, in less than 8 minutes together.
cuda() {
  build 150
  gpu_tests cuda_tests 90 tests/test_cuda_*.py tests/test_host_sim.py
  run layers_256 90 env RESNET_FUSED_TUNE=off \
    python benchmarks/layers.py --batch 256 --json "$results/layers_256.json"
  sanitizer 45
}

pages() {
  run pages 60 python benchmarks/render.py
}

layers() {
  run layers 300 python benchmarks/layers.py --batch 256 --json "$results/layers_256.json"
  run layers_1 150 python benchmarks/layers.py --batch 1 --json "$results/layers_1.json"
}

training() {
  gpu_tests training_tests 110 tests/test_training*.py
  run training 230 env RESNET_FUSED_TUNE=off python benchmarks/training.py --seconds 1 \
    --model resnet50 resnet18 --batch 256 128 64 \
    --json "$results/training.json" --plot "$results/training.png"
  # Measuring tiles compiles each of them; the cache keeps what a stopped run has measured.
  run training_tuned 110 python benchmarks/training.py --seconds 1 --only resnet_fused \
    --batch 256 --json "$results/training_tuned.json"
}

sanitizer() {
  local seconds=${1:-150} tool
  for tool in memcheck racecheck initcheck; do
    run "sanitizer_$tool" "$seconds" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      python "$(command -v pytest)" -q -m gpu -x tests/test_cuda_kernel.py tests/test_cuda_conv.py
  done
}

usual=(build environment tests tuning throughput training layers networks sanitizer pages)
for part in "${@:-${usual[@]}}"; do
  case $part in
    inference-*-*-*) IFS=- read -r part network dtype batches <<<"$part" &&
      "$part" "$network" "$dtype" "$batches" ;;
    *) "$part" ;;
  esac
done
if ((${#failed[@]})); then
  echo "failed or out of time: ${failed[*]}; see $results/*.log" >&2
  exit 1
fi
echo "results are in $results"
