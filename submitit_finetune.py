"""Fine-tune by Slurm: the flags of main_finetune.py and those of the job; --help lists both.

python submitit_finetune.py --job_dir JOB_DIR --nodes 1 --ngpus 8 --data_path IMAGENET ...
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_interrupt

    take_interrupt()

from collections.abc import Sequence

import main_finetune
from util.errors import command
from util.slurm import submit


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Submit one run; see the module."""
    submit(main_finetune, argv)


if __name__ == "__main__":
    main()
