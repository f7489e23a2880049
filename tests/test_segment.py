"""main_segment.py as its users run it, small: training, resuming, measuring, predicting."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import ROOT, launch, wait
from PIL import Image
from runs import different, of_training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_segment_data import FAULTS, write_ade20k, write_pairs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trained import Trained

import engine_segment
import eval_segment
import main_segment
from engine_segment import Inference, PixelLoss, evaluate, prepare, resized_argmax
from main_segment import is_due, next_stop
from models_segmenters import load_segmenter
from models_zoo import create_model, create_segmenter
from util.config import segment_flags
from util.data.images import IMAGENET_MEAN, IMAGENET_STD
from util.errors import EXIT_INTERRUPTED, EXIT_STOPPED, RunFailed
from util.train.agreement import Agreement, Wish
from util.train.checkpoint import BEST, LAST, load_file, save_checkpoint
from util.train.dist import Processes
from util.train.schedule import PolySchedule

# 8 pairs in batches of 2 are 4 steps an epoch; 6 iterations end in the middle of the second.
SMALL = [
    "--dataset=folder", "--input_size=32", "--resize", "48", "32", "--window=32", "--stride=24",
    "--channels=8", "--aux_channels=8", "--batch_size=2", "--iterations=6", "--eval_every=3",
    "--warmup_iterations=2", "--save_every=0", "--log_every=1", "--num_workers=0", "--device=cpu",
    "--pictures=2", "--drop_path=0.3", "--lr=1e-3",
]  # fmt: skip
NEW = ["--model=vit_micro_patch8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight pairs of each split, four classes, some of it ignored."""
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root, count=8)
    return f"--data_path={root}"


def segment(folder: Path, data: str, *flags: str) -> None:
    """Run in this process; any failure is an exception."""
    main_segment.main([*SMALL, *NEW, data, f"--output_dir={folder}", *flags])


def training(folder: Path) -> list[dict[str, Any]]:
    """All that a run says of its training."""
    return of_training(folder, "segment", ("train", "epoch", "eval"))


@pytest.fixture(scope="module")
def whole(data: str, trained: Trained) -> Path:
    """The folder of a run that was never stopped."""
    return trained("main_segment", [*SMALL, *NEW, data])


# ---- Parts -------------------------------------------------------------------------------------


def test_the_schedule_is_warm_up_and_a_straight_line() -> None:
    """The published one, worked out by hand."""
    lr = PolySchedule(1e-4, 1500, 160_000)
    assert lr(0) == pytest.approx(1e-10)
    assert lr(750) == pytest.approx(1e-4 * (1e-6 + (1 - 1e-6) / 2))
    assert lr(1500) == pytest.approx(1e-4)
    assert lr(80_750) == pytest.approx(5e-5)  # half-way between 1,500 and 160,000
    assert lr(160_000) == 0 and lr(159_999) > 0
    assert PolySchedule(1.0, 0, 10, min_lr=0.2, power=2)(5) == pytest.approx(0.2 + 0.8 * 0.25)


def test_what_is_due_when() -> None:
    stops, step = [], 0
    while step < 10:
        step = next_stop(step, 10, 4, 3)
        stops.append(step)
    assert stops == [3, 4, 6, 8, 9, 10] and next_stop(0, 10, 0, 0) == 10
    assert [s for s in range(1, 11) if is_due(4, s, 10)] == [4, 8, 10] and not is_due(0, 10, 10)


