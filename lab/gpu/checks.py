"""Whether the framework is right on a device: one function for each part."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import main_pretrain
from lab.bench.peers import create_vitmae
from lab.gpu.parts import Scale, keep
from models_zoo import create_model, model_arguments
from util.errors import EXIT_STOPPED
from util.styles import STYLES
from util.train.agreement import Wish
from util.train.checkpoint import LAST, load_file
from util.train.optim import create_adamw, parameter_groups
from util.train.run import Run
from util.train.step import OptimizerStep

BASE, MICRO = "mae_vit_base_patch16", "mae_vit_micro_patch8"


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


# ---- Parity --------------------------------------------------------------------------------------


def parity(scale: Scale) -> dict[str, Any]:
    """Loss, predictions and gradients against transformers' ViTMAE with the same weights."""
    device, name = torch.device(scale.device), MICRO if scale.tiny else BASE
    arguments = model_arguments(name) | {"norm_pix_loss": True}
    torch.manual_seed(0)
    ours = create_model(name, norm_pix_loss=True)
    theirs = create_vitmae(arguments, arguments["img_size"], 0.75)
    named, _ = STYLES["transformers"].read(theirs.state_dict(), "transformers")
    ours.load_state_dict(named)  # its weights, by our names: every one of them
    ours, theirs = ours.to(device), theirs.to(device)
    patches = ours.num_patches
    images = torch.randn(2 if scale.tiny else 16, 3, *ours.img_size, device=device)
    noise = torch.rand(len(images), patches, device=device)
    visible = patches // 4
    mask = noise.argsort(dim=1).argsort(dim=1) >= visible
    found: dict[str, Any] = {"model": name}
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        for model in (ours, theirs):
            model.zero_grad(set_to_none=True)
        out = ours(images, mask, visible)
        out["loss"].backward()
        peer = theirs(images, noise=noise)
        peer.loss.backward()
        expected = peer.logits[mask].reshape(out["pred"].shape)
        found["tf32" if tf32 else "fp32"] = {
            "loss": relative(out["loss"].detach(), peer.loss.detach()),
            "pred": relative(out["pred"].detach(), expected.detach()),
            "gradient": gradients_apart(ours, theirs),
        }
    found["bounds"] = {"fp32": 1e-3, "tf32": 5e-2}
    worst = {kind: max(found[kind].values()) for kind in ("fp32", "tf32")}
    found["holds"] = all(worst[kind] < bound for kind, bound in found["bounds"].items())
    assert found["holds"], found
    return found


def gradients_apart(ours: Any, theirs: Any) -> float:
    """The largest difference of a tensor's gradient, of its largest entry; tiny ones count less."""
    peers = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    named, _ = STYLES["transformers"].read(peers, "transformers")
    own = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert own.keys() == named.keys(), own.keys() ^ named.keys()
    floor = 1e-3 * max(float(g.abs().max()) for g in own.values())
    return max(
        float((own[n] - named[n]).abs().max()) / max(float(named[n].abs().max()), floor)
        for n in own
    )


# ---- Precisions ----------------------------------------------------------------------------------


