"""How fast a device trains and reads: one function for each part, by `lab.bench`'s own programs."""

import json
import os
import re
from typing import Any

import torch

from lab.bench import command as bench
from lab.gpu.parts import Scale, keep

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
        "mae,bf16,compile,cross=.34", "transformers,bf16", "official,bf16",
    ),
    "large": (
        "transformers,bf16,compile", "mae,bf16,compile", "mmae,bf16,compile",
    ),
}  # fmt: skip
SWITCHES = (
    "mae,bf16,compile", "mae,bf16", "mae,fp32", "mae,bf16,compile,checkpointing",
    "mae,bf16,compile,adamw=foreach", "mae,bf16,compile,channels_last",
    "mae,bf16,compile=reduce-overhead", "mae,bf16,shard",
)  # fmt: skip
# The search for the fastest kernels takes minutes, so these come last.
MODES = (
    "mae,bf16,compile", "mae,bf16,compile=max-autotune-no-cudagraphs",
    "mae,bf16,compile=max-autotune",
)  # fmt: skip
BATCHES = {"base": (256, 512, 1024), "large": (128, 256, 512)}
# Large enough that the processor starts kernels faster than the GPU runs them, which at 256 it
# seemed not to do for the cross decoder of ViT-B.
BATCH = {"base": 512, "large": 256}
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


def select_columns(row: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of an arm."""
    kept = {"arm": row["arm"], "images_per_s": row["images_per_s"]["median"]}
    kept |= {k: row["images_per_s"][k] for k in ("n", "min", "max")}
    kept |= {"ratio": row["ratio"]["median"], "peak_gib": sum(row["peak_bytes"]) / 2**30}
    return kept | ({"mfu": row["mfu"]} if "mfu" in row else {})


def step_flags(scale: Scale, arms: tuple[str, ...], size: str) -> list[str]:
    """Flags of `lab.bench step` for these arms."""
    if scale.tiny:
        plain = [re.sub(r",compile[^,]*", "", arm).replace("bf16", "fp32") for arm in arms]
        return ["step", "--arms", *dict.fromkeys(plain), *TINY]
    return [
        "step", "--arms", *arms, f"--model=mae_vit_{size}_patch16", f"--batch_size={BATCH[size]}",
        "--repeats=5", "--warmup=0", "--steps=20", *peak_flags(scale),
    ]  # fmt: skip


def measure_rows(scale: Scale, name: str, arms: tuple[str, ...], size: str) -> list[dict[str, Any]]:
    """The rows of some arms."""
    return [select_columns(row) for row in measured(scale, name, step_flags(scale, arms, size))]


def steps(scale: Scale) -> dict[str, Any]:
    """ViT-B and ViT-L: ours, M-MAE's, the partial decoder, the peers; one group after the other."""
    found: dict[str, Any] = {"aims": AIMS}
    for size, arms in ARMS.items():
        some = arms[:1] if scale.tiny and size == "large" else arms
        found[size] = measure_rows(scale, f"steps-{size}", some, size)
        keep(scale, "steps", found)
    return found


def switches(scale: Scale) -> dict[str, Any]:
    """What compiling, precision, checkpointing, AdamW, layout, CUDA graphs and shards give."""
    return {"arms": measure_rows(scale, "switches", SWITCHES, "base")}


def batches(scale: Scale) -> dict[str, Any]:
    """Which batch is the best."""
    found: dict[str, Any] = {}
    for size, counts in BATCHES.items():
        arms = tuple(f"mae,bf16,compile,batch={2 if scale.tiny else n}" for n in counts)
        found[size] = measure_rows(scale, f"batches-{size}", arms[: 1 if scale.tiny else 3], size)
        keep(scale, "batches", found)
    return found


def modes(scale: Scale) -> dict[str, Any]:
    """What a search for the fastest kernels gives."""
    return {"arms": measure_rows(scale, "modes", MODES, "base")}


def data(scale: Scale) -> dict[str, Any]:
    """One core, by files and packed sets; the decoders; then all cores, and the step with them."""
    jpegs, packed = scale.folder / "jpegs", scale.folder / "packed"
    if not jpegs.exists():  # of an earlier start in this folder
        bench.main(["jpegs", f"--made={jpegs}", f"--count={24 if scale.tiny else 4096}"])
    small = [*TINY, "--images=8", "--num_workers=0"] if scale.tiny else []
    one = small or ["--images=512", "--repeats=3"]
    flags = ["data", f"--data_path={jpegs}", f"--packed_path={packed}", *one]
    found: dict[str, Any] = {"one core": measured(scale, "data", flags)}
    keep(scale, "data", found)
    limits = ["limits", *(TINY if scale.tiny else ["--repeats=5", "--batch_size=512"])]
    found["limits"] = measured(scale, "limits", limits)
    keep(scale, "data", found)
    workers = len(os.sched_getaffinity(0))
    all_cores = small or [
        "--arms", "mae,bf16,compile", "--batch_size=512", "--repeats=3", "--images=8192",
        f"--num_workers={workers}",
    ]  # fmt: skip
    for name, more in (
        ("files", [f"--data_path={jpegs}"]),
        ("files, 4 crops a decode", [f"--data_path={jpegs}", "--crops_per_decode=4"]),
        ("packed JPEG", [f"--data_path=packed:{packed / 'jpeg'}"]),
        ("packed raw", [f"--data_path=packed:{packed / 'raw'}"]),
    ):
        found[name] = measured(scale, "train", ["train", *more, *all_cores])
        keep(scale, "data", found)
    return found
