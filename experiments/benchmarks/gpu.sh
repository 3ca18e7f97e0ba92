#!/usr/bin/env bash
# What one NVIDIA GPU does: a step of the demo, a published model against transformers on the same
# card, and a run on real text. At most ten minutes on an H100-class card.
#
#     pip install -e '.[cuda,bench,hf,gguf]'
#     experiments/benchmarks/gpu.sh OUT SmolLM2-135M-Instruct.Q4_1.gguf hotpot_dev_distractor_v1.json
#
# OUT gets a log of each part and decode.json. A part that fails is named, and the others go on.
set -uo pipefail
if (($# != 3)); then
  echo "usage: $0 OUT MODEL.gguf HOTPOTQA.json" >&2
  exit 2
fi
mkdir -p "$1"
out="$(cd "$1" && pwd)" model="$(realpath "$2")" data="$(realpath "$3")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
python="${PYTHON:-python}"
failed=()

part() { # NAME SECONDS COMMAND...
  local name="$1" seconds="$2"
  shift 2
  echo "== $name"
  if ! timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then
    failed+=("$name")
    tail -n 5 "$out/$name.log"
  fi
}

"$python" - <<'PY' || exit 1
import jax

device = jax.devices()[0]
print(f"{device.device_kind}, jax {jax.__version__}")
if device.platform != "gpu":
    raise SystemExit(f"JAX found {device.platform}: install the extra 'cuda' where there is a GPU")
PY

part demo 200 "$python" experiments/train.py --config=experiments/configs/synthetic.py \
  --workdir="$out/demo" --data_root="$out/data" --config.rollout.microbatch=0 \
  --config.sft.steps=60 --config.sft.eval_every=60 --config.rl.steps=10 --config.rl.eval_every=10
part decode 240 "$python" experiments/benchmark.py --suite=decode --pretrained="$model" --runs=3 \
  --batches=1,32,256 --json="$out/decode.json"
part convert 60 "$python" experiments/convert.py --to=checkpoint --pad_token='<|endoftext|>' \
  --source="$model" --target="$out/smollm2" --config=experiments/configs/hotpotqa_smollm2.py
part hotpotqa 240 "$python" experiments/train.py --workdir="$out/hotpotqa" \
  --config=experiments/configs/hotpotqa_smollm2.py --config.task.data_file="$data" \
  --data_root="$out/data" --config.init_from="$out/smollm2" --config.rollout.cpu_decode=False \
  --config.sft.steps=10 --config.sft.eval_every=10 --config.rl.steps=5 --config.rl.eval_every=5

echo "== seconds of a step, from the second half of each stage"
"$python" - "$out" <<'PY'
import json
import pathlib
import statistics
import sys

for run in ("demo", "hotpotqa"):
    path = pathlib.Path(sys.argv[1]) / run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [r for r in records if "rollout_seconds" in r]
    for name in ("rollout_seconds", "update_seconds"):
        values = [r[name] for r in steps[len(steps) // 2 :]]
        if values:
            print(f"{run} RL {name}: {statistics.median(values):.3f}")
PY
tail -n 20 "$out/decode.log"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]} (logs in $out)" >&2
  exit 1
fi
