#!/usr/bin/env bash
# Everything that needs a GPU, unattended and in nine minutes, what matters most first:
#
#     benchmarks/gpu_check.sh [--dry-run] OUTDIR
#
# Builds in place for the first GPU, asks it what the PTX wrappers do, forces every kernel, runs the tests, the benchmark,
# compute-sanitizer and ncu with $PYTHON (python3). That must have torch, setuptools, ninja, pybind11, pytest, hypothesis
# and matplotlib, beside a CUDA toolkit; rich and tqdm (the dependency group 'bench') make the benchmark's tables. It
# installs nothing, needs no network, and works on a copy without .git: RNN_EXT_COMMIT, or a file COMMIT in the root,
# then names the commit.
#
# Writes to OUTDIR, each as soon as there is something: log.txt, summary.txt, golden.txt, bench.json, sequence.json,
# compile.json, PNGs. A part that fails does not stop the others. A part may use its own time and what those before it
# left, so that all end in time. Exit status: how many parts failed; a tool that is not installed is MISSING and no
# failure. --dry-run runs nothing, and prints and logs the plan: when a part ends at the latest, and its command.
set -u

dry_run=false
if [ "${1:-}" = --dry-run ]; then
  dry_run=true
  shift
fi
if [ $# -ne 1 ]; then
  echo "usage: $0 [--dry-run] OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
if [ -f COMMIT ]; then
  export RNN_EXT_COMMIT="${RNN_EXT_COMMIT:-$(cat COMMIT)}"
fi
export PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
for folder in "${CUDA_HOME:-/usr/local/cuda}/bin" /opt/nvidia/nsight-compute/*; do
  PATH=$PATH:$folder
done
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$out/log.txt
summary=$out/summary.txt
: >"$log"
: >"$summary"
failures=0
deadline=0 # seconds from the start until which the parts so far may run

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# part NAME SECONDS COMMAND...: runs the command, and notes how it went and the last line that it wrote. The time's end
# comes as an interrupt, on which pytest and the benchmarks still write what they have.
part() {
  local name=$1 limit=$2 start=$SECONDS status verdict written command
  shift 2
  command=$(printf '%q ' "$@")
  command=${command//\\,/,}
  deadline=$((deadline + limit))
  printf '\n==== %s (%s s, until %s s): %s\n' "$name" "$limit" "$deadline" "$command" >>"$log"
  if $dry_run; then
    say "$(printf '%-16s %3d s, until %3d s: %s' "$name" "$limit" "$deadline" "$command")"
    return
  fi
  written=$(stat -c %s "$log")
  timeout --signal=INT --kill-after=5 $((deadline - SECONDS > 10 ? deadline - SECONDS - 5 : 5)) "$@" \
    >>"$log" 2>&1 </dev/null
  status=$?
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="TIME OUT" ;;
    *) verdict=FAILED ;;
  esac
  if [ $status -ne 0 ]; then
    failures=$((failures + 1))
  fi
  say "$(printf '%-16s %-8s %3d s  %.90s' "$name" "$verdict" $((SECONDS - start)) \
    "$(tail -c +$((written + 1)) "$log" | tr -d '\r' | grep -v '^ *$' | tail -n 1)")"
}

# part_of TOOL NAME SECONDS COMMAND...: a part that is left out where the tool is not installed.
part_of() {
  local tool=$1
  shift
  if $dry_run || command -v "$tool" >/dev/null; then
    part "$@"
  else
    deadline=$((deadline + $2))
    say "$(printf '%-16s %-8s        %s is not installed' "$1" MISSING "$tool")"
  fi
}

what_was_built() {
  local found
  found=$("$PYTHON" -m rnn_ext)
  printf '%s\n' "$found"
  if [[ $found != *" built for ${TORCH_CUDA_ARCH_LIST:-a GPU} with "* ]]; then
    echo "not for ${TORCH_CUDA_ARCH_LIST:-a GPU that nvidia-smi names}: $(grep CUDA <<<"$found")"
    return 1
  fi
}
export -f what_was_built

# Whatever the image presets: 9.0 would leave wgmma out.
arch=$(timeout 10 nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>>"$log" | head -n 1)
if [ "$arch" = 9.0 ]; then
  arch=9.0a
fi
if [ -n "$arch" ]; then
  export TORCH_CUDA_ARCH_LIST=$arch
fi
say "TORCH_CUDA_ARCH_LIST=$arch"

bench=("$PYTHON" benchmarks/bench.py --device cuda)
isolated=("$PYTHON" tests/isolated.py -q -m cuda)
flagship=(4096,4096,4096 1024,4096,4096 1024,1024,1024 64,1024,1024 16,256,256 1,256,256)
others=(10,4,5 33,77,130) # the largest last, in case time runs out
for H in 256 1024 4096; do
  for B in 1 16 64 256 1024 4096; do
    case " ${flagship[*]} " in
      *" $B,$H,$H "*) ;;
      *) others+=("$B,$H,$H") ;;
    esac
  done
done
# A process per kernel; bf16 and tf32 reach every family of kernels, and what is new in one is new in the other dtypes.
forced=(tests/cell/test_forced_kernels.py -s)
sanitized=("${isolated[@]}" --workers 4 --limit 60 "${forced[@]}" -k "bfloat16 or tf32")
sanitizer="compute-sanitizer --error-exitcode 9 --kernel-regex kns=rnn_ext"
main_tests=(tests/cell/test_cuda.py tests/cell/test_numerics.py tests/cell/test_gradients.py tests/sequence)
sequences=(50,16,1760,1760 50,64,2048,2048 100,64,512,512 100,64,512,512:packed 1024,16,768,768 1024,1,256,256)

part "machine" 10 nvidia-smi
part "build" 105 "$PYTHON" setup.py build_ext --inplace --force
part "what was built" 15 bash -c what_was_built
part "golden vectors" 25 bash tests/cuda_host/golden.sh "$out/golden.txt"
part "every kernel" 70 "${isolated[@]}" --each --workers 8 --limit 20 "${forced[@]}"
part "tests" 80 "${isolated[@]}" --workers 6 --limit 30 "${main_tests[@]}"
part "benchmark" 70 "${bench[@]}" --rounds 9 --sample-ms 2 --output "$out" --dtypes bfloat16 float32 --compile-shapes \
  --shapes "${flagship[@]}" "${others[@]}"
part "kernels" 30 "$PYTHON" benchmarks/compare_kernels.py --rounds 3 --shapes "${flagship[@]}" "${sequences[@]}"
part "sequences" 20 "${bench[@]}" --layer sequence --rounds 3 --sample-ms 2 --output "$out" --dtypes bfloat16 float16 \
  --passes forward forward_backward --peers rnn nn_cells --shapes "${sequences[@]}"
# Under the sanitizer each tensor gets an allocation of its own, so that what leaves a tensor is seen.
part_of compute-sanitizer "memcheck" 25 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  "${sanitized[@]}" --under "$sanitizer --tool memcheck"
part_of compute-sanitizer "racecheck" 25 "${sanitized[@]}" --under "$sanitizer --tool racecheck"
part_of ncu "ncu" 20 ncu --clock-control none --kernel-name-base demangled --kernel-name regex:rnn_ext --launch-count 8 \
  --section SpeedOfLight --section LaunchStats --section Occupancy "${bench[@]}" --check-only --peers rnn_ext \
  --passes forward_backward --dtypes bfloat16 float32 --shapes "${flagship[@]:0:2}" --output "$scratch/ncu"
part "torch.compile" 20 "${bench[@]}" --shapes 64,1024,1024 --dtypes bfloat16 --passes forward forward_backward \
  --peers rnn_cell compile reduce-overhead max-autotune --output "$scratch"
if [ -f "$scratch/bench.json" ]; then
  cp "$scratch/bench.json" "$out/compile.json"
fi
part "other tests" 25 "${isolated[@]}" --workers 8 --limit 30 tests/pytorch tests/cell/test_errors.py

for file in bench compile; do
  if [ -f "$out/$file.json" ]; then
    say ""
    say "$file.json, times as long as rnn_ext:"
    "$PYTHON" benchmarks/report.py --summary "$out/$file.json" 2>>"$log" | tee -a "$summary"
  fi
done
say ""
if $dry_run; then
  say "$deadline s at most"
else
  say "parts that failed: $failures; $SECONDS s; logs and results in $out"
fi
exit $failures
