#!/usr/bin/env bash
# Every table of speed on one machine with two GPUs, about 170 s: batch 1 and then loading on GPU 0, batch 4 and then
# kernels on GPU 1, side by side. Logs go to $OUT (default speed-logs); the rows of the tables are printed at the end.
#
#   [OUT=folder] bash benchmarks/speed_on_two_gpus.sh
#
# Needs 40 GB in /dev/shm or in the folder for temporary files, and 12 GB of memory on each GPU for full checkpointing,
# 24 GB for what keeps activations.
set -uo pipefail
OUT=${OUT:-speed-logs}
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
mkdir -p "$OUT"
folder=$(python3 -c "import tempfile; print(tempfile.gettempdir())")
[ "$(df --output=avail -BG /dev/shm | tail -1 | tr -dc 0-9)" -ge 40 ] && folder=/dev/shm
train="python3 benchmarks/training_speed.py --shape llama-8b --folder $folder"

first_gpu() {
  export CUDA_VISIBLE_DEVICES=0
  timeout 140 $train --batch 1 --variants stock compiled none eager --profile > "$OUT/batch1.log" 2>&1
  timeout 75 python3 benchmarks/loading_speed.py --shape llama-8b --folder "$folder" --repeats 1 > "$OUT/loading.log" 2>&1
}

second_gpu() {
  export CUDA_VISIBLE_DEVICES=1
  timeout 60 python3 -m pytest -q -m gpu tests/test_four_bit_kernel.py -k "nested and 64 or again" > "$OUT/bits.log" 2>&1
  timeout 135 $train --batch 4 --variants stock compiled some eager --checkpoint-layers 18 --steps 4 > "$OUT/batch4.log" 2>&1
  timeout 25 python3 benchmarks/kernel_speed.py --tokens 2048 > "$OUT/kernel.log" 2>&1
}

first_gpu &
second_gpu &
wait
for name in bits batch1 batch4 loading kernel; do
  echo "== $name"
  grep -aE '^\||GPU busy|^ +[0-9.]+ ms|identical|Error|LOSSES|LEARNED|written|passed|failed|^[0-9] x' "$OUT/$name.log" |
    cut -c1-230 | tail -60
done
