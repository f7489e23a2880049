"""The flags that count where main_finetune.py and main_segment.py use a checkpoint.

--eval and --predict read many flags of a training once more, in other lines.
"""

from typing import Any

import pytest
from every_flag import Command, Row, Table, Trace, add_small_models, call, cases, digest
from every_flag_files import write_all, write_pairs, write_tuned
from every_flag_training import names_of

import eval_finetune
import eval_segment
from util.train.checkpoint import LAST

pytestmark = pytest.mark.smoke


def seen(loader: Any, mean: Any, std: Any) -> Trace:
    """What a model is shown."""
    return {
        "images": digest([batch["x"] for batch in loader]),
        "labels": digest([batch["y"] for batch in loader]),
        "held": names_of(loader),
        "statistics": (tuple(mean), tuple(std)),
        "loader": (loader.num_workers, loader.batch_sampler.batch_size),
    }


# ---- A classifier ------------------------------------------------------------------------------

HEAD, NESTED = "--resume={head_official}", "--resume={head_nested}"

CLASSIFIER: Table = {
    "--resume": Row("--resume={other_tuned}", "models"),
    "--finetune": Row(
        "--finetune={other_tuned}", "models", "--finetune={tuned}", without="--resume"
    ),
    "--model": Row("--model=vit_heads_patch4", "models", f"{HEAD} --model=vit_nano_patch4"),
    "--num_heads": Row("--num_heads=4", "models", f"{HEAD} --num_heads=2"),
    "--weights_key": Row("--weights_key=b", "models", f"{NESTED} --weights_key=a --num_heads=2"),
    "--input_size": Row("--input_size=24", "images models"),
    "--pos_resize": Row("--pos_resize=extend", "models", "--input_size=24"),
    "--data_path": Row("--data_path={other}", "images"),
    "--mean": Row("--mean 0.1 0.2 0.3", "statistics"),
    "--std": Row("--std 0.1 0.2 0.3", "statistics"),
    "--val_images": Row("--val_images=3", "images labels held"),
    "--val_fraction": Row("--val_fraction=0.25", "images labels held"),
    "--val_seed": Row("--val_seed=1", "images held", "--val_fraction=0.25"),
    "--batch_size": Row("--batch_size=3", "images labels loader"),
    "--num_workers": Row("--num_workers=1", "loader"),
    "--output_dir": Row("--output_dir={root}/there", "files"),
}


class Classifier(Command):
    """Models that are measured, and what they are shown."""

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """The models and the loader."""
        trace["asked"] = True
        measurement = eval_finetune.measurement

        def watched(loader: Any, source: Any, *rest: Any) -> Any:
            trace.update(seen(loader, source.mean, source.std))
            measure = measurement(loader, source, *rest)

            def measured(model: Any) -> Any:
                heads = model.blocks[0].attn.num_heads
                trace.setdefault("models", []).append((digest(model.state_dict()), heads))
                return measure(model)

            return measured

        patch.setattr(eval_finetune, "measurement", watched)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    root = tmp_path_factory.mktemp("classifier")
    base = ["--eval", "--resume={tuned}", "--data_path={data}", "--dataset=imagefolder"]
    base += ["--device=cpu", "--num_workers=0", "--batch_size=4"]
    return Classifier("main_finetune", base, write_all(root) | write_tuned(root), root)


@cases(CLASSIFIER)
def test_a_classifier_is_measured(row: Row, classifier: Classifier) -> None:
    classifier.check(row)


def test_both_arms_are_measured(classifier: Classifier) -> None:
    """The weights and their averages."""
    assert len(set(classifier.baseline()["models"])) == 2


# ---- A segmenter -------------------------------------------------------------------------------

