"""lab.bench: turns, statistics, counts of operations, and every benchmark on tiny settings."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import ROOT
from PIL import Image

import lab.bench.command as lab_bench
import main_pack
import models_layers
import models_zoo
from lab.bench import data_speed, limits, step_speed, training_speed
from lab.bench import measuring as benchmark
from lab.bench.children import Answer, Children
from lab.bench.contenders import Arm, make_arm_masker, name_arm, parse_arm, parse_arms
from lab.bench.made_images import jpegs_like_imagenet, make_jpegs, make_tiny_files
from lab.bench.peers import UsualFiles
from models_mmae import MaskedAutoencoderViT
from util.data.datasets import build_dataset
from util.data.images import IMAGENET_MEAN, IMAGENET_STD
from util.data.samples import Drawn, Samples
from util.errors import BadInput, RunFailed
from util.mask.strategies import create_strategy

TINY = ["--model=mae_vit_micro_patch8", "--input_size=16", "--batch_size=2", "--device=cpu"]
FEW = ["--repeats=2", "--warmup=1", "--threads=1"]


# ---- Turns and statistics ------------------------------------------------------------------------


def test_arms_take_turns_and_the_warm_up_is_dropped() -> None:
    order: list[str] = []

    def arm(name: str) -> Callable[[], float]:
        def measure() -> float:
            order.append(name)
            return float(len(order))

        return measure

    found = benchmark.take_turns({name: arm(name) for name in "ABC"}, repeats=3, warmup=2)
    assert "".join(order) == "ABC" * 5
    assert found == {"A": [7, 10, 13], "B": [8, 11, 14], "C": [9, 12, 15]}


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_summary_is_numpys(count: int) -> None:
    values = np.random.default_rng(count).random(count).tolist()
    found = benchmark.summary(values)
    assert found["n"] == count and found["values"] == values
    expected = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    names = ("min", "q1", "median", "q3", "max")
    np.testing.assert_allclose([found[name] for name in names], expected, rtol=1e-12)


def test_ratios_pair_what_was_measured_in_one_turn() -> None:
    found = benchmark.ratios([2.0, 6.0, 20.0], [1.0, 2.0, 10.0])
    assert found["values"] == [2, 3, 2] and found["median"] == 2
    with pytest.raises(ValueError, match="zip"):
        benchmark.ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no repeats"):
        benchmark.summary([])


def test_table_aligns_and_leaves_out_what_no_row_has() -> None:
    text = benchmark.table([{"a": "x", "b": 1.23456}, {"a": "long", "c": 12345.6}], list("abcd"))
    assert text.splitlines() == ["a        b       c", "x     1.23", "long        12,346"]


def test_machine_says_what_it_is() -> None:
    about = benchmark.machine(torch.device("cpu"))
    assert about["cores"] >= 1 and about["memory_gb"] > 0 and about["processor"]
    assert about["versions"]["torch"] == torch.__version__.split("+")[0]
    json.dumps(about)


def test_machine_says_what_torch_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    about = benchmark.machine(torch.device("cpu"))
    assert about["environment"] == {"THP_MEM_ALLOC_ENABLE": "1"}
    assert benchmark.machine_lines(about)[-1] == "THP_MEM_ALLOC_ENABLE=1"


# ---- Arms ----------------------------------------------------------------------------------------


def test_arms_are_said_in_words() -> None:
    base = Arm(batch=8)
    arm = parse_arm("mmae,bf16,compile,checkpointing,cross=.34,size=64,mask=.5,processes=2", base)
    assert arm == Arm("mmae", base.model, "bf16", "default", True, "cross", 0.34, 8, 64, 0.5, 2)
    assert name_arm(arm, base) == (
        "mmae,bf16,compile,checkpointing,cross=0.34,size=64,mask=0.5,processes=2"
    )
    assert parse_arm(name_arm(arm, base), base) == arm
    assert parse_arm("cross", base).predict_ratio == 1
    assert name_arm(parse_arm("cross", base), base) == "mae,fp32,cross"
    more = "mae,fp32,compile=reduce-overhead,adamw=foreach,attention=flash,channels_last,shard"
    assert name_arm(parse_arm(more, base), base) == more
    assert name_arm(parse_arm("batch=1", base), base) == "mae,fp32,batch=1"
    assert list(parse_arms(["mae", "mae,batch=4"], base)) == ["mae,fp32", "mae,fp32,batch=4"]


@pytest.mark.parametrize(("text", "said"), [
    ("maa", "unknown word 'maa'"), ("mae,batch=x", "needs a number"), ("mae,batch=0", "at least 1"),
    ("mae,mask=1", "mask lies between"), ("mae,cross=1.5", "cross are above 0"),
    ("transformers,cross", "no cross decoder"), ("mae,fp32=1", "unknown word 'fp32=1'"),
    ("official,cross", "no cross decoder"), ("official,checkpointing", "no checkpointing"),
    ("official,shard", "of mae and mmae"), ("mae,compile=fast", "needs one of default, reduce"),
])  # fmt: skip
def test_wrong_arms_are_refused(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        parse_arm(text, Arm())


@pytest.mark.parametrize(("flags", "said"), [
    (["step", "--arms", "mae", "mae,fp32"], "given twice"),
    (["step", "--model=mae_vit_bas"], "unknown model"),
    (["step", "--input_size=16x24"], "square"),
    (["stepp"], "invalid choice"),
    (["step", "--batchsize=2"], "did you mean --batch_size"),
    (["step", "--repeats=0"], "at least 1"),
    (["jpegs"], "--made DIR"), (["files"], "--made DIR"),
    (["data", "--dataset=synthetic", "--arms", "mae", "mmae"], "one arm of ours"),
    (["train", "--dataset=synthetic", "--arms", "transformers"], "one arm of ours"),
    (["data", "--data_path=/nowhere"], "/nowhere"),
])  # fmt: skip
def test_bad_flags_are_one_line_and_exit_2(run_main: Any, flags: list[str], said: str) -> None:
    code, _, err = run_main("lab.bench.command", [*flags, "--device=cpu"])
    assert code == 2 and said in err and "Traceback" not in err


# ---- Operations ----------------------------------------------------------------------------------


def by_hand(masked: int, visible: int) -> int:
    """Forward and both gradients of micro at 16 pixels in patches of 4, and of its attention."""
    D, E, V, N = 128, 96, 48, 1 + visible + masked
    products = 4 * 12 * (1 + visible) * D**2 + (1 + visible) * D * E
    products += 12 * N * E**2 + N * 2 * E**2 + masked * 10 * E**2 + masked * E * V
    # Of attention torch counts two products forward, and five backward: it computes scores again.
    attention = 4 * (1 + visible) ** 2 * D + N * N * E + masked * N * E
    patches = 2 * 2 * visible * V * D  # an image needs no gradient
    return 2 * 3 * products + 2 * 7 * attention + patches


def test_flops_are_those_counted_by_hand() -> None:
    arm = Arm(model="mae_vit_micro_patch4", size=16)
    assert lab_bench.count_arm_flops(arm) == pytest.approx(by_hand(12, 4), rel=1e-9)
    peer = lab_bench.count_arm_flops(Arm("transformers", arm.model, size=16))
    assert 1 < peer / by_hand(12, 4) < 1.25  # it also embeds and predicts what is cut off
    cross = lab_bench.count_arm_flops(
        Arm(model=arm.model, size=16, decoder="cross", predict_ratio=0.34)
    )
    assert cross < by_hand(12, 4)


def test_pixios_arms_have_its_models_and_cells() -> None:
    """Cells of 4 patches, in masks and in what is predicted; no other method has its models."""
    arm = parse_arm("pixio,partial=.34", Arm())
    assert (arm.model, arm.decoder) == ("pixio_vit_base_patch16", "partial")
    arguments = lab_bench.arm_arguments(arm)
    assert (arguments["predict_cell"], arguments["cls_tokens"]) == (4, 8)
    with torch.device("meta"):
        model = models_zoo.create_model(arm.model, **arguments)
    masker = make_arm_masker(arm, model)
    assert (masker.num_visible, model.num_predicted(64)) == (64, 64)
    for text in ("pixio,model=mae_vit_micro_patch4", "mae,model=pixio_vit_micro_patch4"):
        with pytest.raises(BadInput, match="is not a model of"):
            parse_arm(text, Arm())


def test_simmim_and_its_peer_count_alike() -> None:
    """Both see every patch; the peer's picture of everything is ours."""
    model = "simmim_swin_tiny_patch4_window6"
    ours = lab_bench.count_arm_flops(Arm("simmim", model, mask_ratio=0.6))
    peer = lab_bench.count_arm_flops(Arm("transformers_simmim", model, mask_ratio=0.6))
    assert ours == pytest.approx(peer, rel=0.01)
    small = models_zoo.create_model("simmim_swin_micro_patch2_window4")
    assert limits.linear_shapes(small, 2)[0] == (2 * 256, 32, 96)


