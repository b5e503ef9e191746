"""The command `lmm-qa train` as a script, for launchers that take one:

    accelerate launch --config_file configs/accelerate/one_machine.yaml scripts/train.py \\
        configs/thqa_qwen2_vl_7b_lora.yaml data.root=/data/thqa
"""

from __future__ import annotations

import sys

from lmm_qa.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