LOOKS: Table = {
    "--resume": Row("--resume={second}", "models"),
    "--inference": Row("--inference=whole", "inference"),
    "--window": Row("--window=24", "inference"),
    "--stride": Row("--stride=8", "inference"),
    "--multi_scale": Row("--multi_scale", "inference"),
    "--flip": Row("--flip", "inference"),
    "--mean": Row("--mean 0.1 0.2 0.3", "statistics"),
    "--std": Row("--std 0.1 0.2 0.3", "statistics"),
    "--num_workers": Row("--num_workers=1", "loader"),
}
SEGMENTER: Table = LOOKS | {
    "--resize": Row("--resize 32 16", "images"),
    "--data_path": Row("--data_path={other}", "images labels"),
    "--label_map": Row("--label_map 0:1 1:0 2:2 3:3 255:ignore", "labels"),
    "--val_images": Row("--val_images=3", "images labels held"),
    "--val_fraction": Row("--val_fraction=0.25", "images labels held"),
    "--val_seed": Row("--val_seed=1", "images labels held", "--val_fraction=0.25"),
    "--pictures": Row("--pictures=2", "files"),
    "--output_dir": Row("--output_dir={root}/there", "files"),
}
MAPS: Table = LOOKS | {
    "--predict": Row("--predict={other}/val/images", "places"),
    "--resize": Row("--resize 32 16", "scale"),
    "--max_pixels": Row("--max_pixels=2200", "most"),
}


class Segmenter(Command):
    """The model, what it is shown, and how it looks."""

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """What is measured and written."""
        trace["asked"] = True
        evaluate = eval_segment.evaluate

        def measured(model: Any, loader: Any, count: int, inference: Any, **more: Any) -> Any:
            trace.update(seen(loader, more["mean"], more["std"]))
            trace["inference"], trace["models"] = repr(inference), digest(model.state_dict())
            return evaluate(model, loader, count, inference, **more)

        def write(
            model: Any, places: Any, folder: Any, classes: Any, inference: Any, procs: Any,
            **more: Any,
        ) -> None:  # fmt: skip
            trace["inference"], trace["models"] = repr(inference), digest(model.state_dict())
            trace["places"], trace["scale"] = [str(place) for place in places], more["scale"]
            trace["statistics"] = more["mean"], more["std"]
            trace["loader"], trace["most"] = more["num_workers"], more["max_pixels"]

        patch.setattr(eval_segment, "evaluate", measured)
        patch.setattr(eval_segment, "write_label_maps", write)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    root = tmp_path_factory.mktemp("segmenter")
    places = {}
    for seed, name in enumerate(("data", "other")):
        write_pairs(root / name, seed)
        places[name] = str(root / name)
    for seed, name in enumerate(("first", "second")):
        argv = [
            "--dataset=folder", f"--data_path={root}/data", "--model=vit_deep_patch4",
            "--input_size=16", "--resize", "48", "24", "--window=16", "--stride=12", "--lr=0.01",
            "--channels=8", "--aux_channels=8", "--batch_size=2", "--iterations=1",
            "--warmup_iterations=0", "--eval_every=0", "--num_workers=0", "--device=cpu",
            f"--seed={seed}", f"--output_dir={root / name}",
        ]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            add_small_models(patch)
            assert call("main_segment", argv)[2] == 0
        places[name] = str(root / name / LAST)
    base = ["--resume={first}", "--device=cpu", "--num_workers=0", "--dataset=folder"]
    base += ["--data_path={data}", "--pictures=0"]
    return Segmenter("main_segment", base, places, root)


@cases(SEGMENTER)
def test_a_segmenter_is_measured(row: Row, segmenter: Segmenter) -> None:
    segmenter.check(Row(row.flags, row.changes, f"--eval {row.beside}"))


@cases(MAPS)
def test_a_segmenter_writes_maps(row: Row, segmenter: Segmenter) -> None:
    segmenter.check(Row(row.flags, row.changes, "--predict={data}/val/images"))


def test_a_segmenter_looks_as_it_was_trained(segmenter: Segmenter) -> None:
    """Where no flag says otherwise."""
    trace = segmenter.baseline("--eval ")
    assert "window=(16, 16)" in trace["inference"] and "stride=(12, 12)" in trace["inference"]