def test_simmims_arms_have_its_models_and_masks() -> None:
    arm = parse_arm("simmim", Arm())
    assert (arm.model, arm.mask_ratio) == ("simmim_swin_base_patch4_window6", 0.6)
    for text, reason in (
        ("simmim,model=mae_vit_micro_patch4", "is not a model of simmim"),
        ("transformers_simmim,model=simmim_vit_micro_patch4", "with Swin alone"),
        ("simmim,cross", "no cross decoder"),
    ):
        with pytest.raises(BadInput, match=reason):
            parse_arm(text, Arm())


def test_matrix_rate_counts_three_products_a_layer() -> None:
    shapes = limits.layer_shapes({"embed_dim": 8, "decoder_embed_dim": 4}, 16, 4, 2)
    assert shapes[:4] == [(10, 8, 24), (10, 8, 8), (10, 8, 32), (10, 32, 8)]
    assert shapes[4:] == [(34, 4, 12), (34, 4, 4), (34, 4, 16), (34, 16, 4)]
    assert limits.product_flops([(2, 3, 5)]) == 6 * 30
    assert limits.matrix_rate(shapes, torch.float32, torch.device("cpu"))() > 0


def test_peer_has_our_sizes() -> None:
    from transformers import ViTMAEForPreTraining

    peer = lab_bench.create_arm(Arm("transformers", "mae_vit_micro_patch4", size=16))
    assert isinstance(peer, ViTMAEForPreTraining)
    ours = lab_bench.create_arm(Arm("mae", "mae_vit_micro_patch4", size=16))
    counts = [sum(p.numel() for p in m.parameters()) for m in (ours, peer)]
    assert counts[0] == counts[1]
    assert peer.config.norm_pix_loss and ours.norm_pix_loss


