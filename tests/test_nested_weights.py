"""Files of other programs: wrappers, prefixes, several encoders; and the table of each load.

Each file is written as its program writes it, and goes through a command; what comes out is bit for
bit what comes of the same weights without wrapping.
"""

import argparse
import json
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_segment import SMALL
from test_segment_data import write_pairs
from torch import Tensor, nn

from models_vit import VisionTransformer
from models_vit_names import to_mmseg, to_transformers
from models_zoo import (
    create_model,
    create_segmenter,
    load_classifier,
    load_encoder,
    load_pretrained,
)
from util.errors import BadInput
from util.train.checkpoint import LAST, load_file, save_checkpoint
from util.weights.nested_weights import find_weights

Weights = dict[str, Tensor]

KNN = [
    "--dataset=digits", "--num_workers=0", "--device=cpu", "--train_images=12", "--val_images=6",
    "--k=3", "--save_features",
]  # fmt: skip
TUNE = [
    "--dataset=digits", "--num_workers=0", "--device=cpu", "--train_images=8", "--val_images=8",
    "--epochs=1", "--warmup_epochs=0", "--batch_size=8", "--input_size=16",
]  # fmt: skip
ARGUMENTS = {
    "img_size": [16, 16], "patch_size": [4, 4], "in_chans": 3, "embed_dim": 128, "depth": 2,
    "num_heads": 4, "decoder_embed_dim": 96, "decoder_depth": 1, "decoder_num_heads": 4,
}  # fmt: skip


def autoencoder(depth: int = 2) -> Any:
    torch.manual_seed(0)
    return create_model("mae_vit_micro_patch4", img_size=16, decoder_depth=1, depth=depth)


def plain(depth: int = 2) -> Weights:
    """An official file's: encoder and decoder."""
    return dict(autoencoder(depth).state_dict())


def encoder(depth: int = 2) -> Weights:
    drop = ("decoder_", "mask_token")
    return {k: v for k, v in plain(depth).items() if not k.startswith(drop)}


def decoder() -> Weights:
    return {k: v for k, v in plain().items() if k.startswith("decoder_")}


def other(weights: Weights) -> Weights:
    """Weights that must not be taken."""
    return {k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}


def under(prefix: str, weights: Weights) -> Weights:
    return OrderedDict((prefix + k, v) for k, v in weights.items())


def lightning(weights: Weights) -> dict[str, Any]:
    """As its Trainer writes them."""
    return {
        "epoch": 4, "global_step": 50, "pytorch-lightning_version": "2.5.0", "state_dict": weights,
        "loops": {}, "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}], "lr_schedulers": [],
        "hparams_name": "kwargs", "hyper_parameters": {"lr": np.float64(0.1), "out": Path("a/b")},
    }  # fmt: skip


def distributed() -> Weights:
    """The state dict of a module that DDP really wraps, and torch.compile inside of it."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        return nn.parallel.DistributedDataParallel(torch.compile(autoencoder())).state_dict()
    finally:
        torch.distributed.destroy_process_group()


def compiled_in_parts() -> Weights:
    model = autoencoder()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    return model.state_dict()


def averaged() -> Weights:
    return torch.optim.swa_utils.AveragedModel(autoencoder()).state_dict()


def mmpretrain() -> dict[str, Any]:
    """Names of its MAE: backbone, and the decoder as `neck`."""
    backbone = under("backbone.", to_mmseg(encoder()))
    neck = under("neck.", decoder())
    return {"meta": {"epoch": 3}, "state_dict": backbone | neck}


def lightly() -> Weights:
    """Names of its MAE, whose backbone wraps timm's."""
    rest = {"backbone.mask_token": torch.zeros(1, 1, 128)}
    return under("backbone.vit.", encoder()) | rest | under("decoder.", decoder())


