"""Files that an older commit writes, and what its code makes of them: for `test_old_files.py`.

python tests/make_old_files.py OLD_CLONE

OLD_CLONE is a clone of this repository with that commit checked out, and it is only read. All
commands run in processes of their own that import the code of the clone. They write
`tests/old_files/COMMIT/`: each file packed by xz, and `expected.yaml` with the commands and what
came of them. Folders of other commits stay.

What is imported here before `main` runs with any commit's code.
"""

import argparse
import importlib
import json
import lzma
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

HERE = Path(__file__).resolve().parent
OLD_FILES, EXPECTED = HERE / "old_files", "expected.yaml"
HEADER = """\
# Written by `python tests/make_old_files.py OLD_CLONE`; tests/test_old_files.py compares.
# Flags are of commands in a folder with the unpacked files, and with pairs/, which
# stopped_runs.write_pairs makes.
"""
HEADS = 2
# Of models, by the end of their names: width, blocks, and the side of a patch. A segmenter takes
# four blocks, and mmsegmentation patches of 8 pixels.
SIZES = {"one_patch4": (8, 1, 4), "two_patch4": (8, 2, 4), "four_patch8": (4, 4, 8)}
STOPPED = 75  # exit code
KEPT = 24  # numbers of each output: enough to tell any other weights