def test_the_official_graph_is_mae() -> None:
    """Loss and gradients with our weights and its masks; both in float64."""
    arm = Arm("mae", "mae_vit_micro_patch4", size=16)
    ours = lab_bench.create_arm(arm).double()
    peer = lab_bench.create_arm(replace(arm, method="official")).double()
    peer.load_state_dict(ours.state_dict())
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    noise = torch.rand(5, 16)
    mask = noise.argsort(dim=1).argsort(dim=1) >= 4
    loss = ours(images, mask, 4)["loss"]
    expected = peer(images, noise)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    others = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-9, atol=1e-12)
    torch.manual_seed(0)
    first = peer(images)
    torch.manual_seed(1)
    assert first != peer(images)  # masks of its own


def test_the_official_graph_pays_for_what_is_cut_off() -> None:
    arm = Arm(model="mae_vit_micro_patch4", size=16)
    ours, official = (
        lab_bench.count_arm_flops(replace(arm, method=m)) for m in ("mae", "official")
    )
    assert 1.05 < official / ours < 1.25


def test_words_of_an_arm_reach_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each switch changes what it is named for."""
    seen: dict[str, Any] = {}
    whole, create = step_speed.distribute, torch.optim.AdamW.__init__

    def distribute(model: Any, procs: Any, **more: Any) -> Any:
        seen.update(more)
        return whole(model, procs)

    groups: list[Any] = []

    def init(self: Any, *given: Any, **more: Any) -> None:
        groups.append({name: more.get(name) for name in ("fused", "foreach")})
        create(self, *given, **more)

    monkeypatch.setattr(step_speed, "distribute", distribute)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", init)
    base = Arm(model="mae_vit_micro_patch4", size=16, batch=2)
    for text in ("mae", "mae,compile", "mae,compile=max-autotune", "mae,adamw=foreach",
                 "mae,adamw=plain", "official"):  # fmt: skip
        assert lab_bench.build_step(0, parse_arm(text, base), "cpu", "/nowhere")(1) > 0
        assert seen["compiled"] == ("compile" in text)
        assert bool(seen["options"]) == ("max-autotune" in text)
    assert step_speed.compile_options(Arm(compiled="reduce-overhead")) == {
        "triton.cudagraphs": True
    }
    fused, foreach = [g["fused"] for g in groups], [g["foreach"] for g in groups]
    assert fused == [True, True, True, None, None, True]
    assert foreach == [None, None, None, True, False, None]
    assert find_layout("mae") == torch.contiguous_format
    assert find_layout("mae,channels_last") == torch.channels_last


def find_layout(text: str) -> torch.memory_format:
    """In which an arm's model gets its images."""
    arm = parse_arm(text, Arm(model="mae_vit_micro_patch4", size=16, batch=2))
    given: list[torch.Tensor] = []
    whole = MaskedAutoencoderViT.forward

    def forward(model: Any, images: torch.Tensor, *rest: Any) -> Any:
        given.append(images)
        return whole(model, images, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedAutoencoderViT, "forward", forward)
        lab_bench.build_step(0, arm, "cpu", "/nowhere")(1)
    innermost = given[-1].is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if innermost else torch.contiguous_format