# The contents of a file; what the command says of where the weights were.
FILES: dict[str, tuple[Callable[[], Any], str]] = {
    "ddp": (lambda: under("module.", plain()), "names begin with 'module.'; it is taken off"),
    "compile": (
        lambda: torch.compile(autoencoder()).state_dict(), "begin with '_orig_mod.'; it is"
    ),
    "ddp of compile": (distributed, "begin with 'module._orig_mod.'"),
    "compile of ddp": (lambda: under("_orig_mod.module.", plain()), "'_orig_mod.module.'"),
    "compiled blocks": (compiled_in_parts, "'_orig_mod.' inside of names is taken off"),
    "fsdp": (
        lambda: {
            k.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): v for k, v in plain().items()
        },
        "'_fsdp_wrapped_module.' inside",
    ),
    "averages of torch": (averaged, "begin with 'module.'"),
    "model.": (lambda: under("model.", plain()), "begin with 'model.'"),
    "backbone.": (lambda: under("backbone.", encoder()), "begin with 'backbone.'"),
    "encoder.": (lambda: under("encoder.", encoder()), "begin with 'encoder.'"),
    "student.backbone.": (lambda: under("student.backbone.", encoder()), "'student.backbone.'"),
    "any name": (lambda: under("net.trunk.", plain()), "begin with 'net.trunk.'"),
    "model_state_dict": (
        lambda: {"model_state_dict": under("module.", plain()), "epoch": 3},
        "weights are under 'model_state_dict', names begin with 'module.'; both are taken off",
    ),
    "state_dict": (lambda: {"state_dict": plain()}, "weights are under 'state_dict'; it is"),
    "net": (lambda: {"net": plain(), "acc": np.float32(91.5), "epoch": 2}, "under 'net'"),
    "network": (lambda: {"network": under("module.", plain())}, "under 'network', names"),
    "module": (lambda: {"module": plain(), "global_steps": 3}, "under 'module'"),  # DeepSpeed
    "dicts in dicts": (lambda: {"a": {"model": under("b.", plain())}}, "under 'a.model', names"),
    "lightning": (
        lambda: lightning(
            under("model.encoder.", encoder()) | {"criterion.weight": torch.ones(4)}
        ),
        "under 'state_dict', names begin with 'model.encoder.'; both",
    ),
    "stable-pretraining": (
        lambda: lightning(
            under("backbone.", encoder()) | under("projector.", {"0.weight": torch.ones(3, 3)})
        ),
        "under 'state_dict', names begin with 'backbone.'",
    ),
    "lightly": (lambda: lightning(lightly()), "names begin with 'backbone.vit.'"),
    "mmpretrain": (mmpretrain, "under 'state_dict', names begin with 'backbone.'"),
    "mmpretrain, ddp": (
        lambda: {"state_dict": under("module.", mmpretrain()["state_dict"])}, "'module.backbone.'"
    ),
    "transformers": (lambda: under("model.", to_transformers(plain())), "begin with 'model.'"),
}  # fmt: skip

