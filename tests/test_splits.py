"""--val_fraction: the images that are held out of train, in every command that measures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_segment_data import write_pairs

import main_finetune
import main_knn
import main_pack
import main_pretrain
import main_segment
import main_visualize
from util.data.datasets import build_dataset
from util.data.source import ArraySource
from util.data.splits import HoldOut, draw_ranks, hold_out
from util.train.checkpoint import load_file
from util.train.results import MEASURED, make_identity, set_others_aside

TINY = ["--batch_size=6", "--num_workers=0", "--device=cpu", "--log_every=1"]
PRETRAIN = [
    *TINY, "--model=mae_vit_micro_patch4", "--input_size=16", "--epochs=1", "--warmup_epochs=0",
]  # fmt: skip
FINETUNE = [*TINY, "--model=vit_micro_patch4", "--input_size=16", "--epochs=2", "--aa=none"]


def ranks(count: int, seed: int) -> np.ndarray:
    """Of so many images in memory, all of one class."""
    labels = np.zeros(count, dtype=np.int64)
    images = np.zeros((count, 4, 4), dtype=np.uint8)
    return draw_ranks(ArraySource("some", "train", (images, labels), ((0.5,), (0.5,)), ["x"]), seed)


# ---- The draw ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_each_class_gives_its_share(fraction: float) -> None:
    labels = np.random.default_rng(0).integers(0, 7, 1000) ** 2
    held = hold_out(ranks(1000, 5), fraction, labels)
    assert len(held) == round(1000 * fraction) and (np.diff(held) > 0).all()
    for label in np.unique(labels):
        expected = fraction * (labels == label).sum()
        assert abs((labels[held] == label).sum() - expected) < 1


def test_it_is_a_function_of_the_seed() -> None:
    draws = [hold_out(ranks(500, seed), 0.2).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    # Of this program for ever: a choice must be repeatable.
    assert hold_out(ranks(20, 0), 0.25).tolist() == GOLDEN
    counts = np.zeros(50)
    for seed in range(400):
        counts[hold_out(ranks(50, seed), 0.2)] += 1
    assert counts.min() > 45 and counts.max() < 120  # 80 ± 8 each


GOLDEN = [3, 6, 13, 14, 16]


def test_more_is_these_and_others() -> None:
    few, many = (set(hold_out(ranks(300, 3), f).tolist()) for f in (0.1, 0.3))
    assert few < many


def test_a_class_keeps_an_image() -> None:
    labels = [0, 1, 2, 2, 2, 2]
    held = hold_out(ranks(6, 0), 0.7, labels)
    assert set(held.tolist()) < {2, 3, 4, 5} and len(held) == 3
    assert not len(hold_out(ranks(3, 0), 0.5, [0, 1, 2]))


def test_a_copy_of_a_set_holds_out_the_same(tmp_path: Path) -> None:
    """Packed, and in memory."""
    main_pack.main(["--dataset=digits", f"--output_dir={tmp_path}", "--format=raw"])
    held = HoldOut(0.1, 4)
    parts = [
        held.open(lambda part, data=data: build_dataset(data[0], part, data[1]), "val")
        for data in (("digits", None), ("imagefolder", f"packed:{tmp_path}"))
    ]
    assert parts[0].split == "val" and len(parts[0]) == 150
    assert np.array_equal(*(part.labels for part in parts))
    for i in range(0, 150, 30):
        assert np.array_equal(np.asarray(parts[0][i][0]), np.asarray(parts[1][i][0]))


def test_a_copy_that_lacks_an_image_holds_out_the_same(shapes: Path, tmp_path: Path) -> None:
    """Of each class no more than one other: shares are counted anew. Packed, one is broken."""

    def names(place: str) -> set[str]:
        held = HoldOut(0.25, 3)
        part = held.open(lambda p: build_dataset("imagefolder", p, place), "val")
        return {f"{part.labels[i]}/{Path(part.file_name(i)).name}" for i in range(len(part))}

    before = names(str(shapes))
    (shapes / "train/a/00.png").write_bytes(b"broken")
    main_pack.main([f"--data_path={shapes}", f"--output_dir={tmp_path / 'p'}", "--split", "train"])
    packed = names(f"packed:{tmp_path / 'p'}")
    (shapes / "train/a/00.png").unlink()
    assert names(str(shapes)) == packed
    for label in "012":
        old, new = ({n for n in part if n[0] == label} - {"0/00.png"} for part in (before, packed))
        assert len(old ^ new) <= 1


# ---- The commands ------------------------------------------------------------------------------


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A folder of three classes without val: 12, 20 and 28 images."""
    root = tmp_path / "shapes"
    rng = np.random.default_rng(1)
    for label, (name, count) in enumerate({"a": 12, "b": 20, "c": 28}.items()):
        (root / "train" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 80, (20, 20, 3)) + 80 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / "train" / name / f"{i:02}.png")
    return root