@pytest.mark.parametrize("mean", ["all", "valid"])
def test_the_loss_is_cross_entropy_over_pixels(mean: str) -> None:
    """Against numpy, one pixel after the other; split in any way it stays the same."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(4, 3, 6, 5)))
    aux = torch.from_numpy(rng.normal(size=(4, 3, 3, 2)))
    label = torch.from_numpy(rng.integers(0, 3, (4, 6, 5)).astype(np.uint8))
    label[0, :4] = label[1] = 255
    loss = PixelLoss(0.4, mean)

    def total(x: Tensor) -> float:
        x = F.interpolate(x.float(), (6, 5), mode="bilinear", align_corners=False).double().numpy()
        found = 0.0
        for b, i, j in np.ndindex(4, 6, 5):
            if label[b, i, j] != 255:
                scores = x[b, :, i, j]
                found += np.log(np.exp(scores).sum()) - scores[label[b, i, j]]
        return found

    count = 120 if mean == "all" else 120 - 20 - 30
    expected = (total(logits) + 0.4 * total(aux)) / count
    counts = [loss.pixels(label[half]) for half in (slice(0, 1), slice(1, 4))]
    assert sum(counts) == count
    parts = [
        loss({"logits": logits[half], "aux": aux[half]}, label[half], sum(counts) / 2)
        for half in (slice(0, 1), slice(1, 4))
    ]
    assert float(sum(parts) / 2) == pytest.approx(expected, rel=1e-5)
    none = torch.full_like(label, 255)
    assert float(loss({"logits": logits}, none, torch.tensor(1.0))) == 0


def test_padding_is_zero_after_normalisation() -> None:
    images = torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8)
    batch = {"x": images, "extent": torch.tensor([[6, 8], [2, 5]])}
    x = prepare(batch, IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"))
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images / 255 - mean) / std
    expected[1, :, 2:] = expected[1, :, :, 5:] = 0
    assert torch.allclose(x, expected, atol=1e-6)


def test_the_class_of_highest_score_at_another_size() -> None:
    """In chunks of classes as at once; ties go to the first; what is no number is no class."""
    scores = torch.randn(1, 40, 7, 9, generator=torch.Generator().manual_seed(0))
    enlarged = F.interpolate(scores, (20, 33), mode="bilinear", align_corners=False)
    assert torch.equal(resized_argmax(scores, (20, 33)).long(), enlarged[0].argmax(dim=0))
    tie = torch.zeros(1, 40, 1, 1)
    tie[0, [5, 30]] = 1.0
    assert resized_argmax(tie, (2, 2)).unique().tolist() == [5]
    assert resized_argmax(torch.full((1, 3, 2, 2), torch.nan), (2, 2)).unique().tolist() == [255]


class Known(nn.Module):
    """Predicts a class from the red channel, whatever the size of the image."""

    def predict(self, images: Tensor) -> Tensor:
        red = images[:, :1]
        return torch.cat([-((red - c) ** 2) for c in range(4)], dim=1)


def test_evaluation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of two sizes, counted by hand; a class that is absent from both is left out."""
    truth = [np.array([[0, 1], [1, 255]]), np.array([[0, 0, 2]])]
    guess = [np.array([[0, 1], [0, 3]]), np.array([[0, 2, 2]])]
    batches = [
        {
            "x": torch.from_numpy(np.stack([g] * 3)[None].astype(np.uint8)),
            "y": torch.from_numpy(t[None].astype(np.uint8)),
            "bad": torch.tensor([[-1] * 4]),
        }
        for g, t in zip(guess, truth, strict=True)
    ]
    options: dict[str, Any] = {
        "mean": (0.0,) * 3, "std": (1 / 255,) * 3, "device": torch.device("cpu"),
        "sum_over_ranks": lambda x: x, "gather": lambda x: [x],
    }  # fmt: skip
    result = evaluate(Known(), batches, 4, Inference(), **options)
    # Class 0: 2 right, union 2 + 1 + 1; class 1: 1 of 2; class 2: 1, union 2; class 3: nowhere.
    assert [row["iou"] for row in result.classes] == [50.0, 50.0, 50.0, None]
    assert result.miou == 50.0
    assert result.pixel_accuracy == pytest.approx(100 * 4 / 6) and result.pixels == 6
    assert result.class_accuracy == pytest.approx(100 * (2 / 3 + 1 / 2 + 1) / 3)
    monkeypatch.setattr(
        Known, "predict", lambda self, x: x.new_full((1, 4, *x.shape[2:]), torch.nan)
    )
    with pytest.raises(RunFailed, match="6 pixels are not finite"):
        evaluate(Known(), batches, 4, Inference(), **options)


