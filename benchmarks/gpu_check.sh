#!/usr/bin/env bash
# Everything that needs a GPU, unattended and in under nine minutes:
#
#     benchmarks/gpu_check.sh [--dry-run] OUTDIR
#
# Builds in place for the GPU at hand, runs the tests, compute-sanitizer, ncu and the benchmarks with $PYTHON (python3),
# which must have torch, a CUDA toolkit, and what `pip install '.[test]'` brings. It installs nothing, needs no network,
# and works on a copy without .git: RNN_EXT_COMMIT, or a file COMMIT in the root, then names the commit.
#
# Writes to OUTDIR: log.txt, summary.txt, bench.json, compile.json, three PNGs, golden.txt. A part that fails or takes too
# long does not stop the others. Exit status: the number of parts that did not pass. --dry-run runs nothing, and prints
# and logs what would be run.
set -u

TOTAL=520 # seconds for all parts together

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
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$out/log.txt
summary=$out/summary.txt
: >"$log"
: >"$summary"
failures=0

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# part NAME SECONDS COMMAND...: runs the command for at most that long, and notes how it went. The time's end comes as an
# interrupt, on which pytest and the benchmarks still write what they have.
part() {
  local name=$1 limit=$2 start=$SECONDS status verdict
  shift 2
  printf '\n==== %s (at most %s s): %s\n' "$name" "$limit" "$*" >>"$log"
  if $dry_run; then
    say "$(printf '%-22s would run for at most %3d s: %s' "$name" "$limit" "$*")"
    return
  fi
  if [ $((TOTAL - SECONDS)) -lt "$limit" ]; then
    limit=$((TOTAL - SECONDS))
  fi
  if [ "$limit" -lt 5 ]; then
    say "$(printf '%-22s FAILED   no time left' "$name")"
    failures=$((failures + 1))
    return
  fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1 </dev/null
  status=$?
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="TIME OUT" ;;
    127) verdict=MISSING ;;
    *) verdict="FAILED" ;;
  esac
  if [ $status -ne 0 ]; then
    failures=$((failures + 1))
  fi
  say "$(printf '%-22s %-8s %4d s  (status %d)' "$name" "$verdict" $((SECONDS - start)) $status)"
}

bench=("$PYTHON" benchmarks/bench_cell.py --device cuda)
# A short list for the tools that slow a kernel down a hundredfold: one row, ragged tiles, more than one tile.
short=("${bench[@]}" --check-only --peers rnn_ext --shapes 1,64,64 10,4,5 33,77,130 130,64,96 --dtypes float32 bfloat16
  --passes forward_backward --nonlinearities tanh --output "$scratch/short")
shapes=(10,4,5 33,77,130)
for H in 256 1024 4096; do # the largest last, in case time runs out
  for B in 1 16 64 256 1024 4096; do shapes+=("$B,$H,$H"); done
done

part "machine" 20 nvidia-smi
part "build" 150 "$PYTHON" setup.py build_ext --inplace
part "what was built" 30 "$PYTHON" -m rnn_ext
part "cuda tests" 110 "$PYTHON" -m pytest -q -n 4 -m cuda
part "benchmarks" 160 "${bench[@]}" --shapes "${shapes[@]}" --compile-shapes --rounds 9 --sample-ms 2 --output "$out"
# Under the sanitizer each tensor gets an allocation of its own, so that what leaves a tensor is seen.
part "memcheck" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --error-exitcode 9 --kernel-regex kns=rnn_ext "${short[@]}"
part "racecheck" 50 compute-sanitizer --tool racecheck --error-exitcode 9 --kernel-regex kns=rnn_ext "${short[@]}"
if [ -e tests/cuda_host/golden.sh ]; then
  part "golden vectors" 30 bash tests/cuda_host/golden.sh "$out/golden.txt"
fi
part "torch.compile" 90 "${bench[@]}" --shapes 64,1024,1024 --dtypes bfloat16 --passes forward forward_backward \
  --peers rnn_cell compile reduce-overhead max-autotune --output "$scratch/compile"
part "other tests" 110 "$PYTHON" -m pytest -q -n auto -m "not cuda"
part "kernels" 60 "$PYTHON" benchmarks/compare_kernels.py
part "ncu" 40 ncu --clock-control none --kernel-name-base demangled --kernel-name regex:rnn_ext --launch-count 8 \
  --section SpeedOfLight --section LaunchStats --section Occupancy "${short[@]}"

if [ -f "$scratch/compile/bench.json" ]; then
  cp "$scratch/compile/bench.json" "$out/compile.json"
fi
for file in bench compile; do
  if [ -f "$out/$file.json" ]; then
    say ""
    say "$file.json, times as long as rnn_ext:"
    "$PYTHON" benchmarks/report.py --summary "$out/$file.json" 2>>"$log" | tee -a "$summary"
  fi
done
say ""
say "parts that did not pass: $failures; $SECONDS s; logs and results in $out"
exit $failures
