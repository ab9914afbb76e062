#!/bin/sh
# Everything in a minute or two, on CPU: data, training, evaluation, comparison.
# Run it from the repository's root, with megatron-prefix on the PATH (make quickstart does both).
set -eu
config=examples/quickstart/dpo.yaml
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

rm -rf quickstart
say python tools/make_toy_preferences.py --output quickstart/toy
say megatron-prefix build --input quickstart/toy/train.jsonl --tokenizer bytes --output quickstart/toy_train
say megatron-prefix build --input quickstart/toy/valid.jsonl --tokenizer bytes --output quickstart/toy_valid
say megatron-prefix inspect quickstart/toy_train --tree 0
say megatron-prefix inspect quickstart/toy_train --row 0 --row-capacity 1600 --picture quickstart/row.png

echo; echo "The same first steps, unpacked and unshared: what every response alone costs."
say megatron-prefix train --config $config data.sharing=none data.packing=false \
    data.row_capacity=null data.micro_batch_size=8 data.valid=null train.eval_interval=null \
    train.save=null train.steps=12 logging.output=quickstart/unpacked
echo; echo "Packed prefix trees: every token once."
say megatron-prefix train --config $config

say megatron-prefix evaluate --config $config
say megatron-prefix evaluate --config $config --load quickstart/checkpoints
say megatron-prefix compare quickstart/unpacked quickstart/tree --output quickstart
echo; python - <<'END'
import json

rows = [json.loads(line) for line in open("quickstart/tree/metrics.jsonl")]
accuracies = [row["eval_rewards/accuracies"] for row in rows if "eval_loss" in row]
print(f"held-out accuracy: {accuracies[0]} before training, {accuracies[-1]} after")
assert accuracies[0] == 0.5, "before training every pair is a tie"
assert accuracies[-1] >= 0.95, "the toy preference was not learned"
END