# ---- Runs --------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_run_writes_what_it_names(whole: Path) -> None:
    found = training(whole)
    assert [r["step"] for r in found if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in found if r["kind"] == "eval"] == [3, 6]
    assert all(0 <= r["miou"] <= 100 for r in found if r["kind"] == "eval")
    result = json.loads((whole / "result.json").read_text())
    assert len(result["per_class"]) == 4 and result["step"] == 6
    assert result["miou"] == [r["miou"] for r in found if r["kind"] == "eval"][-1]
    assert result["best"]["miou"] == max(r["miou"] for r in found if r["kind"] == "eval")
    assert (whole / "per_class.txt").read_text().startswith("class")
    events = EventAccumulator(str(whole / "segment"), size_guidance={"images": 9}).Reload()
    assert [e.step for e in events.Images("segmentation")] == [3, 6]
    assert {p.name for p in (whole / "pictures").iterdir()} == {
        "iteration-3.png", "iteration-6.png",
    }  # fmt: skip
    best = load_file(whole / BEST)
    assert best["task"] == "segment" and best["step"] == result["best"]["step"]
    assert best["classes"] == [f"class {i}" for i in range(4)]


SWITCHES = {
    "accumulation": ["--accum_iter=2", "--loss_mean=valid"],
    "no distortion": ["--no_distortion", "--no_flip", "--cat_max_ratio=1"],
    "whole": ["--inference=whole", "--flip"],
    "scales": ["--multi_scale", "--flip"],
    "bias and scales": ["--relative_bias", "--lscale_init=1"],
    "bf16": ["--precision=bf16"],
    "fp16": ["--precision=fp16", "--clip_grad=1"],
    "less memory": ["--grad_checkpointing"],
    "oblong": ["--input_size=24x40"],
    "no evaluation": ["--eval_every=0", "--save_every=1", "--keep=1"],
    "base rate": ["--blr=1e-2", "--aux_weight=0"],
    "data is checked": ["--check_data", "--pictures=0"],
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", SWITCHES)
def test_every_switch_trains(case: str, data: str, tmp_path: Path) -> None:
    segment(tmp_path, data, "--iterations=2", "--val_images=2", *SWITCHES[case])
    found = training(tmp_path)
    train = [r for r in found if r["kind"] == "train"]
    assert len(train) == 2 and all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in train)
    assert len([r for r in found if r["kind"] == "eval"]) == (case != "no evaluation")
    numbered = {p.name for p in tmp_path.glob("checkpoint-[0-9]*")}
    assert numbered == ({"checkpoint-2.pth"} if case == "no evaluation" else set())


@pytest.mark.smoke
def test_garments_and_ade20k(tmp_path: Path) -> None:
    write_ade20k(tmp_path / "ade")
    flags = ["--iterations=1", "--eval_every=1"]
    segment(tmp_path / "a", f"--data_path={tmp_path / 'ade'}", *flags, "--dataset=ade20k")
    assert len(json.loads((tmp_path / "a/result.json").read_text())["per_class"]) == 150
    sizes = ["--dataset=garments", "--scene_size=32", "--val_images=2", "--train_images=2"]
    main_segment.main([*SMALL, *NEW, *sizes, *flags, f"--output_dir={tmp_path / 'g'}"])
    rows = json.loads((tmp_path / "g/result.json").read_text())["per_class"]
    assert [row["class"] for row in rows][:3] == ["background", "T-shirt/top", "Trouser"]


