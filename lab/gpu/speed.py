"""How fast a device trains and reads: one function for each part, by `lab.bench`'s own programs."""

import json
import os
from typing import Any

import torch

from lab.bench import command as bench
from lab.gpu.parts import Scale
from util.files import write_text

# Dense bf16 products of H100 SXM and H200, as NVIDIA states them; what else is there has no MFU.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}
# Images a second that are aimed at on an H100 (about 35 and 45 % of the peak), and the ratios.
AIMS = {
    "vit_base": 6000,
    "vit_large": 3600,
    "to_compiled_peer": 1.15,
    "cross_to_compiled_peer": 1.5,
}

# In the order of their worth: the first is the base of the ratios.
ARMS = {
    "base": (
        "transformers,bf16,compile", "mae,bf16,compile", "mmae,bf16,compile",
        "mae,bf16,compile,cross=.34", "transformers,bf16",
    ),
    "large": ("mae,bf16,compile", "mmae,bf16,compile", "transformers,bf16,compile"),
}  # fmt: skip
SWITCHES = ("mae,bf16,compile", "mae,bf16", "mae,fp32", "mae,bf16,compile,checkpointing")
TINY = ["--model=mae_vit_micro_patch8", "--input_size=32", "--batch_size=4", "--repeats=1",
        "--warmup=1", "--steps=1", "--threads=1"]  # fmt: skip


def measured(scale: Scale, name: str, flags: list[str]) -> Any:
    """The result of one benchmark.

    Raises:
        RuntimeError: it ended otherwise than well.
    """
    path = scale.folder / f"bench-{name}.json"
    try:
        bench.main([*flags, f"--device={scale.device}", f"--json={path}"])
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"lab.bench {' '.join(flags)} ended with {end.code}") from None
    return json.loads(path.read_text())["result"]


def peak_flags(scale: Scale) -> list[str]:
    """`--peak_tflops` of a GPU whose rate is known."""
    if scale.device != "cuda":
        return []
    name = torch.cuda.get_device_name()
    return [f"--peak_tflops={peak}" for key, peak in PEAK_TFLOPS.items() if key in name][:1]


def row_of(row: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of an arm."""
    kept = {"arm": row["arm"], "images_per_s": row["images_per_s"]["median"]}
    kept |= {k: row["images_per_s"][k] for k in ("n", "min", "max")}
    kept |= {"ratio": row["ratio"]["median"], "peak_gib": sum(row["peak_bytes"]) / 2**30}
    return kept | ({"mfu": row["mfu"]} if "mfu" in row else {})


def step_flags(scale: Scale, arms: tuple[str, ...], batch: int, size: str) -> list[str]:
    """Flags of `lab.bench step` for these arms."""
    if scale.tiny:
        plain = [arm.replace(",compile", "").replace("bf16", "fp32") for arm in arms]
        return ["step", "--arms", *dict.fromkeys(plain), *TINY]
    return [
        "step", "--arms", *arms, f"--model=mae_vit_{size}_patch16", f"--batch_size={batch}",
        "--repeats=5", "--warmup=3", "--steps=10", *peak_flags(scale),
    ]  # fmt: skip


def steps(scale: Scale) -> dict[str, Any]:
    """ViT-B and ViT-L: ours, M-MAE's, the partial decoder, the peers; one group after the other."""
    found: dict[str, Any] = {"aims": AIMS}
    for size, batch in (("base", 512), ("large", 256)):
        arms = ARMS[size][:1] if scale.tiny and size == "large" else ARMS[size]
        result = measured(scale, f"steps-{size}", step_flags(scale, arms, batch, size))
        found[size] = [row_of(row) for row in result]
        keep(scale, "steps", found)
    return found


def switches(scale: Scale) -> dict[str, Any]:
    """What compiling, precision and checkpointing give; then the batch, for the best of them."""
    flags = step_flags(scale, SWITCHES, 256, "base")
    found: dict[str, Any] = {"arms": [row_of(row) for row in measured(scale, "switches", flags)]}
    keep(scale, "switches", found)
    batches = (2, 4) if scale.tiny else (256, 512, 1024)
    arms = tuple(f"mae,bf16,compile,batch={batch}" for batch in batches)
    flags = step_flags(scale, arms, 256, "base")
    found["batches"] = [row_of(row) for row in measured(scale, "batches", flags)]
    return found


def data(scale: Scale) -> dict[str, Any]:
    """JPEG files, four crops a decode, packed JPEG and raw on one core; then with the step."""
    jpegs = scale.folder / "jpegs"
    count = 24 if scale.tiny else 4096
    bench.main(["jpegs", f"--made={jpegs}", f"--count={count}"])
    small = [*TINY, "--images=8", "--num_workers=0"] if scale.tiny else ["--images=512"]
    found: dict[str, Any] = {
        "one core": measured(scale, "data", ["data", f"--data_path={jpegs}", *small])
    }
    keep(scale, "data", found)
    workers = 0 if scale.tiny else len(os.sched_getaffinity(0))
    if scale.tiny:
        both = ["train", f"--data_path={jpegs}", "--arms", "mae", *small]
    else:
        both = [
            "train", f"--data_path={jpegs}", "--arms", "mae,bf16,compile", "--batch_size=512",
            f"--num_workers={workers}", "--repeats=3", "--images=8192",
        ]  # fmt: skip
    found["together"] = measured(scale, "train", both)
    return found


def keep(scale: Scale, name: str, found: dict[str, Any]) -> None:
    """What a part has so far: if it runs out of time, this is what is left of it."""
    write_text(scale.folder / f"{name}.json", json.dumps(found))