def test_all_commands_hold_out_the_same(shapes: Path, tmp_path: Path) -> None:
    """And nobody learns from these: 15 of 60 images, a quarter of each class."""
    data = [f"--data_path={shapes}", "--val_fraction=0.25", "--val_seed=3"]
    run = tmp_path / "run"
    main_pretrain.main(
        [*PRETRAIN, *data, "--eval_every=1", "--picture_every=1", f"--output_dir={run}"]
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["images"] for r in records if r["kind"] == "eval"] == [15]
    assert load_file(run / "checkpoint-last.pth")["arithmetic"]["images"] == 45
    main_finetune.main([*FINETUNE, *data, f"--output_dir={run}"])
    result = json.loads((run / "result.json").read_text())
    where = "0.25 of train, held out (val_seed 3)"
    assert (result["images"], result["measured_on"]) == (15, where)
    assert result["best_chosen_on"] == where
    last = str(run / "checkpoint-last.pth")
    out = [f"--checkpoint={last}", f"--output_dir={run}", "--device=cpu"]
    main_knn.main([*out, *data, "--save_features", "--k=3", "--num_workers=0"])
    assert json.loads((run / "knn.json").read_text())["measured_on"] == where
    labels = [np.bincount(np.load(run / f"labels-{s}.npy")).tolist() for s in ("train", "val")]
    assert labels == [[9, 15, 21], [3, 5, 7]]
    # What kNN calls val is what the definition says of the listing.
    train = build_dataset("imagefolder", "train", shapes)
    held = hold_out(draw_ranks(train, 3), 0.25, np.repeat([0, 1, 2], [12, 20, 28]))
    features = [np.load(run / f"features-{s}.npy") for s in ("train", "val")]
    both = [f"--data_path={twice(shapes, tmp_path)}", f"--output_dir={tmp_path / 'all'}"]
    main_knn.main([*out, *both, "--save_features", "--k=3", "--num_workers=0"])
    whole = np.load(tmp_path / "all" / "features-val.npy")
    np.testing.assert_allclose(features[1], whole[held], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features[0], np.delete(whole, held, axis=0), rtol=1e-5, atol=1e-6)


def twice(shapes: Path, tmp_path: Path) -> Path:
    """The same images as train and as val."""
    root = tmp_path / "twice"
    for split in ("train", "val"):
        shutil.copytree(shapes / "train", root / split)
    return root


