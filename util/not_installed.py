"""What pip meets here: M-MAE is run from its clone, and a build backend says so in one sentence.

Flat scripts are no package, and a folder called `util` in site-packages would be a bad neighbour to
every other program. So every hook of a build (PEP 517, PEP 660) refuses; pip prints the sentence.
It imports nothing, for pip calls it in an environment without torch.
"""

from typing import Any, NoReturn

REASON = (
    "M-MAE is run from its folder and not installed: in the clone, pip install -r requirements.txt "
    "and then python main_pretrain.py --help; to import it from elsewhere, put the clone on "
    "PYTHONPATH (export PYTHONPATH=/path/to/clone)"
)


def refuse(*_: Any, **__: Any) -> NoReturn:
    """End the build with the reason; a text in SystemExit is printed without a traceback."""
    raise SystemExit(REASON)


get_requires_for_build_wheel = get_requires_for_build_editable = refuse
get_requires_for_build_sdist = refuse
prepare_metadata_for_build_wheel = prepare_metadata_for_build_editable = refuse
build_wheel = build_editable = build_sdist = refuse
