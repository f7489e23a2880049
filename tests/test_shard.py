"""Models in shards: numbers, checkpoints and decisions of whole ones at a share of the memory."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import TINY, launch, start_group, wait, wait_for_step
from runs import records
from test_processes import NoHostSync, break_loss

from models_zoo import create_model, create_segmenter
from util.errors import EXIT_STOPPED
from util.train import shard as sharding
from util.train.checkpoint import LAST, load_file
from util.train.dist import Processes, distribute, processes
from util.train.optim import create_adamw, parameter_groups
from util.train.shard import Placed, local, optimizer_parts
from util.train.step import OptimizerStep

# Widths that neither 2 nor 3 divide in every parameter; tokens and codes have one row.
ODD = {
    "img_size": 16, "embed_dim": 20, "num_heads": 5, "decoder_embed_dim": 28,
    "decoder_num_heads": 7, "depth": 2, "decoder_depth": 2, "lscale_init": 0.1,
    "pos_offset": "learned",
}  # fmt: skip
STEPS, IMAGES, ACCUM_ITER = 4, 12, 2


def build(decoder: str, procs: Any, shard: bool) -> tuple[Placed, torch.optim.AdamW]:
    """A float64 model, which starts alike on all processes whatever their generators say."""
    torch.manual_seed(0 if procs.main or not shard else 7)
    model = create_model("mae_vit_micro_patch4", **ODD, decoder=decoder).double()
    placed = Placed(model, procs, shard=shard)
    return placed, create_adamw(parameter_groups(model, 0.05), 1e-3, (0.9, 0.95))


def elements(optimizer: torch.optim.Optimizer) -> list[int]:
    """Values that this process keeps: parameters that learn, the optimiser's state, its memory."""
    state = [local(t) for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    parameters = [local(p) for g in optimizer.param_groups for p in g["params"]]
    stored = sum(t.untyped_storage().nbytes() // t.itemsize for t in state)
    return [sum(p.numel() for p in parameters), sum(t.numel() for t in state), stored]


def train(rank: int, world: int, decoder: str, shard: bool, out: Path) -> None:
    """Float64 steps on the same images, however many processes; with a load in the middle."""
    with processes("cpu", out) as procs:
        placed, optimizer = build(decoder, procs, shard)
        norms = []
        for number in range(STEPS):
            if number == STEPS // 2:  # a new model goes on from the state of the old one
                states = placed.full(placed.model.state_dict()), placed.full(optimizer.state_dict())
                weights, state = procs.gather(states)[0]
                placed, optimizer = build(decoder, procs, shard)
                placed.model.load_state_dict(placed.parts(weights))
                optimizer.load_state_dict(optimizer_parts(optimizer, state))
            trained = distribute(placed.model, procs)
            step = OptimizerStep(
                trained, optimizer, device=procs.device, accum_iter=ACCUM_ITER, clip_grad=0.2
            )
            generator = torch.Generator().manual_seed(number)
            images = torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
            mask = torch.rand(IMAGES, 16, generator=generator).argsort(1) >= 4
            rows = torch.arange(IMAGES).reshape(ACCUM_ITER, world, -1)[:, rank]
            result = step(
                lambda i, m=trained, x=images, k=mask: m(x[i], k[i], 4)["loss"], rows, 1e-3
            )
            norms.append(result.grad_norm.item())
        with placed.whole() as whole, torch.inference_mode():
            if procs.main:  # alone
                loss = whole.eval()(images, mask, 4)["loss"].item()
                (out / "loss.json").write_text(json.dumps([norms, loss]))
        kept = procs.gather(elements(optimizer))
        states = placed.full({"model": placed.model.state_dict(), "o": optimizer.state_dict()})
        if procs.main:
            torch.save(states, out / "state.pt")
            (out / "kept.json").write_text(json.dumps(kept))


def numbers_in(state: Any) -> list[float]:
    """Every number in nested dictionaries and lists, in order."""
    if isinstance(state, dict):
        return [n for key in state for n in numbers_in(state[key])]
    if isinstance(state, list):
        return [n for value in state for n in numbers_in(value)]
    if isinstance(state, torch.Tensor):
        return state.double().flatten().tolist()
    return [float(state)] if isinstance(state, int | float) else []


def keys_in(state: Any) -> Any:
    """The same nesting with shapes and dtypes for tensors."""
    if isinstance(state, dict):
        return {key: keys_in(value) for key, value in state.items()}
    if isinstance(state, list):
        return [keys_in(value) for value in state]
    return (type(state), tuple(state.shape), state.dtype) if torch.is_tensor(state) else state


@pytest.mark.dist
@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_shards_change_nothing_but_rounding_and_memory(decoder: str, tmp_path: Path) -> None:
    runs = {(1, False), (2, True)} | ({(3, True)} if decoder == "full" else set())
    states, kept, measured = {}, {}, {}
    for world, shard in sorted(runs):
        out = tmp_path / f"{world}-{shard}"
        out.mkdir()
        assert wait(start_group(train, world, decoder, shard, out)) == [0] * world
        states[world, shard] = torch.load(out / "state.pt")
        kept[world, shard] = json.loads((out / "kept.json").read_text())
        measured[world, shard] = json.loads((out / "loss.json").read_text())
    alone = states[1, False]
    assert min(measured[1, False][0]) > 0.2  # every step was clipped
    for split, state in states.items():
        assert keys_in(state) == keys_in(alone)
        pairs = zip(numbers_in(state), numbers_in(alone), strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-9, split
        assert measured[split][0] == pytest.approx(measured[1, False][0], rel=1e-9)
        assert measured[split][1] == pytest.approx(measured[1, False][1], rel=1e-9)
    ((parameters, moments, _),) = kept[1, False]
    for world in {world for world, shard in runs if shard}:
        # Nothing is kept twice, and nobody keeps much more than his share.
        assert sum(k[0] for k in kept[world, True]) == parameters
        assert sum(k[1] for k in kept[world, True]) == moments == 2 * parameters
        assert max(k[1] for k in kept[world, True]) < 1.1 * moments / world
        # What was loaded does not hold the whole in memory behind its part.
        assert sum(k[2] for k in kept[world, True]) == moments


def distance(a: Path, b: Path, name: str = LAST, part: str = "model") -> float:
    """The largest difference of weights, in checkpoints of one format."""
    first, second = load_file(a / name), load_file(b / name)
    drop = {"arithmetic", "log_bytes", "sums", "best"}
    assert keys_in({k: v for k, v in first.items() if k not in drop}) == keys_in(
        {k: v for k, v in second.items() if k not in drop}
    )
    return max((first[part][k] - second[part][k]).abs().max().item() for k in first[part])


# What one step that is done wrongly, or one skipped too many, makes of the largest difference.
WRONG = 6e-4
FLAGS = [
    *TINY, "--mask=mixed", "--avg_temperature=1", "--pos_offset=jitter", "--lscale_init=0.1",
    "--clip_grad=0.5", "--decoder_depth=2", "--epochs=2",
]  # fmt: skip


@pytest.mark.dist
def test_a_run_goes_on_with_and_without_shards(tmp_path: Path) -> None:
    """Stopped twice in an epoch; pictures and an uneven evaluation (5 images) at its ends."""
    pytest.importorskip("skimage")
    shown = ["--picture_every=1", "--eval_every=1", "--eval_images=5"]
    calm, run, out = tmp_path / "calm", tmp_path / "run", tmp_path / "out"
    assert wait(launch([*FLAGS, *shown, f"--output_dir={calm}"], out)) == [0]
    two = ["--batch_size=6", "--accum_iter=2", "--shard", "--grad_checkpointing"]
    for world, flags, stop in ((2, two, 3), (1, ["--accum_iter=1"], 12), (2, two, None)):
        started = [*FLAGS, *shown, f"--output_dir={run}", *flags]
        children = launch(started, out, world)
        if stop is not None:
            wait_for_step(run, stop, children)
            for child in children:
                child.terminate()
        assert wait(children) == [EXIT_STOPPED if stop else 0] * world, out.read_text()
    assert [r["step"] for r in records(run, "train")] == list(range(1, 21))
    # Sums in other orders, by 20 steps: 4e-7 to 1.1e-5, by the processor.
    assert distance(run, calm) < WRONG / 6
    for kind in ("train", "eval"):
        pairs = zip(records(run, kind), records(calm, kind), strict=True)
        for a, b in pairs:
            keys = [k for k in ("loss", "grad_norm", "model_psnr", "model_ssim") if k in a]
            assert keys and [a[k] for k in keys] == pytest.approx([b[k] for k in keys], rel=1e-4)
    assert {p.name for p in (run / "pictures").iterdir()} == {"epoch-0.png", "epoch-1.png"}
    assert "in 2 shards" in out.read_text()


def watch_and_break(when: int) -> None:
    """As `break_loss`, and a step that makes the host wait for the device fails."""
    break_loss(when)
    original = OptimizerStep.__call__

    def call(self: OptimizerStep, *args: Any) -> Any:
        with NoHostSync():
            return original(self, *args)

    OptimizerStep.__call__ = call  # type: ignore[method-assign]


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_on_one_process_is_skipped_by_all(
    precision: str, tmp_path: Path
) -> None:
    prepare = {"fp32": watch_and_break, "fp16": break_loss}[precision]  # a scaler does wait
    for mode in ("", "--shard"):
        flags = [*FLAGS, f"--output_dir={tmp_path}/run{mode}", "--nan_policy=skip", "--epochs=1"]
        flags += ["--batch_size=12", f"--precision={precision}", *[mode][: len(mode)]]
        assert wait(launch(flags, tmp_path / "out", 2, prepare=partial(prepare, 5))) == [0, 0]
    whole, shards = tmp_path / "run", tmp_path / "run--shard"
    skipped = [[r.get("skipped", 0) for r in records(f, "train")] for f in (whole, shards)]
    assert skipped[0] == skipped[1] and sum(skipped[0]) >= 1 and skipped[0][4] == 1
    assert load_file(whole / LAST)["scaler"] == load_file(shards / LAST)["scaler"]
    losses = [
        [r["loss"] for r in records(f, "train") if not r.get("skipped")] for f in (whole, shards)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    if precision == "fp32":
        assert distance(shards, whole) < WRONG / 6


TUNED: dict[str, Sequence[str]] = {
    "full": ["--drop_path=0.1", "--mixup=0.8", "--ema_decay=0.9", "--grad_checkpointing"],
    "linear": ["--ema_decay=0.9", "--precision=bf16"],
    "partial:0.5": ["--clip_grad=0.5", "--accum_iter=2", "--batch_size=6"],
}


@pytest.mark.dist
@pytest.mark.parametrize("tune", TUNED)
def test_finetuning(tune: str, tmp_path: Path) -> None:
    """Drop path, mixup, averages, LARS with BatchNorm, and blocks of which only a part learns."""
    common = [
        "--dataset=synthetic", "--model=vit_micro_patch4", "--input_size=16", f"--tune={tune}",
        "--train_images=72", "--batch_size=12", "--epochs=2", "--warmup_epochs=1", "--blr=1e-2",
        "--aa=none", "--num_workers=0", "--log_every=1", "--device=cpu", *TUNED[tune],
    ]  # fmt: skip
    for mode in ("", "--shard"):
        flags = [*common, f"--output_dir={tmp_path}/run{mode}", *[mode][: len(mode)]]
        codes = wait(launch(flags, tmp_path / "out", 2, module="main_finetune"))
        assert codes == [0, 0], (tmp_path / "out").read_text()
    whole, shards = tmp_path / "run", tmp_path / "run--shard"
    assert distance(shards, whole) < WRONG / 6
    if "--ema_decay=0.9" in TUNED[tune]:
        assert distance(shards, whole, part="ema") < WRONG / 6
    lines = [(f / "metrics-finetune.jsonl").read_text().splitlines() for f in (shards, whole)]
    a, b = (json.loads(log[-1]) for log in lines)
    assert a["kind"] == "eval" and a["images"] == b["images"] > 0
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


SEGMENT = [
    "--dataset=garments", "--model=vit_micro_patch8", "--input_size=32", "--window=32",
    "--stride=24", "--scene_size=48", "--channels=8", "--aux_channels=8", "--train_images=24",
    "--val_images=3", "--iterations=12", "--warmup_iterations=2", "--eval_every=6",
    "--save_every=6", "--pictures=2", "--batch_size=2", "--accum_iter=2", "--lr=1e-3",
    "--drop_path=0.3", "--dropout=0.1", "--relative_bias", "--lscale_init=1", "--clip_grad=0.5",
    "--loss_mean=valid", "--num_workers=0", "--log_every=1", "--device=cpu",
]  # fmt: skip


@pytest.mark.dist
def test_segmentation_with_and_without_shards(tmp_path: Path) -> None:
    """BatchNorm over processes, biases outside of the blocks; stopped with, gone on without.

    Three images are measured, by two processes, and two are drawn by one of them.
    """

    def run(folder: str, *flags: str, stop: int | None = None) -> Path:
        started = [*SEGMENT, f"--output_dir={tmp_path / folder}", *flags]
        children = launch(started, tmp_path / "out", 2, module="main_segment")
        if stop is not None:
            wait_for_step(tmp_path / folder, stop, children, "segment")
            children[0].terminate()
        codes = wait(children)
        assert codes == [EXIT_STOPPED if stop else 0] * 2, (tmp_path / "out").read_text()
        return tmp_path / folder

    whole, shards = run("whole"), run("shards", "--shard")
    assert "in 2 shards" in (tmp_path / "out").read_text()
    both = [run("both", mode, stop=stop) for mode, stop in (("--shard", 7), ("--no-compile", None))]
    for folder in (shards, both[0]):
        # 12 steps in float32; BatchNorm's statistics are among what is compared.
        assert distance(folder, whole) < WRONG / 6
        lines = [(f / "metrics-segment.jsonl").read_text().splitlines() for f in (folder, whole)]
        for a, b in zip(*[[json.loads(x) for x in log] for log in lines], strict=True):
            keys = [k for k in ("kind", "step", "images") if k in a]
            assert [a[k] for k in keys] == [b[k] for k in keys]
            if a["kind"] == "train":
                # The norm of a step is that of all shards.
                expected = [b["loss"], b["grad_norm"]]
                assert [a["loss"], a["grad_norm"]] == pytest.approx(expected, rel=1e-3)
            elif a["kind"] == "eval":
                assert a["pixel_accuracy"] == pytest.approx(b["pixel_accuracy"], abs=0.5)
        pictures = {p.name for p in (folder / "pictures").iterdir()}
        assert pictures == {"iteration-6.png", "iteration-12.png"}


def test_each_block_is_a_unit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a segmenter's, in its encoder: else all of its weights were gathered at once."""
    cut: list[torch.nn.Module] = []
    monkeypatch.setattr(sharding, "fully_shard", lambda module, mesh: cut.append(module))
    monkeypatch.setattr(sharding.dist, "broadcast", lambda *rest, **more: None)
    monkeypatch.setattr(sharding.dist, "group", SimpleNamespace(WORLD=object()))
    monkeypatch.setattr(sharding.DeviceMesh, "from_group", lambda *rest: None)
    procs = Processes(0, 2, 0, 2, torch.device("cpu"))
    for model, blocks in (
        (create_model("mae_vit_micro_patch4", **ODD), ["blocks", "decoder_blocks"]),
        (create_segmenter("vit_micro_patch8", 3, img_size=32, channels=8), ["encoder.blocks"]),
    ):
        cut.clear()
        Placed(model, procs, shard=True)
        assert cut == [*(b for name in blocks for b in model.get_submodule(name)), model]


def test_one_process_has_nothing_to_share(tmp_path: Path, run_main) -> None:
    flags = [*TINY, f"--output_dir={tmp_path}", "--epochs=1", "--shard"]
    code, out, err = run_main("main_pretrain", flags)
    assert code == 0, err
    assert "whole on each process" in out
    assert "shard" not in load_file(tmp_path / LAST)["arithmetic"]