# ---- What is run -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A run that is stopped, and its checkpoint.

    Attributes:
        main: the command.
        flags: its own; files in them are of the folder that it is started in, see `HEADER`.
        stop: the step after which it is stopped, in the middle of an epoch.
        kind: what the checkpoint holds, see `compute_outputs`.
    """

    main: str
    flags: Sequence[str]
    stop: int
    kind: str


@dataclass(frozen=True)
class Export:
    """What `main_export.py` writes.

    Attributes:
        source: name of a training. flags: more of the command.
        kind: what the new file holds, see `compute_outputs`.
    """

    source: str
    flags: Sequence[str]
    kind: str


# The rates are high: each step then changes the next loss by percents, and so does a fault.
COMMON = ["--device=cpu", "--num_workers=0", "--log_every=1", "--save_every=0", "--seed=3"]
# 24 images in batches of 4 are 6 steps an epoch.
DRAWN = ["--dataset=synthetic", "--train_images=24", "--epochs=2", "--warmup_epochs=0.5"]
PRETRAIN = [
    *COMMON, *DRAWN, "--in_chans=1", "--lr=1e-2", "--picture_every=0", "--eval_every=2",
    "--eval_images=4",
]  # fmt: skip
FINETUNE = [*COMMON, *DRAWN, "--batch_size=4", "--val_images=6", "--eval_every=2"]
TRAININGS = {
    "mmae": Training(
        "main_pretrain",
        [*PRETRAIN, "--model=mae_vit_two_patch4", "--batch_size=4", "--norm_pix_loss",
         "--mask=mixed", "--lscale_init=0.1", "--pos_offset=learned"],
        4, "autoencoder",
    ),
    "mae": Training(
        "main_pretrain",
        [*PRETRAIN, "--model=mae_vit_one_patch4", "--method=mae", "--batch_size=2",
         "--accum_iter=2", "--clip_grad=1"],
        4, "autoencoder",
    ),
    "cross": Training(
        "main_pretrain",
        [*PRETRAIN, "--model=mae_vit_one_patch4", "--batch_size=4", "--decoder=cross",
         "--predict_ratio=0.5", "--pos_offset=jitter", "--mask=average"],
        4, "autoencoder",
    ),
    "pca": Training(
        "main_pretrain",
        [*PRETRAIN, "--model=mae_vit_one_patch4", "--batch_size=4", "--encoder_mask_tokens",
         "--target=pca", "--pca_components=4", "--pca_patches=64", "--mask=block"],
        4, "autoencoder",
    ),
    "finetuned": Training(
        "main_finetune",
        [*FINETUNE, "--finetune=mmae.pth", "--lr=1e-2", "--ema_decay=0.9", "--mixup=0.8",
         "--drop_path=0.1", "--layer_decay=0.75"],
        4, "classifier",
    ),
    "probe": Training(
        "main_finetune",
        [*FINETUNE, "--finetune=mae.pth", "--tune=linear", "--blr=20"],
        4, "classifier",
    ),
    "segmenter": Training(
        "main_segment",
        [*COMMON, "--dataset=folder", "--data_path=pairs", "--model=vit_four_patch8",
         "--input_size=16", "--resize", "24", "16", "--window=16", "--stride=16", "--channels=4",
         "--aux_channels=4", "--batch_size=4", "--iterations=12",
         "--warmup_iterations=1", "--lr=3e-2", "--layer_decay=0.9", "--eval_every=12",
         "--val_images=2", "--pictures=0"],
        4, "segmenter",
    ),
}  # fmt: skip
EXPORTS = {
    "timm.safetensors": Export("mmae", ["--to=timm"], "encoder"),
    "transformers": Export("mmae", ["--to=transformers"], "autoencoder"),
    "official.pth": Export("mae", ["--to=official"], "autoencoder"),
    "ours.pth": Export("pca", ["--to=mmae"], "autoencoder"),
    "jittered.safetensors": Export("cross", ["--to=timm", "--keep_lscale"], "encoder"),
    "averaged.pth": Export("finetuned", ["--to=mmae", "--ema"], "classifier"),
    "classifier.onnx": Export("finetuned", ["--to=onnx"], "classifier"),
    "probe.safetensors": Export("probe", ["--to=timm"], "classifier"),
    "mmseg.pth": Export("segmenter", ["--to=mmseg"], "segmenter"),
}
# Of a pretraining checkpoint: `main_knn` and `main_visualize`.
NEIGHBOURS = [
    "--dataset=synthetic", "--train_images=12", "--val_images=4", "--k=3", "--save_features",
    "--device=cpu", "--num_workers=0",
]  # fmt: skip
RECONSTRUCTIONS = ["--dataset=synthetic", "--num_images=4", "--measure", "--device=cpu"]


# ---- What runs with the code of any commit -----------------------------------------------------


def small_models(models_zoo: Any) -> Iterator[tuple[Any, str, Any]]:
    """Names for models so small that a file of them is small: registry, name, entry."""
    decoder = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": HEADS}
    for name, (width, depth, patch) in SIZES.items():
        size = {"embed_dim": width, "depth": depth, "num_heads": HEADS}
        size |= {"img_size": 16, "patch_size": patch}
        for names, prefix, arguments in (
            (models_zoo.MODELS, "mae_vit", size | decoder),
            (models_zoo.CLASSIFIERS, "vit", size),
        ):
            kind = names[f"{prefix}_micro_patch4"][0]
            yield names, f"{prefix}_{name}", (kind, arguments)


def make_images(channels: int, size: tuple[int, int]) -> Tensor:
    """Two normalised images [2, C, H, W] that no generator drew."""
    shape = (2, channels, *size)
    return torch.sin(0.7 * torch.arange(torch.Size(shape).numel())).reshape(shape).float()


@torch.inference_mode()
def compute_outputs(path: str, kind: str, foreign: bool = False) -> dict[str, list[float]]:
    """What the models in a file give of `make_images`, by name; some numbers of each.

    Args:
        kind: encoder | autoencoder | classifier | segmenter; each has an encoder as well.
        foreign: the file does not say how many heads its model has.
    """
    import models_segmenters
    import models_zoo

    heads = {"num_heads": HEADS} if foreign else {}
    encoder, _ = models_zoo.load_encoder(path, **heads)
    images = make_images(encoder.in_chans, encoder.img_size)
    found = {f"features {pool}": encoder.eval().features(images, pool) for pool in ("avg", "cls")}
    if kind == "autoencoder":
        model, _ = models_zoo.load_pretrained(path)
        places = torch.arange(16)
        # 4 of 16 visible, others in the second image.
        mask = torch.stack([places * 5 % 16, places * 7 % 16]) >= 4
        result = model.eval()(images, mask)
        found |= {"loss": result["loss"], "pred": result["pred"]}
    elif kind == "classifier":
        model = models_zoo.load_classifier(path, head="own", **heads)[0]
        found["logits"] = model.eval()(images)
    elif kind == "segmenter":
        model, _ = models_segmenters.load_segmenter(path, **heads)
        found["logits"] = model.eval()(images)["logits"]
    return {name: some(x) for name, x in found.items()}


def some(x: Tensor) -> list[float]:
    """Evenly spaced numbers, `KEPT` at most, with seven digits."""
    flat = x.flatten()
    return [float(f"{v:.7g}") for v in flat[:: -(-len(flat) // KEPT)].tolist()]


def run_command(main: str, argv: Sequence[str], stop: int | None = None) -> None:
    """A command of this commit; a training may be told to stop after a step."""
    if stop is not None:
        try:
            from util.train.run import Run
        except ImportError:  # before the packages
            Run = importlib.import_module("util.run").Run
        after_step = Run.after_step

        def signalling(self: Any, report: Any) -> bool:
            if report.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return bool(after_step(self, report))

        Run.after_step = signalling
    importlib.import_module(main).main(list(argv))


def work(requests: Sequence[dict[str, Any]]) -> None:
    """In a process with the code of the clone: commands, and the outputs of files.

    The last line is a list of the results, None for a command.
    """
    import models_zoo

    torch.set_num_threads(1)
    for names, name, entry in small_models(models_zoo):
        names[name] = entry
    results = [
        (run_command if "main" in request else compute_outputs)(**request) for request in requests
    ]
    sys.stdout.write(f"\n{json.dumps(results)}")


# ---- In this project ---------------------------------------------------------------------------

Request = dict[str, Any]


def ask(clone: Path, files: Path, *requests: Request, code: int = 0) -> list[Any]:
    """The results of `work` with the code of a clone.

    Args:
        files: the folder that the process starts in.
        code: what the process ends with, other than 0 before it has results.
    """
    environment = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, __file__, "--work", json.dumps(requests)],
        cwd=files, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if ended.returncode != code:
        raise SystemExit(f"{requests}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}")
    return [] if code else json.loads(ended.stdout.splitlines()[-1])


def command(main: str, *argv: str, stop: int | None = None) -> Request:
    """A request for a command."""
    return {"main": main, "argv": argv, "stop": stop}


def outputs(path: Path, kind: str, foreign: bool = False) -> Request:
    """A request for the outputs of a file."""
    return {"path": str(path), "kind": kind, "foreign": foreign}


def read_numbers(folder: Path, main: str, after: int) -> list[dict[str, Any]]:
    """What a run recorded after a step: each record's kind and numbers.

    Left out are shares of a few images or pixels that were classified rightly: they jump.
    """
    from runs import of_training

    task = main.removeprefix("main_")
    return [
        {k: v for k, v in record.items() if k == "kind" or isinstance(v, int | float)}
        for record in of_training(folder, task, ("train", "epoch"))
        if record["step"] > after
    ] + [
        {k: v for k, v in record.items() if k in ("kind", "step") or k.endswith(SMOOTH)}
        for record in of_training(folder, task, ("eval",))
        if record["step"] > after
    ]


SMOOTH = ("psnr", "ssim", "loss")  # ends of the names of measurements that do not jump


def write_packed(path: Path, contents: bytes) -> None:
    """A file of `old_files`: most of a small checkpoint is padding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(contents, preset=9 | lzma.PRESET_EXTREME))