def test_attention_can_be_left_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each step; a kernel of few tokens, which is ours, does not overrule it."""
    monkeypatch.setattr(models_layers, "FEW_TOKENS", 64)
    kinds = ("cudnn", "flash", "mem_efficient", "math")

    def enabled() -> dict[str, bool]:
        return {kind: getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds}

    before = enabled()
    assert lab_bench.with_attention(enabled, None)() == before
    assert models_layers.FEW_TOKENS == 64
    step = lab_bench.with_attention(enabled, "efficient")
    assert step() == {kind: kind == "mem_efficient" for kind in kinds}
    assert models_layers.FEW_TOKENS == 0 and enabled() == before
    arm = parse_arm("mae,attention=math", Arm(model="mae_vit_micro_patch4", size=16, batch=2))
    asked: list[dict[str, bool]] = []
    whole = MaskedAutoencoderViT.forward
    monkeypatch.setattr(
        MaskedAutoencoderViT,
        "forward",
        lambda *given: (asked.append(enabled()), whole(*given))[1],
    )
    lab_bench.build_step(0, arm, "cpu", "/nowhere")(1)
    assert asked[-1] == {kind: kind == "math" for kind in kinds}


# ---- On a GPU: arms share its memory -------------------------------------------------------------


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `on_a_gpu` asks of CUDA, noted."""
    noted: list[str] = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: noted.append(name))
    monkeypatch.setattr(lab_bench.time, "sleep", lambda seconds: noted.append("sleep"))
    monkeypatch.setattr(lab_bench, "stopwatch", lambda device: lambda work: (work(), 6.0)[1])
    return noted


def test_an_arm_waits_for_the_memory_of_others_and_gives_its_own_back(
    pretend_gpu: list[str],
) -> None:
    errors: list[Exception] = [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ]

    def step() -> None:
        pretend_gpu.append("step")
        if errors:
            raise errors.pop()

    answer = lab_bench.on_a_gpu(step, torch.device("cpu"))
    answer("warm up")
    tried = ["step", "empty_cache", "sleep"]
    warm = ["step"] * lab_bench.WARM_STEPS
    after = ["synchronize", "reset_peak_memory_stats", "empty_cache"]
    assert pretend_gpu == [*tried, *tried, *warm, *after]
    pretend_gpu.clear()
    assert answer(3) == 2.0
    assert pretend_gpu == ["step", "step", "step", "step", "empty_cache"]


