"""What plugins register, taken away again."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from models_registry import CLASSIFIERS, ENCODER_KINDS, MODELS
from models_targets import TARGETS
from util import plugins
from util.data.datasets import DATASETS
from util.data.segmentation_sets import SEGMENTATION_SETS
from util.mask.strategies import STRATEGIES

REGISTRIES = (
    MODELS, CLASSIFIERS, ENCODER_KINDS, TARGETS, DATASETS, SEGMENTATION_SETS, STRATEGIES,
)  # fmt: skip


@contextmanager
def registered_apart() -> Iterator[None]:
    """What is registered inside is gone after it."""
    before = [(registry, dict(registry.things), dict(registry.owners)) for registry in REGISTRIES]
    loaded, path = dict(plugins.LOADED), list(sys.path)
    try:
        yield
    finally:
        for registry, things, owners in before:
            registry.things, registry.owners = things, owners
        for name in plugins.LOADED.keys() - loaded.keys():
            sys.modules.pop(name, None)
        plugins.LOADED.clear()
        plugins.LOADED.update(loaded)
        sys.path[:] = path