def unpack(folder: Path, target: Path) -> None:
    """The files of a commit as its code wrote them."""
    for path in folder.rglob("*.xz"):
        place = target / path.relative_to(folder).with_suffix("")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(lzma.decompress(path.read_bytes()))


def make_training(clone: Path, name: str, root: Path) -> dict[str, Any]:
    """Write a training's checkpoint, and let the old code go on from it."""
    job, files, folder = TRAININGS[name], root / "files", root / name
    argv = [*job.flags, f"--output_dir={folder}"]
    ask(clone, files, command(job.main, *argv, stop=job.stop), code=STOPPED)
    path, last = files / f"{name}.pth", folder / "checkpoint-last.pth"
    path.write_bytes(last.read_bytes())
    requests = [command(job.main, *argv), outputs(path, job.kind), outputs(last, job.kind)]
    looked = root / f"looked-{name}"
    if job.main == "main_pretrain":
        where = (f"--checkpoint={path}", f"--output_dir={looked}")
        requests += [command("main_knn", *where, *NEIGHBOURS)]
        requests += [command("main_visualize", *where, *RECONSTRUCTIONS)]
    _, of_file, of_last, *_ = ask(clone, files, *requests)
    found: dict[str, Any] = {"main": job.main, "flags": list(job.flags), "stop": job.stop}
    found |= {"kind": job.kind, "outputs": of_file, "ended": of_last}
    found["records"] = read_numbers(folder, job.main, job.stop)
    return found | (read_looked(looked) if job.main == "main_pretrain" else {})


def read_looked(folder: Path) -> dict[str, Any]:
    """What `main_knn` and `main_visualize --measure` wrote of a checkpoint."""
    import numpy as np

    measured = json.loads((folder / "reconstruction.json").read_text())
    return {
        "neighbours": some(torch.from_numpy(np.load(folder / "features-val.npy"))),
        "reconstruction": {k: v for k, v in measured.items() if k.endswith(SMOOTH)},
    }


def make_exports(clone: Path, files: Path) -> dict[str, Any]:
    """Let the old code write files, and read them again."""
    requests = []
    for name, job in EXPORTS.items():
        where = (f"--checkpoint={files / job.source}.pth", f"--output={files / name}")
        requests += [command("main_export", *where, *job.flags)]
        requests += [outputs(files / name, job.kind, foreign=True)]
    results = ask(clone, files, *requests)[1::2]
    return {
        name: {**asdict(job), "flags": list(job.flags), "outputs": result}
        for (name, job), result in zip(EXPORTS.items(), results, strict=True)
    }


def main() -> None:
    """Write the folder of a commit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old_clone", type=Path)
    clone = parser.parse_args().old_clone.resolve()
    sys.path.insert(0, str(HERE.parent))
    from stopped_runs import write_pairs

    shown = ["git", "-C", str(clone), "show", "--no-patch", "--format=%h %cs", "HEAD"]
    commit, date = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.split()
    with tempfile.TemporaryDirectory(prefix="old-files-") as place:
        root = Path(place)
        write_pairs(root / "files/pairs")
        expected = {
            "commit": commit,
            "date": date,
            "torch": str(torch.__version__),
            "trainings": {name: make_training(clone, name, root) for name in TRAININGS},
            "exports": make_exports(clone, root / "files"),
        }
        files = [p for p in (root / "files").rglob("*") if p.is_file() and "pairs" not in p.parts]
        for path in files:
            name = path.relative_to(root / "files")
            write_packed(OLD_FILES / commit / f"{name}.xz", path.read_bytes())
    text = yaml.safe_dump(expected, sort_keys=False, default_flow_style=None, width=100)
    (OLD_FILES / commit / EXPECTED).write_text(HEADER + text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
    else:
        main()