# Files with several encoders: contents, which one is taken, the other, and a key that takes that.
SEVERAL: dict[str, tuple[Callable[[], Any], str, str]] = {
    "timm": (
        lambda: {
            "epoch": 3, "arch": "vit", "state_dict": plain(), "metric": np.float64(3),
            "state_dict_ema": other(plain()), "args": argparse.Namespace(lr=1.0),
        },
        "under 'state_dict'", "state_dict_ema",
    ),
    "deit": (
        lambda: {"model_ema": other(plain()), "model": plain()}, "under 'model'", "model_ema"
    ),
    "dino": (
        lambda: {
            "student": under("module.backbone.", other(encoder()))
            | under("module.head.", {"mlp.weight": torch.ones(2, 2)}),
            "teacher": under("backbone.", encoder()) | {"head.mlp.weight": torch.ones(2, 2)},
            "optimizer": {"state": {}, "param_groups": []}, "epoch": 9,
            "args": argparse.Namespace(arch="vit_small"),
        },
        "under 'teacher', names begin with 'backbone.'", "student",
    ),
    "teacher and student, flat": (
        lambda: under("student.backbone.", other(encoder()))
        | under("teacher.backbone.", encoder()),
        "begin with 'teacher.backbone.'", "student",
    ),
    "stable-pretraining": (
        lambda: lightning(
            under("backbone.student.", other(encoder())) | under("backbone.teacher.", encoder())
        ),
        "begin with 'backbone.teacher.'", "student",
    ),
    "i-jepa": (
        lambda: {
            "encoder": under("module.", other(encoder())),
            "target_encoder": under("module.", encoder()), "predictor": {}, "epoch": 1,
        },
        "under 'target_encoder', names", "encoder",
    ),
    "i-jepa, flat": (
        lambda: under("encoder.", other(encoder())) | under("target_encoder.", encoder()),
        "begin with 'target_encoder.'", "encoder",
    ),
    "moco v3": (
        lambda: {
            "state_dict": under("module.base_encoder.", encoder())
            | under("module.momentum_encoder.", other(encoder()))
        },
        "begin with 'module.base_encoder.'", "momentum_encoder",
    ),
    "byol": (
        lambda: under("online_encoder.", encoder()) | under("target_encoder.", other(encoder())),
        "begin with 'online_encoder.'", "target_encoder",
    ),
    "momentum backbone": (
        lambda: under("backbone.", encoder()) | under("backbone_momentum.", other(encoder())),
        "begin with 'backbone.'", "backbone_momentum",
    ),
    "beside its averages": (
        lambda: plain() | under("ema.", other(plain())), "the file also holds 'ema'", "ema"
    ),
}  # fmt: skip


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def features(path: Path, folder: Path, run_main: Any, *flags: str) -> tuple[dict[str, bytes], str]:
    """main_knn's features of a file, and what it printed."""
    argv = [*KNN, f"--checkpoint={path}", f"--output_dir={folder}", *flags]
    code, out, err = run_main("main_knn", argv)
    assert code == 0, err
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.npy"))}, out


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights as an official file has them."""
    return write(tmp_path_factory.mktemp("straight") / "plain.pth", {"model": plain()})


@pytest.fixture(scope="module")
def expected(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The features of those."""
    import main_knn

    folder = tmp_path_factory.mktemp("expected")
    main_knn.main([*KNN, f"--checkpoint={straight}", f"--output_dir={folder}"])
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.npy"))}


# ---- Wrappers and prefixes -----------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("case", FILES)
def test_features_are_those_of_the_weights_without_wrapping(
    case: str, expected: dict[str, bytes], tmp_path: Path, run_main: Any
) -> None:
    content, told = FILES[case]
    found, out = features(write(tmp_path / "f.pth", content()), tmp_path / "out", run_main)
    assert found == expected
    assert told in out, out
    log = (tmp_path / "out/log-rank0.txt").read_text()
    assert told in log and "  taken " in log


def test_a_projection_without_blocks_is_no_encoder(tmp_path: Path) -> None:
    """As a tokenizer of patches has one: there is nothing to choose between."""
    weights = plain()
    lone = {"patch_embed.proj.weight": torch.zeros_like(weights["patch_embed.proj.weight"])}
    path = write(tmp_path / "f.pth", {"tokens": lone, "net": weights})
    found = find_weights(torch.load(path), "f.pth")
    assert found.others == {} and found.weights.keys() == weights.keys()


@pytest.mark.smoke
@pytest.mark.parametrize("case", SEVERAL)
def test_of_several_encoders_one_is_taken_and_the_others_can_be(
    case: str, expected: dict[str, bytes], tmp_path: Path, run_main: Any
) -> None:
    content, told, key = SEVERAL[case]
    path = write(tmp_path / "f.pth", content())
    found, out = features(path, tmp_path / "out", run_main)
    assert found == expected
    assert told in out and f"the file also holds '{key}'" in out and "--weights_key" in out
    state = load_encoder(str(path), weights_key=key)[0].state_dict()
    weights = other(encoder())
    assert all(torch.equal(state[name], weights[name]) for name in weights)


def test_the_key_in_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("mae_vit_micro_patch4", img_size=16)
    weights = dict(model.state_dict())
    path = str(write(tmp_path / "f.pth", {"student": weights, "teacher": other(weights)}))
    for name in ("mae_vit_micro_patch4", "vit_micro_patch4"):
        for key, expected in (("student", weights), (None, other(weights))):
            found = create_model(name, pretrained=path, weights_key=key).state_dict()
            assert torch.equal(found["blocks.0.norm1.weight"], expected["blocks.0.norm1.weight"])


