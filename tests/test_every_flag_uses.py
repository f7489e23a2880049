"""Every flag of the commands that use a checkpoint or a data set: predict, export, visualize, pack.

Another value changes what it should, and nothing else.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import every_flag_training as alike
import pytest
import torch
from every_flag import (
    Command,
    Row,
    Table,
    Told,
    Trace,
    cases,
    check_complete,
    digest,
)
from every_flag_files import write_all, write_tuned
from safetensors import safe_open

import main_export
import main_pack
import main_predict
import main_visualize
from util.train.checkpoint import load_file

pytestmark = pytest.mark.smoke

FOREIGN = "--checkpoint={official}"
HEAD, NESTED = "--checkpoint={head_official}", "--checkpoint={head_nested}"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("places")
    torch.manual_seed(3)
    return write_all(root) | write_tuned(root)


# ---- Predict -----------------------------------------------------------------------------------

PREDICT: Table = {
    "--checkpoint": Row("--checkpoint={other_tuned}", "table"),
    "--data_path": Row("--data_path={other}/train", "table"),
    "--output_dir": Row("--output_dir={root}/there", "files"),
    "--top_k": Row("--top_k=2", "table"),
    "--ema": Row("--ema", "table"),
    "--input_size": Row("--input_size=24", "table"),
    "--pos_resize": Row("--pos_resize=extend", "table", "--input_size=24"),
    "--mean": Row("--mean 0.1 0.2 0.3", "table"),
    "--std": Row("--std 0.1 0.2 0.3", "table"),
    "--model": Row("--model=vit_heads_patch4", "table", f"{HEAD} --model=vit_nano_patch4"),
    "--num_heads": Row("--num_heads=4", "table", f"{HEAD} --num_heads=2"),
    "--weights_key": Row("--weights_key=b", "table", f"{NESTED} --weights_key=a --num_heads=2"),
    "--batch_size": Row("--batch_size=5", "loader"),
    "--num_workers": Row("--num_workers=1", "loader"),
    "--max_pixels": Row("--max_pixels=2200", "table"),
    "--device": Told("test_predict_device"),
}


class Predict(Command):
    """The table, and the loader."""

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """What the loader is asked for."""
        build = main_predict.build_loader
        trace["loader"] = None

        def build_loader(samples: Any, sampler: Any, **more: Any) -> Any:
            trace["loader"] = sampler.batch_size, more
            return build(samples, sampler, **more)

        patch.setattr(main_predict, "build_loader", build_loader)

    def read(self, root: Path, trace: Trace) -> None:
        """predictions.csv, rounded: another batch changes the last bits."""
        for path in root.rglob("predictions.csv"):
            cells = [cell for line in path.read_text().splitlines() for cell in line.split(",")]
            trace["table"] = [cell[:6] if cell[:2] == "0." else cell for cell in cells]


@pytest.fixture(scope="module")
def predict(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Predict:
    base = ["--checkpoint={tuned}", "--data_path={data}/train", "--num_workers=0"]
    base += ["--device=cpu", "--batch_size=4"]
    return Predict("main_predict", base, places, tmp_path_factory.mktemp("predict"))


def test_every_flag_of_predict_has_an_entry() -> None:
    check_complete(PREDICT, main_predict.build_parser(), __name__)


@cases(PREDICT)
def test_predict(row: Row, predict: Predict) -> None:
    predict.check(row)


def test_predict_device(predict: Predict) -> None:
    alike.check_device(predict)


# ---- Export ------------------------------------------------------------------------------------

MAE = "--checkpoint={mae_official} --model=mae_vit_nano_patch4 --to=mmae --output={root}/out.pth"

EXPORT: Table = {
    "--checkpoint": Row("--checkpoint={other_tuned}", "weights"),
    "--to": Row("--to=mmae", "about keys weights", "--output={root}/out.pth"),
    "--output": Row("--output={root}/there.safetensors", "files"),
    "--part": Row("--part=encoder", "about keys weights"),
    "--keep_lscale": Row("--keep_lscale", "about keys weights"),
    "--ema": Row("--ema", "weights"),
    "--input_size": Row("--input_size=24", "about keys weights"),
    "--pos_resize": Row(
        "--pos_resize=extend", "weights", "--checkpoint={pretrained} --input_size=24"
    ),
    "--model": Row("--model=vit_heads_patch4", "about", f"{FOREIGN} --model=vit_nano_patch4"),
    "--num_heads": Row("--num_heads=4", "about", f"{FOREIGN} --num_heads=2"),
    "--weights_key": Row(
        "--weights_key=b", "weights", "--checkpoint={nested} --weights_key=a --num_heads=2"
    ),
    "--decoder_num_heads": Row("--decoder_num_heads=4", "about", MAE),
    "--norm_pix_loss": Row("--norm_pix_loss", "about", MAE),
}


class Export(Command):
    """What is in the written file."""

    def read(self, root: Path, trace: Trace) -> None:
        """Names and shapes, values, and all that is beside them."""
        for path in root.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about: Any = file.metadata()
            self.note(weights, about, trace)
        for path in root.glob("*.pth"):
            state = load_file(path)
            weights = state.get("model", state)
            self.note(weights, {k: v for k, v in state.items() if k != "model"}, trace)

    @staticmethod
    def note(weights: dict[str, Any], about: Any, trace: Trace) -> None:
        """Into the trace."""
        tensors = {k: v for k, v in weights.items() if isinstance(v, torch.Tensor)}
        trace["keys"] = {k: tuple(v.shape) for k, v in tensors.items()}
        trace["weights"], trace["about"] = digest(tensors), digest(about)


@pytest.fixture(scope="module")
def export(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Export:
    base, root = ["--checkpoint={tuned}", "--to=timm"], tmp_path_factory.mktemp("export")
    return Export("main_export", base, places, root, "--output={root}/out.safetensors")


def test_every_flag_of_export_has_an_entry() -> None:
    check_complete(EXPORT, main_export.build_parser(), __name__)


@cases(EXPORT)
def test_export(row: Row, export: Export) -> None:
    export.check(row)


# ---- Visualize ---------------------------------------------------------------------------------

HIDDEN, SET = "masked restored grid", "--dataset=imagefolder --data_path={data}"
SHOWN = f"originals {HIDDEN}"
MAE_SHOWN = "--checkpoint={mae_official} --model=mae_vit_nano_patch4"

VISUALIZE: Table = {
    "--checkpoint": Row("--checkpoint={wide}", "restored grid"),
    "--images": Row("--images={other}/val", SHOWN),
    "--dataset": Row("--dataset=synthetic", f"files {SHOWN}", SET, without="--images"),
    "--data_path": Row("--data_path={other}", SHOWN, SET, without="--images"),
    "--val_fraction": Row("--val_fraction=0.5", f"files {SHOWN}", SET, without="--images"),
    "--val_seed": Row(
        "--val_seed=1", f"files {SHOWN}", f"{SET} --val_fraction=0.25", without="--images"
    ),
    "--max_pixels": Told("test_visualize_max_pixels"),
    "--num_images": Row("--num_images=2", f"files {SHOWN}"),
    "--mask": Row("--mask=block", HIDDEN),
    "--mask_ratio": Row("--mask_ratio=0.5", HIDDEN),
    "--mask_cell": Row("--mask_cell=2", HIDDEN),
    "--avg_share": Row("--avg_share=0.9", HIDDEN, "--mask=mixed"),
    "--avg_order": Row("--avg_order=low", HIDDEN, "--mask=mixed"),
    "--avg_temperature": Row("--avg_temperature=0", HIDDEN, "--mask=mixed"),
    "--seed": Row("--seed=1", HIDDEN),
    "--measure": Told("test_visualize_measure"),
    "--output_dir": Row("--output_dir={root}/there", "files"),
    "--device": Told("test_visualize_device"),
    "--model": Row("--model=mae_vit_heads_patch4", "restored grid", MAE_SHOWN),
    "--num_heads": Row("--num_heads=4", "restored grid", MAE_SHOWN),
    "--decoder_num_heads": Row("--decoder_num_heads=4", "restored grid", MAE_SHOWN),
    "--weights_key": Row(
        "--weights_key=b",
        "restored grid",
        "--checkpoint={mae_nested} --weights_key=a --model=mae_vit_nano_patch4",
    ),
    "--norm_pix_loss": Row("--norm_pix_loss", "restored grid", MAE_SHOWN),
}


class Visualize(Command):
    """The panels by kind, and the grid of them."""

    def read(self, root: Path, trace: Trace) -> None:
        """Bytes of the pictures."""
        for name, pattern in (
            ("originals", "*-original.png"), ("masked", "*-masked.png"),
            ("restored", "*-reconstruction.png"), ("grid", "grid.png"),
        ):  # fmt: skip
            found = [path.read_bytes() for path in sorted(root.rglob(pattern))]
            if found:
                trace[name] = digest(found)


@pytest.fixture(scope="module")
def visualize(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Visualize:
    base = ["--checkpoint={pretrained}", "--images={data}/val", "--device=cpu", "--num_images=4"]
    return Visualize("main_visualize", base, places, tmp_path_factory.mktemp("visualize"))


def test_every_flag_of_visualize_has_an_entry() -> None:
    check_complete(VISUALIZE, main_visualize.build_parser(), __name__)


@cases(VISUALIZE)
def test_visualize(row: Row, visualize: Visualize) -> None:
    visualize.check(row)


def test_visualize_device(visualize: Visualize) -> None:
    alike.check_device(visualize)


@pytest.mark.parametrize(("words", "where"), [
    ("--images={data}/train --num_images=12", "--images"),
    (SET + " --val_fraction=0.9 --num_images=12", "--dataset"),
])  # fmt: skip
def test_visualize_max_pixels(words: str, where: str, visualize: Visualize) -> None:
    """A picture that was asked for is not left out: files and images of a set are refused."""
    without = "" if where == "--images" else "--images"
    whole = visualize(words, without=without)
    small = visualize(words, "--max_pixels=2200", without=without)
    assert whole["ends"] == 0 and small["ends"] != 0 and "2,200" in small["text"]


def test_visualize_measure(visualize: Visualize, tmp_path: Path) -> None:
    """Numbers in place of pictures, and of so many images."""
    trace = visualize(SET, "--measure --num_images=3", without="--images", folder=tmp_path)
    assert trace["ends"] == 0 and trace["files"] == ["run/reconstruction.json"], trace["text"]
    assert json.loads((tmp_path / "run/reconstruction.json").read_text())["images"] == 3


# ---- Pack --------------------------------------------------------------------------------------

PACK: Table = {
    "--dataset": Row("--dataset=digits", "files shards", "--split=val"),
    "--data_path": Row("--data_path={other}", "shards"),
    "--max_pixels": Row("--max_pixels=2200", "files shards"),
    "--split": Row("--split=val", "files shards"),
    "--output_dir": Row("--output_dir={root}/there", "files"),
    "--format": [Row("--format=raw", "shards"), Row("--format=keep", "shards")],
    "--short_side": Row("--short_side=24", "shards"),
    "--quality": Row("--quality=30", "shards"),
    "--max_bad_images": Told("test_pack_max_bad_images"),
    "--num_workers": Row("--num_workers=1", "workers"),
    "--verify": Told("test_pack_verify"),
}


class Pack(Command):
    """What is in the shards, and how many processes write them."""

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """The number of processes."""
        pack = main_pack.pack

        def packed(*rest: Any, num_workers: int, **more: Any) -> Any:
            trace["workers"] = num_workers
            return pack(*rest, num_workers=num_workers, **more)

        patch.setattr(main_pack, "pack", packed)

    def read(self, root: Path, trace: Trace) -> None:
        """All but the manifests, which say where the images are from, and the lists of bad ones."""
        parts = {
            path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.suffix not in (".json", ".txt")
        }
        if parts:
            trace["shards"] = sorted(parts.values())


@pytest.fixture(scope="module")
def pack(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Pack:
    base = ["--data_path={data}", "--num_workers=0"]
    return Pack("main_pack", base, places, tmp_path_factory.mktemp("pack"))


def test_every_flag_of_pack_has_an_entry() -> None:
    check_complete(PACK, main_pack.build_parser(), __name__)


@cases(PACK)
def test_pack(row: Row, pack: Pack) -> None:
    pack.check(row)


def test_pack_max_bad_images(pack: Pack) -> None:
    few, none = (pack("--max_pixels=2200", f"--max_bad_images={n}") for n in (1, 0))
    assert few["ends"] == 0 and none["ends"] != 0 and "--max_bad_images" in none["text"]


def test_pack_verify(pack: Pack, tmp_path: Path) -> None:
    """It writes nothing, and finds a byte that is another."""
    pack(folder=tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert "every byte as written" in pack("--verify", folder=tmp_path)["text"]
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    shard = max(
        (p for p in before if p.suffix not in (".json", ".txt")), key=lambda p: len(before[p])
    )
    shard.write_bytes(before[shard][:-1] + bytes([before[shard][-1] ^ 1]))
    assert pack("--verify", folder=tmp_path)["ends"] != 0