def precisions(scale: Scale) -> dict[str, Any]:
    """Losses of bf16 and fp16 beside fp32's on the same images and masks; an overflow in fp16."""
    steps, batch = (6, 4) if scale.tiny else (200, 64)
    device = torch.device(scale.device)
    curves: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16", "fp16"):
        step, draw = stepping(precision, batch, device)
        curves[precision] = torch.stack([step(draw(i)).loss for i in range(steps)]).tolist()
    fp32 = sum(curves["fp32"][-steps // 4 :])
    apart = {p: abs(sum(curves[p][-steps // 4 :]) / fp32 - 1) for p in ("bf16", "fp16")}
    step, draw = stepping("fp16", batch, device)
    step(draw(0))
    scaler = step.scaler
    before = scaler.get_scale()
    weights = [p.detach().clone() for p in step.parameters]
    result = step(draw(1) | {"factor": 1e30})
    same = all(torch.equal(a, b) for a, b in zip(weights, step.parameters, strict=True))
    overflow = {
        "skipped": bool(result.skipped), "scale_before": before,
        "scale_after": scaler.get_scale(), "weights_kept": same,
    }  # fmt: skip
    found = {"curves": curves, "apart": apart, "bound": 0.02, "overflow": overflow}
    found["holds"] = max(apart.values()) < 0.02 and same and overflow["scale_after"] < before
    assert found["holds"], {**found, "curves": None}
    return found


class Stepping(OptimizerStep):
    """A step on one drawn batch."""

    forward_of: Any

    def __call__(self, drawn: dict[str, Any]) -> Any:  # type: ignore[override]
        """Take it; `factor` multiplies the loss."""
        return super().__call__(partial(self.forward_of, drawn), [None], 1e-4)


def stepping(precision: str, batch: int, device: torch.device) -> tuple[Stepping, Any]:
    """A step of a micro model, and what draws its batches: the same for each precision."""
    torch.manual_seed(0)
    model = create_model(MICRO, lscale_init=0.1, pos_offset="learned", img_size=32).to(device)
    optimizer = create_adamw(parameter_groups(model, 0.05), 1e-4, betas=(0.9, 0.95))
    step = Stepping(model, optimizer, device=device, precision=precision)
    patches = model.num_patches

    def draw(number: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(batch, 3, 32, 32, generator=generator)
        mask = torch.rand(batch, patches, generator=generator).argsort(1) >= patches // 4
        return {"images": images.to(device), "mask": mask.to(device), "factor": 1.0}

    def forward(drawn: dict[str, Any], _: None) -> Tensor:
        loss = model(drawn["images"], drawn["mask"], patches // 4)["loss"]
        return loss * drawn["factor"]

    step.forward_of = forward
    return step, draw


# ---- Resume --------------------------------------------------------------------------------------


def short_run_flags(scale: Scale, folder: str) -> list[str]:
    """A short pretraining on drawn images."""
    return [
        "--dataset=synthetic", f"--model={MICRO}", "--input_size=32", "--batch_size=16",
        "--epochs=2", "--warmup_epochs=1", "--train_images=64" if scale.tiny else
        "--train_images=256", "--num_workers=0" if scale.tiny else "--num_workers=4",
        "--log_every=1", "--picture_every=0", "--save_every=0", f"--device={scale.device}",
        f"--precision={'fp32' if scale.tiny else 'bf16'}", f"--output_dir={scale.folder / folder}",
    ]  # fmt: skip


@contextmanager
def stopping(step: int) -> Iterator[None]:
    """Runs inside are asked to stop after a step, as by a signal."""
    after_step = Run.after_step

    def asked(self: Run, report: Any) -> bool:
        if report.step == step:
            self.agreement.after_step = lambda: Wish(stop=signal.SIGTERM)  # type: ignore[method-assign]
        return after_step(self, report)

    Run.after_step = asked  # type: ignore[method-assign]
    try:
        yield
    finally:
        Run.after_step = after_step  # type: ignore[method-assign]


def ends(flags: list[str]) -> int:
    """The exit code of a pretraining in this process."""
    try:
        main_pretrain.main(flags)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def resume(scale: Scale) -> dict[str, Any]:
    """A run that was stopped in an epoch against one that was not: every tensor at the end."""
    found: dict[str, Any] = {}
    for name, more in (("eager", ["--no-compile"]), ("compiled", ["--compile"])):
        if scale.tiny and name == "compiled":
            found[name] = "left out: tiny"
            continue
        whole, cut = (
            [*short_run_flags(scale, f"whole-{name}"), *more],
            [*short_run_flags(scale, f"cut-{name}"), *more],
        )
        assert ends(whole) == 0
        with stopping(3):
            assert ends(cut) == EXIT_STOPPED
        assert ends(cut) == 0
        states = [load_file(scale.folder / f"{kind}-{name}" / LAST) for kind in ("whole", "cut")]
        one, two = (flat_tensors({k: s[k] for k in ("model", "optimizer")}) for s in states)
        assert one.keys() == two.keys() and states[0]["step"] == states[1]["step"]
        differing = [key for key in one if not torch.equal(one[key], two[key])]
        found[name] = {"tensors": len(one), "differing": len(differing), "first": differing[:3]}
    differing_in = [n for n, f in found.items() if isinstance(f, dict) and f["differing"]]
    found["holds"] = not differing_in
    assert found["holds"], found
    return found


def flat_tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of nested dictionaries and lists, by place."""
    if isinstance(value, Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) \
        if isinstance(value, list) else ()  # fmt: skip
    found: dict[str, Tensor] = {}
    for key, inner in items:
        found |= flat_tensors(inner, f"{prefix}.{key}")
    return found


# ---- No waits ------------------------------------------------------------------------------------


def no_waits(scale: Scale) -> dict[str, Any]:
    """Steps with every call forbidden that would wait for the device.

    Compiled ones from the second step on: compiling itself waits, in the first.
    """
    original = main_pretrain.train_steps

    def watched(*rest: Any, after_step: Any, **more: Any) -> int:
        def forbidden(report: Any) -> bool:
            torch.cuda.set_sync_debug_mode("default")  # a record may wait
            try:
                return after_step(report)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        if not compiled:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return original(*rest, after_step=forbidden, **more)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    found: dict[str, Any] = {}
    main_pretrain.train_steps = watched
    try:
        for compiled in (False, True):
            flags = [
                *short_run_flags(scale, f"no-waits-{compiled}"),
                "--log_every=1000",
                "--epochs=1",
            ]
            assert ends([*flags, "--compile" if compiled else "--no-compile"]) == 0
            found["compiled" if compiled else "eager"] = "no step waited"
            keep(scale, "no_waits", found)
    finally:
        main_pretrain.train_steps = original
    return found | {"holds": True}