@pytest.mark.smoke
def test_the_key_reaches_the_features(
    expected: dict[str, bytes], tmp_path: Path, run_main: Any
) -> None:
    path = write(tmp_path / "f.pth", {"student": other(plain()), "teacher": plain()})
    swapped = write(tmp_path / "g.pth", {"student": plain(), "teacher": other(plain())})
    assert features(swapped, tmp_path / "a", run_main, "--weights_key=student")[0] == expected
    assert features(path, tmp_path / "b", run_main, "--weights_key=student")[0] != expected


@pytest.mark.smoke
def test_safetensors_with_a_prefix_and_under_another_name(
    expected: dict[str, bytes], tmp_path: Path, run_main: Any
) -> None:
    for name in ("f.safetensors", "f.pth"):
        save_file(under("model.backbone.", encoder()), tmp_path / name)
        found, out = features(tmp_path / name, tmp_path / f"out-{name}", run_main)
        assert found == expected and "begin with 'model.backbone.'" in out


@pytest.mark.smoke
@pytest.mark.parametrize(
    "content",
    [
        lambda: {"model_state_dict": under("module._orig_mod.", plain())},
        lambda: lightning(under("model.encoder.", plain()) | {"criterion.weight": torch.ones(4)}),
        SEVERAL["dino"][0],
    ],
    ids=["ddp of compile", "lightning", "dino"],
)
def test_fine_tuning_ends_in_the_same_bits(
    content: Callable[[], Any], straight: Path, tmp_path: Path, run_main: Any
) -> None:
    results = []
    for name, path in (("a", straight), ("b", write(tmp_path / "f.pth", content()))):
        argv = [*TUNE, f"--finetune={path}", f"--output_dir={tmp_path / name}"]
        code, _, err = run_main("main_finetune", argv)
        assert code == 0, err
        results.append(load_file(tmp_path / name / LAST)["model"])
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    write_pairs(tmp_path / "pairs")
    return f"--data_path={tmp_path / 'pairs'}"


@pytest.mark.smoke
def test_segmentation_starts_and_goes_on_from_the_same_bits(
    pairs: str, tmp_path: Path, run_main: Any
) -> None:
    straight = write(tmp_path / "plain.pth", {"model": plain(4)})
    wrapped = write(tmp_path / "f.pth", lightning(under("model.backbone.", encoder(4))))
    argv = [*SMALL, pairs, "--iterations=1", "--warmup_iterations=0", "--pictures=0"]
    results = []
    for name, path in (("a", straight), ("b", wrapped)):
        where = [f"--finetune={path}", f"--output_dir={tmp_path / name}"]
        code, out, err = run_main("main_segment", [*argv, *where])
        assert code == 0, err
        results.append(load_file(tmp_path / name / LAST)["model"])
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    assert "names begin with 'model.backbone.'" in out and "resized  pos_embed 4x4 -> 8x8" in out
    assert "decode_head.*" in out
    assert "names begin with 'model.backbone.'" in (tmp_path / "b/log-rank0.txt").read_text()
    # The whole segmenter, through DDP and a wrapper, and by its folder.
    state = load_file(tmp_path / "a" / LAST)
    kept = {k: state[k] for k in ("model_args", "classes", "data")}
    path = write(tmp_path / "s.pth", kept | {"state_dict": under("module.", state["model"])})
    found = []
    for name, given in (("eval-a", tmp_path / "a"), ("eval-b", path)):
        where = [f"--resume={given}", "--eval", f"--output_dir={tmp_path / name}"]
        code, out, err = run_main("main_segment", [*argv, *where])
        assert code == 0, err
        result = json.loads((tmp_path / name / "result-eval.json").read_text())
        found.append({k: v for k, v in result.items() if k not in ("checkpoint", "measured")})
    assert found[0] == found[1]
    assert "begin with 'module.'" in out and "taken " in out and "new " not in out


