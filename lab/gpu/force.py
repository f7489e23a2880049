"""A plugin of pytest: what a test asks of the CPU, the GPU does (`pytest -p lab.gpu.force`).

It comes before the modules of the tests are imported, which take the function by name.
"""

import torch

import util.train.dist as dist

choose = dist.choose_device


def on_the_gpu(name: str, *rest: object, **more: object) -> torch.device:
    """As `choose_device`, but the GPU for the CPU."""
    device = choose(name, *rest, **more)  # type: ignore[arg-type]
    return torch.device("cuda", 0) if device.type == "cpu" else device


dist.choose_device = on_the_gpu