@pytest.mark.parametrize("stop_at", [2, 3, 4, 6])
def test_stopped_and_resumed_ends_in_the_same_bits(
    stop_at: int, data: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch, where a measurement is due, after an epoch, and at the end."""
    original, steps = Agreement.after_step, [0]

    def after_step(self: Agreement) -> Wish:
        steps[0] += 1
        return Wish(stop=signal.SIGTERM) if steps[0] == stop_at else original(self)

    monkeypatch.setattr(Agreement, "after_step", after_step)
    with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
        segment(tmp_path, data)
    assert load_file(tmp_path / LAST)["step"] == stop_at
    segment(tmp_path, data)
    assert not different(load_file(whole / LAST), load_file(tmp_path / LAST))
    assert training(whole) == training(tmp_path)
    assert load_file(whole / BEST)["step"] == load_file(tmp_path / BEST)["step"]


def test_ended_while_measuring(
    data: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training before it is not done again, the measurement is."""

    def evaluate(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(eval_segment, "evaluate", evaluate)
        with pytest.raises(SystemExit, match=str(EXIT_INTERRUPTED)):
            segment(tmp_path, data)
    assert load_file(tmp_path / LAST)["step"] == 3
    segment(tmp_path, data)
    assert not different(load_file(whole / LAST), load_file(tmp_path / LAST))
    assert training(whole) == training(tmp_path)


def test_prefetch_factor_reaches_the_loader(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def train(model: nn.Module, loader: DataLoader, *rest: Any, **more: Any) -> None:
        found.append(loader.prefetch_factor)
        raise KeyboardInterrupt

    monkeypatch.setattr(main_segment, "train_steps", train)
    with pytest.raises(SystemExit, match=str(EXIT_INTERRUPTED)):
        segment(tmp_path, data, "--num_workers=1", "--prefetch_factor=7")
    assert found == [7]


def test_other_numbers_are_refused(data: str, whole: Path, run_main) -> None:
    flags = [*SMALL, *NEW, data, f"--output_dir={whole}", "--loss_mean=valid"]
    code, _, err = run_main("main_segment", flags)
    assert code == 2 and "loss_mean: was all, is valid" in err


@pytest.mark.parametrize("resize", ["rescale", "extend"])
def test_starts_from_pretrained_weights(resize: str, data: str, tmp_path: Path) -> None:
    """Of another size; the encoder says what it is, LScale among it."""
    torch.manual_seed(0)
    arguments = {
        "img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2,
        "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "lscale_init": 0.5,
        "pos_offset": "center",
    }  # fmt: skip
    model = create_model("mae_vit_micro_patch8", **arguments)
    (tmp_path / "pre").mkdir()
    state = {
        "task": "pretrain", "step": 1, "model": model.state_dict(), "model_args": arguments,
        "model_name": "mae_vit_micro_patch8",
    }  # fmt: skip
    path = save_checkpoint(tmp_path / "pre", state)
    flags = [f"--finetune={path}", f"--pos_resize={resize}", "--lr=1e-9", "--iterations=1"]
    main_segment.main([*SMALL, data, f"--output_dir={tmp_path / 'run'}", *flags])
    loaded = load_file(tmp_path / "run" / LAST)
    assert loaded["model_args"]["embed_dim"] == 32 and loaded["model_args"]["img_size"] == [32, 32]
    key = "blocks.2.attn.qkv.weight"
    own = loaded["model"][f"encoder.{key}"]
    assert torch.allclose(own, model.state_dict()[key], atol=1e-6)
    assert torch.allclose(
        loaded["model"]["encoder.blocks.0.ls1.gamma"], torch.full((32,), 0.5), atol=1e-6
    )


# ---- Measuring and predicting ------------------------------------------------------------------


def confusion(folder: Path, path: Path, classes: int) -> np.ndarray:
    """Counts of the maps in a folder against the masks of `write_pairs`, by numpy."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    for file in sorted((path / "val/masks").iterdir()):
        truth, guess = (np.asarray(Image.open(p)) for p in (file, folder / "maps" / file.name))
        assert truth.shape == guess.shape
        counted = truth != 255
        np.add.at(counts, (truth[counted], guess[counted]), 1)
    return counts


def test_predict_and_eval_agree(data: str, whole: Path, tmp_path: Path, run_main) -> None:
    """The maps that --predict writes, counted here, give the numbers that --eval gives."""
    root = Path(data.removeprefix("--data_path="))
    flags = [*SMALL, f"--resume={whole / LAST}"]
    out = tmp_path / "predicted"
    images = f"--predict={root / 'val/images'}"
    assert run_main("main_segment", [*flags, images, f"--output_dir={out}"])[0] == 0
    folder = tmp_path / "measured"
    code, told, err = run_main("main_segment", [*flags, "--eval", data, f"--output_dir={folder}"])
    assert code == 0, err
    counts = confusion(out, root, 4)
    right, rows, columns = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    iou = 100 * right / (rows + columns - right)
    result = json.loads((folder / "result-eval.json").read_text())
    assert result["miou"] == pytest.approx(iou.mean(), abs=1e-9)
    assert result["pixel_accuracy"] == pytest.approx(100 * right.sum() / counts.sum(), abs=1e-9)
    share = [right.sum() / counts.sum(), (right / rows).mean()]
    numbers = "  pixel accuracy {:.2f}  class accuracy {:.2f}".format(*(100 * s for s in share))
    assert f"mIoU {iou.mean():.2f}{numbers}  (8 images)" in told
    assert [row["iou"] for row in result["per_class"]] == pytest.approx(iou.tolist(), abs=1e-9)
    assert result["miou"] == json.loads((whole / "result.json").read_text())["miou"]
    assert (folder / "pictures/eval.png").exists()
    # In the run's own folder too its result stays; a measurement of another kind is set aside.
    own, files = tmp_path / "own", ("result.json", "per_class.txt", LAST)
    own.mkdir()
    for name in files:
        shutil.copy(whole / name, own / name)
    before = [(own / name).read_bytes() for name in files]
    for more in ([], ["--flip"]):
        flags = [*SMALL, f"--resume={own / LAST}", "--eval", data, f"--output_dir={own}", *more]
        assert run_main("main_segment", flags)[0] == 0
    assert [(own / name).read_bytes() for name in files] == before
    aside = json.loads((own / "result-eval-1.json").read_text())
    assert aside["miou"] == result["miou"] and not aside["measured"]["flip"]
    assert (own / "pictures/eval-1.png").exists() and (own / "per_class-eval-1.txt").exists()
    # A map is read as indices and seen as colours; the overlay has the image's size.
    first = Image.open(out / "maps/p0.png")
    assert first.mode == "P" and first.size == Image.open(out / "overlays/p0.png").size == (30, 20)
    assert (out / "classes.txt").read_text().splitlines()[0] == "class 0"


@pytest.mark.parametrize("workers", [None, 0, 2])
@pytest.mark.parametrize("stats", [None, ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))])
def test_maps_are_made_with_what_is_given(
    workers: int | None, stats: tuple | None, data: str, tmp_path: Path, monkeypatch
) -> None:
    """Statistics and loading processes; where none are given, ImageNet's and the machine's."""
    seen: dict[str, Any] = {}

    def loader(source: Any, scale: Any, workers: int, procs: Any) -> list:
        seen["workers"], seen["source"] = workers, (source.mean, source.std)
        return []

    def predict(*rest: Any, mean: Any, std: Any, **more: Any) -> list:
        seen["stats"] = mean, std
        return []

    monkeypatch.setattr(engine_segment, "eval_loader", loader)
    monkeypatch.setattr(engine_segment, "predict", predict)
    monkeypatch.setattr(engine_segment, "default_workers", lambda local_size: 7 * local_size)
    images = Path(data.removeprefix("--data_path=")) / "val/images"
    mean, std = stats or (None, None)
    engine_segment.write_label_maps(
        create_segmenter("vit_micro_patch8", 4, img_size=32), [images], tmp_path / "out", None,
        engine_segment.Inference(), Processes(0, 1, 0, 1, torch.device("cpu")), flag="--predict",
        scale=(48, 32), mean=mean, std=std, num_workers=workers, max_pixels=None,
    )  # fmt: skip
    assert seen["workers"] == (7 if workers is None else workers)
    assert seen["stats"] == seen["source"] == (stats or (IMAGENET_MEAN, IMAGENET_STD))


def test_eval_looks_at_images_as_training_did(
    data: str, whole: Path, tmp_path: Path, run_main
) -> None:
    """A default of another size would measure another number without a word."""
    trained = {"resize": [48, 32], "inference": "slide", "window": (32, 32), "stride": (24, 24)}
    assert trained.items() <= load_file(whole / LAST)["data"].items()
    flags = ["--device=cpu", "--dataset=folder", data, f"--resume={whole / LAST}", "--eval"]
    numbers = []
    for given in ([], ["--resize", "24", "16"]):
        folder = tmp_path / f"{len(given)}"
        code, out, err = run_main("main_segment", [*flags, *given, f"--output_dir={folder}"])
        assert code == 0, err
        resize = "" if given else "--resize 48 32, "
        assert f"as in its training: {resize}--window 32x32, --stride 24x24" in out
        numbers.append(json.loads((folder / "result-eval.json").read_text())["miou"])
    assert numbers[0] == json.loads((whole / "result.json").read_text())["miou"] != numbers[1]


def test_a_map_is_the_models_own(whole: Path, data: str, tmp_path: Path, run_main) -> None:
    """One image by hand: resize, normalise, model, resize, highest class."""
    root = Path(data.removeprefix("--data_path="))
    file = root / "val/images/p2.jpg"
    flags = [*SMALL, f"--resume={whole / LAST}", "--inference=whole", f"--predict={file}"]
    assert run_main("main_segment", [*flags, f"--output_dir={tmp_path}"])[0] == 0
    model = load_segmenter(str(whole / LAST))[0].eval()
    pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float()
    assert pixels.shape[2:] == (22, 28)
    # (48, 32): the long side allows 1.71, the short one 1.4545.
    resized = F.interpolate(pixels, (32, 41), mode="bilinear", align_corners=False).round()
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        logits = model.predict((resized / 255 - mean) / std)
    expected = F.interpolate(logits, (22, 28), mode="bilinear", align_corners=False).argmax(dim=1)
    found = np.asarray(Image.open(tmp_path / "maps/p2.png"))
    assert (found == expected[0].numpy()).mean() > 0.99  # a tie in rounding gray levels may differ


# ---- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_bad_data_ends_with_one_message(fault, tmp_path: Path, run_main) -> None:
    write_pairs(tmp_path / "data")
    fault(tmp_path / "data")
    flags = [
        *SMALL, *NEW, f"--data_path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'run'}",
        "--nb_classes=4", "--check_data",
    ]  # fmt: skip
    code, _, err = run_main("main_segment", flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_bad_pair_met_while_training(tmp_path: Path, run_main) -> None:
    """In a loading process: still one line, with the file."""
    write_pairs(tmp_path / "data")
    for path in (tmp_path / "data/train/masks").iterdir():
        Image.fromarray(np.full(np.asarray(Image.open(path)).shape, 77, np.uint8)).save(path)
    flags = [*SMALL, *NEW, f"--data_path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'run'}"]
    code, _, err = run_main("main_segment", [*flags, "--nb_classes=4", "--num_workers=1"])
    message = err.rpartition("error: ")[2]  # the progress bar stands before it
    assert code == 2 and "Traceback" not in err and message.count("\n") == 1
    assert "train/masks/p" in message and "holds the value 77" in message


BAD_FLAGS = {
    "no model": ([], "--model NAME to train from scratch"),
    "one image": ([*NEW, "--batch_size=1"], "--batch_size 2"),
    "no image": ([*NEW, "--predict=nowhere"], "holds no segmenter"),
    "two commands": ([*NEW, "--predict=x", "--eval"], "give one of them"),
    "ratios": ([*NEW, "--ratio_range", "2", "1"], "MIN is above MAX"),
    "patches": ([*NEW, "--input_size=30"], "multiple of the patch size"),
    "windows": ([*NEW, "--stride=64"], "must be at most --window"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_end_with_one_message(case: str, data: str, tmp_path: Path, run_main) -> None:
    flags, expected = BAD_FLAGS[case]
    code, _, err = run_main("main_segment", [*SMALL, data, f"--output_dir={tmp_path}", *flags])
    assert code == 2 and expected in err and err.strip().splitlines()[-1].startswith("error: ")


def test_weights_that_are_no_segmenter(data: str, tmp_path: Path, run_main) -> None:
    path = tmp_path / "encoder.pth"
    torch.save({"model": create_model("vit_micro_patch8", num_classes=0).state_dict()}, path)
    flags = [*SMALL, data, "--eval", f"--resume={path}", f"--output_dir={tmp_path / 'run'}"]
    code, _, err = run_main("main_segment", flags)
    assert code == 2 and "holds no segmenter" in err


def test_a_model_that_the_weights_are_not(data: str, tmp_path: Path, run_main) -> None:
    """Said, and not passed over: the run would have another name than its model."""
    path = tmp_path / "encoder.pth"
    torch.save({"model": create_model("vit_micro_patch8", num_classes=0).state_dict()}, path)
    words = [*SMALL, data, f"--finetune={path}", f"--output_dir={tmp_path / 'run'}"]
    code, _, err = run_main("main_segment", [*words, "--model=vit_tiny_patch8"])
    assert code == 2 and "has a different architecture: embed_dim 128" in err


def test_a_checkpoint_s_classes_are_not_overruled(
    data: str, whole: Path, tmp_path: Path, run_main
) -> None:
    flags = [*SMALL, data, f"--resume={whole / LAST}", f"--output_dir={tmp_path / 'run'}"]
    code, _, err = run_main("main_segment", [*flags, "--eval", "--nb_classes=1"])
    assert code == 2 and "--nb_classes 1, but" in err and "says 4" in err


# ---- Several processes -------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize("mean", ["all", "valid"])
def test_two_processes_do_what_one_does(mean: str, data: str, tmp_path: Path) -> None:
    """The same global batch, losses of the first step and measurement; statistics over both."""
    flags = [
        *SMALL, *NEW, data, f"--loss_mean={mean}", "--drop_path=0", "--dropout=0", "--iterations=2",
        "--eval_every=2",
    ]  # fmt: skip
    losses = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        own = [f"--batch_size={4 // world}", f"--output_dir={folder}"]
        children = launch([*flags, *own], folder / "out", world, module="main_segment")
        assert wait(children) == [0] * world, (folder / "out").read_text()
        losses[world] = [r["loss"] for r in training(folder) if r["kind"] == "train"]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)  # float32, lr up to 1e-3
    results = []
    for world in (1, 2):  # one checkpoint, measured by one and by two
        folder = tmp_path / f"eval{world}"
        folder.mkdir()
        own = ["--eval", f"--resume={tmp_path / '1' / LAST}", f"--output_dir={folder}"]
        children = launch([*flags, *own], folder / "out", world, module="main_segment")
        assert wait(children) == [0] * world, (folder / "out").read_text()
        results.append(json.loads((folder / "result-eval.json").read_text()))
    assert results[0] == results[1]


# ---- Recipes and Slurm -------------------------------------------------------------------------


def test_recipes_hold_flags_that_the_command_takes() -> None:
    """And the published one is the defaults, but for what the public run adds."""
    plain = main_segment.build_parser().parse([])
    for name in ("ade20k", "garments"):
        args = main_segment.build_parser().parse([f"--config={ROOT}/recipes/{name}.yaml"])
        assert args.dataset == name
        if name == "ade20k":
            changed = {k for k, v in vars(args).items() if v != vars(plain)[k]}
            assert changed == {
                "config", "relative_bias", "lscale_init", "precision", "output_dir", "lr",
            }  # fmt: skip
            assert args.lr == segment_flags.LR and plain.lr is None


def test_the_job_runs_this_command(tmp_path: Path, run_main) -> None:
    flags = [f"--job_dir={tmp_path}/job", "--dry_run", "--local", "--ngpus=0", *NEW, "--seed=7"]
    code, out, err = run_main("submitit_segment", flags)
    assert code == 0, err
    assert "main_segment.py" in out and "--seed=7" in out