@pytest.mark.smoke
def test_pictures_and_exports_of_a_wrapped_autoencoder(tmp_path: Path, run_main: Any) -> None:
    said = {"model_args": ARGUMENTS}
    pictures, exported = [], []
    for name, content in (
        ("a", {"model": plain()}),
        ("b", {"state_dict": under("model.", plain())}),
    ):
        path = write(tmp_path / "weights.pth", said | content)
        argv = [f"--checkpoint={path}", "--dataset=digits", "--num_images=2", "--device=cpu"]
        code, out, err = run_main("main_visualize", [*argv, f"--output_dir={tmp_path / name}"])
        assert code == 0, err
        pictures.append((tmp_path / name / "grid.png").read_bytes())
        argv = [f"--checkpoint={path}", "--to=official", f"--output={tmp_path / name}.pth"]
        code, text, err = run_main("main_export", argv)
        assert code == 0, err
        exported.append(load_file(tmp_path / f"{name}.pth")["model"])
    assert pictures[0] == pictures[1]
    assert all(torch.equal(v, exported[1][k]) for k, v in exported[0].items())
    for printed in (out, text):
        assert "under 'state_dict', names begin with 'model.'; both are taken off" in printed
        assert "taken " in printed and "decoder_*" in printed and "left " not in printed


@pytest.mark.smoke
def test_the_averages_of_our_own_fine_tuning(straight: Path, tmp_path: Path, run_main: Any) -> None:
    argv = [*TUNE, f"--finetune={straight}", f"--output_dir={tmp_path / 'run'}", "--ema_decay=0.5"]
    code, _, err = run_main("main_finetune", argv)
    assert code == 0, err
    state = load_file(tmp_path / "run" / LAST)
    for key in (None, "model", "ema"):
        model, _, rest = load_classifier(str(tmp_path / "run"), head="own", weights_key=key)
        found = model.state_dict()
        assert all(torch.equal(v, found[k]) for k, v in state[key or "model"].items())
        assert ("ema" in rest) == (key != "ema")


# ---- Which of several ----------------------------------------------------------------------------


def test_what_no_name_tells_apart_is_asked_for(tmp_path: Path, run_main: Any) -> None:
    content = under("first.", plain()) | under("second.", other(plain()))
    path = write(tmp_path / "f.pth", content)
    argv = [*KNN, f"--checkpoint={path}", f"--output_dir={tmp_path / 'out'}"]
    code, _, err = run_main("main_knn", argv)
    assert code == 2 and "several encoders, 'first', 'second'" in err and "--weights_key" in err
    code, out, err = run_main("main_knn", [*argv, "--weights_key=second"])
    assert code == 0 and "begin with 'second.'" in out, err
    code, _, err = run_main("main_knn", [*argv, "--weights_key=third"])
    assert code == 2 and "no weights of that name, but 'first', 'second'" in err
    # The same weights twice are no question.
    path = write(tmp_path / "g.pth", under("first.", plain()) | under("second.", plain()))
    model, _ = load_encoder(str(path))
    assert torch.equal(model.cls_token, plain()["cls_token"])


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        ("main_finetune", ["--model=vit_micro_patch4"]),
        ("main_segment", ["--model=vit_micro_patch8"]),
    ],
)
def test_a_key_without_a_file(
    main: str, flags: list[str], pairs: str, tmp_path: Path, run_main: Any
) -> None:
    data = TUNE
    if main == "main_segment":
        data = [*SMALL, pairs]
    argv = [*data, *flags, "--weights_key=ema", f"--output_dir={tmp_path / 'out'}"]
    code, _, err = run_main(main, argv)
    assert code == 2 and "--weights_key without --finetune" in err


def test_a_resume_keeps_its_key(straight: Path, tmp_path: Path, run_main: Any) -> None:
    path = write(tmp_path / "f.pth", SEVERAL["deit"][0]())
    argv = [*TUNE, f"--finetune={path}", f"--output_dir={tmp_path / 'run'}"]
    assert run_main("main_finetune", argv)[0] == 0
    code, _, err = run_main("main_finetune", [*argv, "--weights_key=model_ema"])
    assert code == 2 and "weights_key: was None, is model_ema" in err


# ---- The contract: what does not fit is an error with both lists ---------------------------------


def test_under_a_prefix_weights_have_to_fit_as_before(tmp_path: Path) -> None:
    weights = encoder() | {"adapter.weight": torch.ones(3)}
    del weights["blocks.1.norm1.bias"]
    path = write(
        tmp_path / "f.pth", {"state_dict": under("model.", weights) | {"loss.w": torch.ones(1)}}
    )
    with pytest.raises(BadInput, match=r"missing 1: blocks\.1\.norm1\.bias; unexpected 1: adapter"):
        load_encoder(str(path))


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    """Of quantised weights the scale is somewhere else; a batch counter is no weight."""
    quantised = {name: (8 * tensor).to(torch.int8) for name, tensor in plain().items()}
    with pytest.raises(BadInput, match=r"whole numbers .*torch\.int8"):
        load_encoder(str(write(tmp_path / "f.pth", quantised)))


