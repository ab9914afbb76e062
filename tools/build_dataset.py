"""`megatron-prefix build`, under the name and path of Megatron-LM's preprocessing tools.

python tools/build_dataset.py --input prefs.jsonl --tokenizer tokenizer.model --output prefs
"""

from __future__ import annotations

import sys

from megatron_prefix.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))
