#!/usr/bin/env bash
# Compiles golden.cu, runs it on a GPU, and writes to FILE what the wrappers' PTX does there:
#
#     tests/cuda_host/golden.sh FILE [ARCH]
#
# ARCH is that of the first GPU, unless given. $PYTHON (python3), which must have torch, finds the toolkit. Committed as
# tests/cuda_host/golden/<gpu>.txt, the file is what the tests hold the wrappers' host bodies against. Each wrapper has a
# process of its own for at most 5 seconds. One that fails is a comment in FILE, which keeps the others' lines, also if
# this is interrupted; the exit status is then 1.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: $0 FILE [ARCH]" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
if [ $# -eq 2 ]; then
  arch=$2
else
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
  arch=sm_${capability/./}
  if [ "$arch" = sm_90 ]; then
    arch=sm_90a # which has wgmma; -arch=native would not
  fi
fi
nvcc=$(cd "$here/.." && "${PYTHON:-python3}" -c 'from cuda_host import cubin; print(cubin.nvcc() or "nvcc")')
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$nvcc" -std=c++17 -O3 -DNDEBUG -gencode "arch=compute_${arch#sm_},code=$arch" -I "$here/../../csrc" \
  "$here/tests/golden.cu" -o "$scratch/golden"
names=$("$scratch/golden")
echo "# $arch, $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)" >"$1"

# record FILE WRAPPER: the wrapper's line is on disk as soon as there is one.
record() {
  local line=$scratch/$2.line error=$scratch/$2.error status=0
  timeout --signal=KILL 5 "$scratch/golden" "$2" >"$line" 2>"$error" || status=$?
  if [ "$status" -eq 137 ]; then
    echo "killed after 5 s" >>"$error"
  fi
  if [ "$status" -ne 0 ]; then
    echo "# FAILED $2, status $status: $(tr '\n' ' ' <"$error")" | tee "$line" >&2
  fi
  cat "$line" >>"$1"
}

for name in $names; do
  record "$1" "$name" &
  while [ "$(jobs -rp | wc -l)" -ge 8 ]; do # to make a context takes longer than a wrapper
    wait -n
  done
done
wait
LC_ALL=C sort -o "$1" "$1"
! grep -q '^# FAILED' "$1"
