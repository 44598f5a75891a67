# Everyday commands. They use the active environment; `make develop` fills it.
.PHONY: develop test oldest sanitize lint format bench layers matrix predict gpu-proof env clean

develop:  ## editable install, with the extension and the simulator of CUDA kernels in the tree
	RESNET_FUSED_HOST_SIM=on pip install -e '.[bench,test]'

test:  ## what CI runs after lint
	pytest -n 2

TORCH ?= $(shell sed -n 's/.*"torch>=\(.*\)",/\1/p' pyproject.toml)
VERSIONED = $(patsubst %,tests/test_%.py, op_registration models plans quantization selfcheck layers \
  training training_choice training_models training_programs training_compile \
  triton_backend triton_compile triton_launch)
oldest:  ## what depends on PyTorch and Triton, with the oldest of both; TORCH=2.11 takes another
	python3 -m venv --clear build/oldest
	RESNET_FUSED_CUDA=off build/oldest/bin/pip install -q '.[bench,test]' 'torch==$(TORCH).*' 'numpy<2.4'
	build/oldest/bin/pytest -n 2 $(VERSIONED)

SANITIZED = $(patsubst %,tests/test_cpu_%.py, kernels grouped shapes training gradients)
sanitize:  ## the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
	CXXFLAGS="-fsanitize=address,undefined -fno-omit-frame-pointer" RESNET_FUSED_CUDA=off \
	  python setup.py -q build --build-base build/sanitized --build-lib build/sanitized/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=build/sanitized/lib pytest -p no:cacheprovider $(SANITIZED)

lint:
	ruff check .
	ruff format --check .
	mypy
	git ls-files 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.h' 'csrc/*.cuh' 'benchmarks/*.cu' | xargs clang-format --dry-run -Werror

format:
	ruff check --fix .
	ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.h' 'csrc/*.cuh' 'benchmarks/*.cu' | xargs clang-format -i

bench:  ## ours beside every peer that is installed
	python benchmarks/throughput.py

layers:  ## each fused op of ResNet-50 by itself
	python benchmarks/layers.py

matrix:  ## every Python with every torch; PYTHONS="PROGRAM ..." where they are not on PATH
	python benchmarks/matrix.py $(if $(PYTHONS),--python $(PYTHONS))
	python benchmarks/render.py

predict:  ## a model of time from compiled code, no GPU: result files, plots and docs/predicted.md
	cd benchmarks/results/predicted && for gpu in h100 h200; do \
	  for batch in 1 32; do \
	    python ../../predict.py --gpu $$gpu --batch $$batch --json $${gpu}_inference_$$batch.json || exit; \
	  done; \
	  python ../../predict.py --gpu $$gpu --json $${gpu}_inference_256.json --plot $${gpu}_inference_256.png && \
	  python ../../predict.py --gpu $$gpu --dtype int8 --json $${gpu}_int8_256.json && \
	  python ../../predict.py --gpu $$gpu --training --backend triton --json $${gpu}_training_triton_256.json && \
	  python ../../predict.py --gpu $$gpu --training --json $${gpu}_training_256.json --plot $${gpu}_training_256.png || exit; \
	done
	python benchmarks/render.py

CALL ?= first
gpu-proof:  ## what only a GPU can show; CALL=first (9 minutes), training, tuning or checks
	python benchmarks/gpu_proof.py $(CALL) --out build/gpu_proof

env:  ## compiler, architectures, backends, versions
	python -m resnet_fused.env

clean:
	rm -rf build dist *.egg-info resnet_fused/_C*.so .pytest_cache .ruff_cache .mypy_cache