def test_other_faults_and_too_long_a_wait_end_an_arm(
    pretend_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(text: str) -> Callable[[], None]:
        def step() -> None:
            raise RuntimeError(text)

        return step

    with pytest.raises(RuntimeError, match="illegal memory access"):
        lab_bench.on_a_gpu(fails("an illegal memory access"), torch.device("cpu"))("warm up")
    monkeypatch.setattr(lab_bench, "MOST_WARMING", -1)
    with pytest.raises(RuntimeError, match="out of memory"):
        lab_bench.on_a_gpu(fails("CUDA out of memory"), torch.device("cpu"))("warm up")


def test_an_arm_that_cannot_be_warmed_up_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def team(word: str) -> Children:
        return Children(word, build_echo, word, threads=1, wait=False)

    teams = {"good": team("hello"), "bad": team("bad"), "late": team("fails later")}
    try:
        assert step_speed.warm_up(teams) == ["good"]
    finally:
        for one in teams.values():
            one.close()
    said = capsys.readouterr().out
    assert "bad is left out: not this word" in said
    assert "late is left out: the process that measured fails later: ValueError: later" in said
    with pytest.raises(RunFailed, match="no arm could be measured"):
        step_speed.warm_up({"bad": team("bad")})


# ---- Children ------------------------------------------------------------------------------------


def build_echo(rank: int, word: str) -> Answer:
    """Answers, fails or dies as asked."""
    if word == "bad":
        raise BadInput("not this word")

    def answer(request: Any) -> Any:
        if request == "die":
            raise SystemExit(3)
        if word == "fails later":
            raise ValueError("later")
        return rank, word, request, torch.get_num_threads()

    return answer


def test_children_answer_together_and_what_kills_them_is_said() -> None:
    team = Children("echo", build_echo, "hello", count=2, threads=1)
    assert team.ask(7) == [(0, "hello", 7, 1), (1, "hello", 7, 1)]
    with pytest.raises(RunFailed, match=r"echo ended with code 3"):
        team.ask("die")
    assert not any(process.is_alive() for process in team.processes)
    with pytest.raises(BadInput, match="not this word"):
        Children("echo", build_echo, "bad", threads=1)


def test_children_leave_the_program_its_own_fork_server(tmp_path: Path) -> None:
    """What a server imports first is said once in a program; others may have said it before."""
    (tmp_path / "marker.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing\n"
        "from lab.bench.children import Children\n"
        "def build_nothing(rank):\n"
        "    return lambda request: request\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('forkserver').set_forkserver_preload(['marker'])\n"
        "    Children('nothing', build_nothing, threads=1).close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    subprocess.run([sys.executable, program], env=environment, check=True)
    assert (tmp_path / "mark").exists()


# ---- Every benchmark, on tiny settings -----------------------------------------------------------


def read_result(path: Path, what: str) -> Any:
    """A benchmark's JSON, after the fields that all have."""
    found = json.loads(path.read_text())
    assert found["benchmark"] == what
    about = found["machine"]
    assert {"processor", "cores", "threads", "versions", "commit", "load_before", "load_after"} <= (
        about.keys()
    )
    return found["result"]


def run(what: str, path: Path, flags: Sequence[str]) -> Any:
    lab_bench.main([what, *TINY, *FEW, f"--json={path}", *flags])
    return read_result(path, what)


@pytest.mark.smoke
def test_step_measures_all_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["transformers", "mmae", "mae,bf16,cross=.5,processes=2,checkpointing"]
    rows = run("step", tmp_path / "r.json", ["--arms", *arms, "--peak_tflops=1"])
    assert [row["arm"] for row in rows] == [
        "transformers,fp32", "mmae,fp32", "mae,bf16,checkpointing,cross=0.5,processes=2"
    ]  # fmt: skip
    for row in rows:
        assert row["images_per_s"]["n"] == 2 == len(row["images_per_s"]["values"])
        rates, base = row["images_per_s"]["values"], rows[0]["images_per_s"]["values"]
        assert row["ratio"]["values"] == [a / b for a, b in zip(rates, base, strict=True)]
        expected = row["gflops_per_image"] * row["images_per_s"]["median"]
        assert row["gflops_per_s"] == pytest.approx(expected)
        assert all(
            p > s > 2**20 for p, s in zip(row["peak_bytes"], row["start_bytes"], strict=True)
        )
        assert len(row["peak_bytes"]) == row["settings"]["processes"]
        assert row["share_of_limit"]["median"] > 0 and row["mfu"] > 0
    assert "share" in capsys.readouterr().out


@pytest.mark.smoke
def test_the_command_s_children_find_what_they_measure(tmp_path: Path) -> None:
    """Of a package's `__main__` they could not import anything."""
    words = ["step", *TINY, *FEW, f"--json={tmp_path / 'r.json'}", "--arms", "mae", "mmae"]
    subprocess.run([sys.executable, "-m", "lab.bench", *words], cwd=ROOT, check=True)
    assert len(read_result(tmp_path / "r.json", "step")) == 2


@pytest.mark.smoke
def test_scaling_sweeps_and_draws(tmp_path: Path) -> None:
    flags = ["--batches", "1", "--sizes", "16", "24", "--masks", "--models", "--processes"]
    plot = tmp_path / "plot.png"
    found = run("scaling", tmp_path / "r.json", [*flags, f"--plot={plot}", "--repeats=1"])
    assert {field: len(rows) for field, rows in found.items()} == {"batch": 1, "size": 2}
    assert [row["settings"]["size"] for row in found["size"]] == [16, 24]
    limits = [row["limit_gflops_per_s"]["median"] for row in found["size"]]
    assert limits[0] != limits[1]  # each by the products of its own sizes
    assert Image.open(plot).size[0] > 200


@pytest.mark.smoke
def test_limits(tmp_path: Path) -> None:
    found = run("limits", tmp_path / "r.json", ["--repeats=1", "--warmup=0"])
    assert len(found) == 5 and all(figure["median"] > 0 for figure in found.values())


@pytest.mark.smoke
def test_data_beside_its_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_jpegs(tmp_path / "set", 8)
    flags = [f"--data_path={tmp_path}/set", "--images=12", "--batch_size=4", "--num_workers=0"]
    before = os.sched_getaffinity(0)
    found = run("data", tmp_path / "r.json", [*flags, f"--packed_path={tmp_path}/packed"])
    ways = [data_speed.PEER, "ours", "ours, 4 crops a decode", "packed JPEG", "packed raw"]
    rows = found["rows"]
    assert [(row["version"], row["arm"]) for row in rows] == [
        (version, way) for version in ("alone", "whole") for way in ways
    ]
    rates = {(row["version"], row["arm"]): row["images_per_s"]["values"] for row in rows}
    for row in rows:
        values = row["images_per_s"]["values"]
        for name, version in (("ratio", row["version"]), ("ratio_to_whole", "whole")):
            base = rates[version, data_speed.PEER]
            assert row[name]["values"] == [a / b for a, b in zip(values, base, strict=True)]
            assert row[name]["n"] == 2
    assert found["processor"] in before == os.sched_getaffinity(0)
    assert f"pinned to processor {found['processor']}" in capsys.readouterr().out
    # What main_pack.py writes of the same flags is what is there.
    main_pack.main([f"--data_path={tmp_path}/set", f"--output_dir={tmp_path}/packed/raw",
                    "--format=raw", "--split=train"])  # fmt: skip
    packed = build_dataset("imagefolder", "train", f"packed:{tmp_path}/packed/raw")
    assert len(packed) == 8 and min(packed[0][0].size) == 256


@pytest.mark.smoke
def test_packed_copies_leave_with_the_run(tmp_path: Path) -> None:
    make_jpegs(tmp_path / "set", 4)
    flags = [f"--data_path={tmp_path}/set", "--images=4", "--batch_size=4", "--num_workers=0"]
    found = run("data", tmp_path / "r.json", [*flags, "--repeats=1", "--crops_per_decode=2"])
    assert any(row["arm"] == "ours, 2 crops a decode" for row in found["rows"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "set"]


@pytest.mark.smoke
def test_data_without_files_has_no_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset=digits", "--images=8", "--batch_size=4"]
    rows = run("data", tmp_path / "r.json", flags)["rows"]
    assert [row["arm"] for row in rows] == ["ours", "ours, 4 crops a decode"] * 2
    assert "no peer" in capsys.readouterr().out


@pytest.mark.parametrize("crops", [1, 2])
def test_a_repeat_decodes_and_crops_as_often_as_it_says(crops: int) -> None:
    decoded: list[int] = []
    cropped: list[int] = []

    class Counting:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            decoded.append(index)
            return torch.full((3, 8, 8), index, dtype=torch.uint8), 0

    def transform(image: torch.Tensor) -> torch.Tensor:
        cropped.append(int(image[0, 0, 0]))
        return image

    samples = Samples(Counting(), transform, 0, Drawn(create_strategy("random"), (2, 2)))
    reads = data_speed.our_reads(samples, 12, 4, crops)  # 12 of 10: into a second epoch
    for version in ("alone", "whole"):
        decoded.clear()
        cropped.clear()
        assert reads[version]() > 0
        assert len(cropped) == 12 and len(decoded) == 12 // crops
        assert cropped == [index for index in decoded for _ in range(crops)]


def test_a_large_set_is_measured_on_some_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_speed, "MOST_IMAGES", 10)
    source = build_dataset("digits", "train", None)
    some = data_speed.few(source)
    assert len(some) == 10 and some.file_name(1) != source.file_name(1)
    assert data_speed.few(some) is some


@pytest.mark.smoke
def test_train_names_the_bottleneck(tmp_path: Path) -> None:
    flags = ["--dataset=synthetic", "--images=6", "--num_workers=1"]
    found = run("train", tmp_path / "r.json", flags)
    medians = {row["arm"]: row["images_per_s"]["median"] for row in found["rows"]}
    assert list(medians) == ["step alone", "data alone", "together"]
    slower = min(["step", "data"], key=lambda side: medians[f"{side} alone"])
    assert found["bottleneck"] == slower
    assert 0 <= found["waiting"]["median"] <= 1 and found["waiting"]["n"] == 2


@pytest.mark.smoke
def test_curves_of_the_same_run_are_equal_and_of_others_are_not(tmp_path: Path) -> None:
    flags = ["--dataset=digits", "--steps=24", "--arms", "mmae,fp32", "mmae,fp32,checkpointing"]
    found = run("curves", tmp_path / "r.json", [*flags, "mmae,bf16", "--num_workers=0"])
    same, again, other = found["curves"].values()
    assert len(same) == 24 and same == again and same != other
    assert found["rows"][1]["largest difference"] == "0.000%"
    apart = training_speed.apart(other, same)
    assert 0 < apart < 0.05
    expected = np.convolve(same, np.full(20, 1 / 20), "valid")
    np.testing.assert_allclose(training_speed.smooth(same), expected, rtol=1e-12)


@pytest.mark.smoke
def test_files_starts_from_a_listing(tmp_path: Path) -> None:
    flags = [f"--made={tmp_path}/many", "--count=1200", "--images=40", "--num_workers=1"]
    found = run("files", tmp_path / "r.json", [*flags, "--repeats=1"])
    assert found["images"] == 1200 and found["later_start_s"]["n"] == 1
    assert len(found["worker_bytes"]["late"]) == 1 == len(found["growth_bytes"])


@pytest.mark.smoke
def test_fifty_thousand_files_cost_a_worker_little_memory(tmp_path: Path) -> None:
    """38 bytes a file here, and 140 with a list of paths; and no more while images are read."""
    late = []
    for count, images in ((500, 400), (50_000, 12_800)):
        flags = [f"--made={tmp_path}/{count}", f"--count={count}", f"--images={images}"]
        flags += ["--num_workers=1", "--batch_size=64", "--repeats=1", "--warmup=0"]
        found = run("files", tmp_path / "r.json", flags)
        assert found["images"] == count
        # A list of paths would make 7 MB of it; 1 MB more or less is the allocator's.
        assert max(found["growth_bytes"]) < 3 * 2**20
        late += found["worker_bytes"]["late"]
    assert late[1] - late[0] < 4 * 2**20


# ---- What is made --------------------------------------------------------------------------------


def test_made_jpegs_are_like_imagenets(tmp_path: Path) -> None:
    files = list(jpegs_like_imagenet(16))
    assert files == list(jpegs_like_imagenet(16)) and len(set(files)) == 16
    make_jpegs(tmp_path, 4)
    source = build_dataset("imagefolder", "train", tmp_path)
    assert len(source) == 4
    for index in range(4):
        size = sorted(Image.open(source.file_name(index)).size)
        assert 337 <= size[0] <= 413 and 450 <= size[1] <= 550
    with pytest.raises(BadInput, match="already"):
        make_jpegs(tmp_path, 4)


def test_tiny_files_are_links(tmp_path: Path) -> None:
    make_tiny_files(tmp_path, 30, classes=3)
    paths = sorted(tmp_path.rglob("*.JPEG"))
    assert len(paths) == 30 and len({path.stat().st_ino for path in paths}) == 1
    assert len(build_dataset("imagefolder", "train", tmp_path).classes) == 3


def test_usual_path_is_torchvisions(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    crop = UsualFiles([str(tmp_path / "a.png")], (24, 16), (0.2, 1.0))[0]
    assert crop.shape == (3, 24, 16) and crop.dtype == torch.float32
    usual = UsualFiles([str(tmp_path / "a.png")], (24, 16), (0.2, 1.0))
    torch.manual_seed(1)
    floats = usual[0]
    torch.manual_seed(1)
    levels = usual.pixels(0)
    mean, std = (torch.tensor(s)[:, None, None] for s in (IMAGENET_MEAN, IMAGENET_STD))
    assert levels.dtype == torch.uint8
    torch.testing.assert_close(floats, (levels / 255 - mean) / std, rtol=0, atol=1e-6)
    assert -2.2 < crop.min() < 0 < crop.max() < 2.7
    with pytest.raises(BadInput, match="no files"):
        UsualFiles([], (24, 16), (0.2, 1.0))