def test_two_tensors_that_get_one_name(tmp_path: Path) -> None:
    twice = plain() | {"_orig_mod.cls_token": plain()["cls_token"] + 1}
    with pytest.raises(BadInput, match=r"two different tensors for cls_token"):
        load_encoder(str(write(tmp_path / "f.pth", twice)))


def test_weights_in_a_numbered_entry_are_not_searched() -> None:
    """As optimisers keep theirs: there is no key to name it by."""
    with pytest.raises(BadInput, match="holds no weights, only 0"):
        find_weights({0: plain()}, "f.pth")


def test_an_encoder_without_a_class_token(tmp_path: Path) -> None:
    weights = encoder()
    del weights["cls_token"]
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    path = write(tmp_path / "f.pth", {"target_encoder": under("module.", weights)})
    with pytest.raises(BadInput, match="without a class token"):
        load_encoder(str(path))


# ---- What else a file holds ----------------------------------------------------------------------


def stand_in(module: str, name: str, monkeypatch: pytest.MonkeyPatch, base: type = object) -> type:
    """A class as a program that is not installed here has it, while a file is written."""
    for i in range(module.count(".") + 1):
        part = ".".join(module.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    kind = type(name, (base,), {"__module__": module, "__qualname__": name})
    setattr(sys.modules[module], name, kind)
    return kind


@pytest.mark.parametrize(
    ("module", "name", "base"),
    [
        ("mmengine.logging.history_buffer", "HistoryBuffer", object),
        ("lightning.fabric.utilities.data", "AttributeDict", dict),
        ("omegaconf.dictconfig", "DictConfig", object),
    ],
)
def test_records_and_settings_of_known_programs_are_no_reason_to_refuse(
    module: str, name: str, base: type, tmp_path: Path
) -> None:
    path = tmp_path / "f.pth"
    with pytest.MonkeyPatch.context() as monkeypatch:
        thing = stand_in(module, name, monkeypatch, base)()
        if base is dict:
            thing["lr"] = 0.1
        thing.history = np.arange(3.0)
        write(path, {"state_dict": under("backbone.", encoder()), "message_hub": {"loss": thing}})
    assert module not in sys.modules
    model, _ = load_encoder(str(path))
    assert torch.equal(model.cls_token, encoder()["cls_token"])
    assert module not in sys.modules


def test_code_beside_them_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    with pytest.MonkeyPatch.context() as monkeypatch:
        thing = stand_in("mmengine.runner", "Record", monkeypatch)()
        write(path, {"model": encoder(), "hub": thing, "call": print, "array": np.arange(3)})
    with pytest.raises(BadInput, match="could run code"):
        load_encoder(str(path))
    write(path, {"model": encoder(), "array": np.arange(3)})  # of no program that is known
    with pytest.raises(BadInput, match="could run code"):
        load_encoder(str(path))


def test_entries_that_have_other_meanings_elsewhere(tmp_path: Path) -> None:
    rest = {"notes": None, "style": 3, "data": [1], "classes": "ten", "model_args": 7, "task": 1}
    path = str(write(tmp_path / "f.pth", {"model": encoder(), "place": "x", 5: "y", **rest}))
    _, state = load_encoder(path)
    assert state["style"] == "timm" and not {"data", "classes", "model_args"} & state.keys()
    assert "weights are under 'model'" in state["loaded"][1]


def test_arguments_of_another_program(tmp_path: Path) -> None:
    content = {"model": plain(), "model_args": {"n_layer": 2, "bias": True}}
    model, state = load_encoder(str(write(tmp_path / "f.pth", content)))
    assert "model_args" not in state and len(model.blocks) == 2
    content["model_args"] = ARGUMENTS | {"n_layer": 2}
    with pytest.raises(BadInput, match="model that ours cannot be: n_layer"):
        load_pretrained(str(write(tmp_path / "f.pth", content)))


@pytest.mark.parametrize(
    "name", ["pos_embed", "blocks.0.mlp.fc1.weight", "patch_embed.proj.weight"]
)
def test_tensors_of_other_ranks(name: str, tmp_path: Path) -> None:
    for shape in ((), (3,), (2, 2, 2, 2, 2)):
        path = write(tmp_path / "f.pth", under("model.", encoder() | {name: torch.ones(shape)}))
        with pytest.raises(BadInput, match="no encoder in timm's names"):
            load_encoder(str(path))


# ---- Files that are no weights -------------------------------------------------------------------


def scripted(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save lays it out
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"m/{name}", "x")


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as found:
        found.writestr("readme.txt", "x")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda p: torch.save({"epoch": 3, "loss": 0.5}, p), "no weights, only epoch"),
    "nothing": (lambda p: torch.save({}, p), "holds no weights, only nothing"),
    "an optimiser": (
        lambda p: torch.save({"state": {0: {"m": torch.ones(2)}}, "param_groups": [{}]}, p),
        "the state of an optimiser",
    ),
    "an optimiser beside": (
        lambda p: torch.save({"optimizer": {"state": {}, "param_groups": []}, "epoch": 1}, p),
        "holds no weights, only optimizer, epoch",
    ),
    "another net": (
        lambda p: torch.save({"net": {"module.conv1.weight": torch.ones(2)}}, p),
        "no encoder in timm's names (patch_embed.proj, pos_embed, blocks.0 ...); its keys begin "
        "module.conv1.weight",
    ),
    "TorchScript": (scripted, "a TorchScript archive (torch.jit.save)"),
    "a zip": (archive, "a zip archive of readme.txt"),
    "text": (
        lambda p: p.write_text("epoch: 3\nlr: 1e-3\n"), "a text file, which begins 'epoch: 3'"
    ),
    "a web page": (lambda p: p.write_text("<!DOCTYPE html><html>log in</html>"), "a web page"),
    "Git LFS": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a pointer of Git LFS",
    ),
    "a picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60)), "a PNG image"),
    "numpy's": (lambda p: np.savez(p.open("wb"), a=np.ones(2)), "numpy arrays (.npz)"),
    "a whole model": (
        lambda p: torch.save(nn.Linear(2, 2), p), "save the weights alone: torch.save(model.state_"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named_for_what_they_are(case: str, tmp_path: Path, run_main: Any) -> None:
    make, named = WRONG[case]
    path = tmp_path / "f.pth"
    make(path)
    argv = [*KNN, f"--checkpoint={path}", f"--output_dir={tmp_path / 'out'}"]
    code, _, err = run_main("main_knn", argv)
    assert code == 2 and named in err and len(err.strip().splitlines()) == 1, err
    assert "weights_only" not in err


# ---- Run folders ---------------------------------------------------------------------------------


def save_run(folder: Path, task: str = "pretrain") -> Path:
    model = autoencoder()
    state = {
        "task": task,
        "step": 8,
        "epoch": 2,
        "model": model.state_dict(),
        "model_args": ARGUMENTS,
    }
    folder.mkdir(exist_ok=True)
    return save_checkpoint(folder, state)


@pytest.mark.smoke
def test_a_run_folder_stands_for_its_last_checkpoint(tmp_path: Path, run_main: Any) -> None:
    path = save_run(tmp_path / "run")
    results = []
    for name, given in (("a", path), ("b", path.parent)):
        argv = [*TUNE, f"--finetune={given}", f"--output_dir={tmp_path / name}"]
        code, out, err = run_main("main_finetune", argv)
        assert code == 0, err
        assert f"weights of {path} (pretrain, epoch 2, step 8)" in out
        results.append(load_file(tmp_path / name / LAST)["model"])
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    argv = [f"--checkpoint={path.parent}", "--to=mmae", f"--output={tmp_path / 'x.pth'}"]
    assert run_main("main_export", argv)[0] == 0
    argv = ["--dataset=digits", "--num_images=1", "--device=cpu", f"--output_dir={tmp_path / 'v'}"]
    assert run_main("main_visualize", [*argv, f"--checkpoint={path.parent}"])[0] == 0
    # A training goes on from a file alone, and is told which.
    code, _, err = run_main("main_finetune", [*TUNE, f"--resume={path.parent}", "--output_dir=no"])
    assert code == 2 and f"is a folder; expected a file, such as its {LAST}" in err


def test_a_folder_of_several_tasks_is_asked_about(tmp_path: Path, run_main: Any) -> None:
    save_run(tmp_path / "run")
    save_run(tmp_path / "run", "finetune")
    argv = [*TUNE, f"--finetune={tmp_path / 'run'}", f"--output_dir={tmp_path / 'out'}"]
    code, _, err = run_main("main_finetune", argv)
    assert code == 2 and "checkpoint-last-pretrain.pth, checkpoint-last.pth" in err


# ---- The table -----------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_table_of_fine_tuning(tmp_path: Path, run_main: Any) -> None:
    path = save_run(tmp_path / "run")
    argv = [*TUNE, "--input_size=24", f"--finetune={path}", f"--output_dir={tmp_path / 'out'}"]
    code, out, err = run_main("main_finetune", argv)
    assert code == 0, err
    lines = out.splitlines()
    start = lines.index(f"weights of {path} (pretrain, epoch 2, step 8)")
    table = [line.split(maxsplit=1) for line in lines[start + 1 : start + 5]]
    state, model = load_file(path)["model"], load_file(tmp_path / "out" / LAST)["model"]
    taken = [k for k in model if k in state]
    count = sum(model[k].numel() for k in taken)
    assert table == [
        ["taken", f"{len(taken)} tensors, {count:,} parameters: cls_token, pos_embed, "
                  "patch_embed.* 2, blocks.0-1 24"],
        ["resized", "pos_embed 4x4 -> 6x6 patches (--pos_resize rescale)"],
        ["new", "4 tensors: fc_norm.* 2, head.* 2"],
        ["left", f"{len(state) - len(taken)} tensors: mask_token, "
                 f"decoder_* {sum(k.startswith('decoder_') for k in state)}, norm.* 2"],
    ]  # fmt: skip
    log = (tmp_path / "out/log-rank0.txt").read_text()
    assert all(" ".join(line.split()) in " ".join(log.split()) for line in lines[start : start + 5])
    # Each command that measures a tuned model takes all of it, and says so.
    argv = [*TUNE, f"--resume={tmp_path / 'out'}", "--eval", f"--output_dir={tmp_path / 'eval'}"]
    code, out, err = run_main("main_finetune", [*argv, "--input_size=24"])
    assert code == 0, err
    assert f"taken    {len(model)} tensors" in out and "left " not in out and "new " not in out


def test_the_table_of_a_segmenter_in_another_s_names(tmp_path: Path) -> None:
    """The public run's names: its encoder alone is taken, and its heads are said to be left."""
    model = create_segmenter("vit_micro_patch8", 4, img_size=32)
    named = {k.replace("encoder.", "backbone."): v for k, v in model.state_dict().items()}
    found, state = load_encoder(str(write(tmp_path / "f.pth", {"state_dict": named})))
    assert torch.equal(found.cls_token, model.encoder.cls_token)
    assert "heads are left out" in "\n".join(state["loaded"])


def test_many_groups_are_counted(tmp_path: Path) -> None:
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 1, "num_heads": 4}
    weights = under("m.", VisionTransformer(**arguments, num_classes=0).state_dict())
    weights |= {f"part{i}.w": torch.ones(1) for i in range(40)}
    _, state = load_encoder(str(write(tmp_path / "f.pth", weights)))
    assert len(state["loaded"]) == 4 and max(map(len, state["loaded"])) < 160
    assert "left     40 tensors" in state["loaded"][-1] and "33 more" in state["loaded"][-1]


def test_what_was_measured_is_the_key_s(tmp_path: Path, run_main: Any) -> None:
    """Two keys of one file are two measurements: the second does not replace the first."""
    path = write(tmp_path / "f.pth", SEVERAL["deit"][0]())
    argv = [*KNN, f"--checkpoint={path}", f"--output_dir={tmp_path / 'out'}"]
    assert run_main("main_knn", argv)[0] == 0
    assert run_main("main_knn", [*argv, "--weights_key=model_ema"])[0] == 0
    assert json.loads((tmp_path / "out/knn.json").read_text())["weights_key"] == "model_ema"
    assert (tmp_path / "out/knn-1.json").exists()
