#!/usr/bin/env bash
# Makes the runs that the notebooks read, in a few minutes on two cores: notebooks/runs.sh FOLDER
# FOLDER has then a folder for each notebook that reads runs, and provenance.json: commit, machine, commands, seconds.
# notebooks/data was made by it, and so is what `make notebooks` executes the notebooks on.
set -euo pipefail

[ $# = 1 ] || { echo "usage: notebooks/runs.sh FOLDER" >&2; exit 2; }
if [ -e "$1" ] && [ -n "$(ls -A "$1")" ]; then
    echo "notebooks/runs.sh: $1 is not empty, and runs of two days do not belong together; name a new folder" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(realpath --relative-to="$(dirname "$0")/.." "$1") # a report keeps the command: no path of this machine in it
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

# run PLACE COMMAND..: prints what a user would type, and the command's own output only if it fails.
run() {
    local place=$1 started=$EPOCHREALTIME seconds status=0
    shift
    mkdir -p "$folder/$place"
    echo "$*"
    "$@" > "$folder/$place/output.txt" 2>&1 || status=$?
    seconds=$(python -c "print(f'{$EPOCHREALTIME - $started:.1f}')")
    if [ "$status" != 0 ]; then
        tail -n 40 "$folder/$place/output.txt" >&2
        echo "notebooks/runs.sh: exit status $status after $seconds s: $*" >&2
        exit 1
    fi
    echo "    $seconds s, $folder/$place"
    printf '%s\t%s\t%s\n' "$place" "$seconds" "$*" >> "$folder/commands.tsv"
}
infer() { run "$1" python infer.py "${@:2}" hydra.run.dir="$folder/$1"; }
train() { run "$1" python train.py "${@:2}" hydra.run.dir="$folder/$1"; }
sweep() { run "$2" python "$1.py" -m "${@:3}" hydra.sweep.dir="$folder/$2"; }

# 03: the papers' grid and baseline, 16 ranks, and plain replicas beside them
infer 03/dense parallel=helix_4x4 model=dense model.layers=2 'baseline=[tp8_pp2,dp16]'
infer 03/moe parallel=helix_4x4 model=moe model.layers=2 'baseline=[tp8_pp2]'

# 04: m x n with 4 KV heads, for many samples at once and for one
sweep infer 04 parallel=helix parallel.m=1,2,4 parallel.n=1,2,4,8 model=tiny model.kv_heads=4 \
    workload.batch_size=16,1 workload.runs=3

# 06: SmolLM2 has 3 KV heads: as many ranks, and one more; as many tokens as in the runs on 12 and 16 that paper/results keeps
infer 06/3_ranks model=smollm2 parallel=helix_1x3 'baseline=[hf_tp3]' 'prompt=The capital of France is' \
    generate.max_new_tokens=8
infer 06/4_ranks model=smollm2 parallel=helix_4x1 'baseline=[hf_tp4]' 'prompt=The capital of France is' \
    generate.max_new_tokens=8

# 07: one model, one seed, the same data: on one device, cut in two ways, and with the papers' formula
short=(trainer.max_steps=20 trainer.validate_every_n_steps=10 data.batch_size=8 data.seq_len=32 data.validation_batches=2)
sweep train 07/exact parallel=single,helix_2x2,helix_4x1 "${short[@]}"
train 07/perslice parallel=helix_2x2 parallel.schedule=perslice "${short[@]}"

# Kept: reports, tables, the W&B runs. Pictures are the notebooks' own, and the rest repeats what these hold.
find "$folder" ! -type d ! -name '*report.json' ! -name '*.csv' ! -name '*.wandb' ! -name commands.tsv -delete
find "$folder" -type d -empty -delete
PYTHONPATH=. python notebooks/provenance.py "$folder"