def test_a_choice_and_the_measurement_after_it(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Chosen on held-out images of train, measured on val."""
    root, run = twice(shapes, tmp_path), tmp_path / "run"
    main_finetune.main(
        [*FINETUNE, f"--data_path={root}", "--val_fraction=0.2", f"--output_dir={run}"]
    )
    assert capsys.readouterr().out.count(f"{root / 'val'} is not used") == 1
    for name, chosen in (("best", "0.2 of train, held out (val_seed 0)"), ("last", None)):
        main_finetune.main(
            ["--eval", f"--resume={run}/checkpoint-{name}.pth", f"--data_path={root}",
             f"--output_dir={run}", "--device=cpu", "--num_workers=0"]
        )  # fmt: skip
        result = json.loads((run / "result-eval.json").read_text())
        assert (result["images"], result["measured_on"]) == (60, "val")
        assert result["chosen_on"] == chosen


def test_other_images_than_its_run_held_out_are_told(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """They are images that it has learnt from."""
    run, data = tmp_path / "run", f"--data_path={shapes}"
    main_finetune.main([*FINETUNE, data, "--val_fraction=0.25", f"--output_dir={run}"])
    last = f"{run}/checkpoint-last.pth"
    common = [data, f"--output_dir={run}", "--device=cpu", "--num_workers=0"]
    for held, told in ((["--val_seed=1"], True), ([], False)):
        flags = [*common, "--val_fraction=0.25", *held]
        capsys.readouterr()
        main_finetune.main(["--eval", f"--resume={last}", *flags])
        said = capsys.readouterr().out
        assert ("other images (0.25 of train, val_seed 0)" in said) == told
        assert f"imagefolder 0.25 of train, held out (val_seed {len(held)}): top-1" in said
        result = json.loads((run / "result-eval.json").read_text())
        assert ("warning" in result) == told
        main_knn.main([f"--checkpoint={last}", "--k=3", *flags])
        assert ("learnt from" in capsys.readouterr().out) == told
        assert ("warning" in json.loads((run / "knn.json").read_text())) == told


def test_segmentation_holds_out_too(tmp_path: Path) -> None:
    root, run = tmp_path / "pairs", tmp_path / "run"
    write_pairs(root, count=12)
    shutil.rmtree(root / "val")
    main_segment.main(
        [*TINY, "--dataset=folder", f"--data_path={root}", "--model=vit_micro_patch8",
         "--input_size=16", "--resize", "24", "16", "--window=16", "--stride=16", "--channels=8",
         "--aux_channels=8", "--iterations=2", "--eval_every=2", "--warmup_iterations=0",
         "--pictures=0", "--batch_size=4", "--val_fraction=0.25", f"--output_dir={run}"]
    )  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    assert load_file(run / "checkpoint-last.pth")["arithmetic"]["images"] == 9
    assert result["measured_on"].startswith("0.25 of train")
    measure = main_segment.build_parser().parse(
        ["--dataset=folder", f"--data_path={root}", "--val_fraction=0.25"]
    )
    parts = [main_segment.open_set(measure, split) for split in ("train", "val")]
    names = [[part.file_name(i) for i in range(len(part))] for part in parts]
    assert len(names[1]) == 3 and len({*names[0], *names[1]}) == 12


def test_pictures_and_their_measurement(shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = [f"--data_path={shapes}", "--val_fraction=0.1"]
    main_pretrain.main(
        [*PRETRAIN, *data, "--eval_every=1", "--eval_images=99", f"--output_dir={run}"]
    )
    main_visualize.main(
        [f"--checkpoint={run}/checkpoint-last.pth", *data, "--measure", "--num_images=99",
         f"--output_dir={run}", "--device=cpu"]
    )  # fmt: skip
    result = json.loads((run / "reconstruction.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = next(r for r in records if r["kind"] == "eval")
    assert result["images"] == own["images"] == 6 and "held out" in result["measured_on"]
    assert result["model_psnr"] == pytest.approx(own["model_psnr"], abs=1e-4)


def test_a_run_goes_on_with_the_same_images_alone(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = [*PRETRAIN, f"--data_path={shapes}", "--picture_every=0", f"--output_dir={tmp_path}/r"]
    main_pretrain.main([*flags, "--val_fraction=0.1"])
    for change in ([], ["--val_fraction=0.2"], ["--val_fraction=0.1", "--val_seed=1"]):
        with pytest.raises(SystemExit, match="2"):
            main_pretrain.main([*flags, *change])
        assert "val_" in capsys.readouterr().err


@pytest.mark.parametrize("fraction", ["0.001", "0.999"])
def test_too_few_images(
    fraction: str, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main_pretrain.main(
            [*PRETRAIN, f"--data_path={shapes}", f"--val_fraction={fraction}",
             f"--output_dir={tmp_path}/r"]
        )  # fmt: skip
    expected = {"0.001": "0.001 of 60 images holds 0 out", "0.999": "fewer than one global batch"}[
        fraction
    ]
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--dry_run_images=1000"]])
def test_the_plan_knows_it(given: list[str], shapes: Path, tmp_path: Path) -> None:
    data = [f"--data_path={shapes}", "--val_fraction=0.25", f"--output_dir={tmp_path}/r", *given]
    left = 750 if given else 45
    args = main_pretrain.build_parser().parse([*PRETRAIN, *data])
    assert main_pretrain.plan_run(args, 1).data.images == left
    args = main_finetune.build_parser().parse([*FINETUNE, *data, "--train_images=30"])
    main_finetune.resolve_tune(args)
    assert main_finetune.plan_run(args, 1).data.images == 30


def test_a_result_of_before_these_flags_is_of_the_same(tmp_path: Path) -> None:
    """What was not given leaves no trace, and what was given does."""
    settings = {"dataset": "digits", "val_images": None}
    old = {"checkpoint": str(tmp_path / "c.pth"), "step": 7, **settings}
    path = tmp_path / "result.json"
    path.write_text(json.dumps({MEASURED: old}))
    settings |= {"val_fraction": None, "val_seed": 0, "weights_key": None}
    same = make_identity(old["checkpoint"], 7, settings)
    set_others_aside(tmp_path, ["result.json"], same)
    assert path.is_file()
    for name, value in (("val_fraction", 0.1), ("weights_key", "teacher"), ("val_images", 3)):
        path.write_text(json.dumps({MEASURED: old}))
        other = make_identity(old["checkpoint"], 7, settings | {name: value})
        set_others_aside(tmp_path, ["result.json"], other)
        assert not path.exists(), name
