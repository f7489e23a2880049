"""Position codes against MAE's formula by loops, transformers' ViTMAE, and what offsets must do."""

import math

import numpy as np
import pytest
import torch

from util.errors import BadInput
from util.mask.pos_embed import COORDINATES, sincos_2d

GRIDS = [(14, 14), (7, 5), (1, 8), (3, 2), (4, 4)]
DIM = 24
PAIRS = DIM // 4  # (sin, cos) pairs, that is frequencies, per axis


def code_by_loops(dim, rows, columns, phase=None) -> np.ndarray:
    """MAE's code, one number at a time: float64 [rows*columns, dim].

    Its channels: sines of the column, cosines of the column, sines of the row, cosines of the row.
    `rows` and `columns` are coordinates; `phase` is [row, column][frequency].
    """
    pairs = dim // 4
    code = np.empty((len(rows) * len(columns), dim))
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            for k in range(pairs):
                frequency = math.pow(10000.0, -k / pairs)
                phase_y, phase_x = (phase[0][k], phase[1][k]) if phase is not None else (0.0, 0.0)
                patch = code[i * len(columns) + j]
                patch[k] = math.sin(frequency * x + phase_x)
                patch[pairs + k] = math.cos(frequency * x + phase_x)
                patch[2 * pairs + k] = math.sin(frequency * y + phase_y)
                patch[3 * pairs + k] = math.cos(frequency * y + phase_y)
    return code


def split(code: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per axis, its sines and its cosines: each [..., L, PAIRS]."""
    sin_x, cos_x, sin_y, cos_y = code.split(PAIRS, dim=-1)
    return {"row": (sin_y, cos_y), "column": (sin_x, cos_x)}


def some_phase(seed: int = 0) -> torch.Tensor:
    """float64 [2, PAIRS], radians."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, PAIRS, dtype=torch.float64, generator=generator)


# --- MAE's code ---


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dim", [4, 24, 192])
def test_none_equals_the_mae_formula(grid, dim):
    code = sincos_2d(dim, grid)
    assert code.dtype == torch.float64 and code.shape == (grid[0] * grid[1], dim)
    expected = code_by_loops(dim, range(grid[0]), range(grid[1]))
    np.testing.assert_allclose(code, expected, rtol=0, atol=1e-13)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("size", "patch", "width", "decoder_width"), [(224, 16, 768, 512), (36, 4, 48, 20)]
)
def test_none_equals_transformers(size, patch, width, decoder_width):
    # Their modules one by one: a whole new model of theirs (5.23) ends with its codes set to zero.
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder, ViTMAEEmbeddings

    config = ViTMAEConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=width,
        decoder_hidden_size=decoder_width,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=8,
    )
    grid = (size // patch, size // patch)
    embeddings = ViTMAEEmbeddings(config)
    embeddings.initialize_weights()
    decoder = ViTMAEDecoder(config, num_patches=grid[0] * grid[1])
    for theirs in (embeddings.position_embeddings, decoder.decoder_pos_embed):
        ours = sincos_2d(theirs.shape[-1], grid).float()
        # Theirs is float32: the absolute tolerance is one rounding of a number below 1.
        torch.testing.assert_close(ours, theirs[0, 1:].detach(), rtol=0, atol=6e-8)


# --- Offsets ---


@pytest.mark.parametrize("grid", GRIDS)
def test_center_puts_zero_in_the_middle(grid):
    rows, columns = ([i - (size - 1) / 2 for i in range(size)] for size in grid)
    code = sincos_2d(DIM, grid, "center")
    np.testing.assert_allclose(code, code_by_loops(DIM, rows, columns), rtol=0, atol=1e-13)
    # Turned by 180 degrees the coordinates change their sign: sines with them, cosines not.
    for sines, cosines in split(code).values():
        assert torch.equal(sines.flip(0), -sines)
        assert torch.equal(cosines.flip(0), cosines)


@pytest.mark.parametrize("grid", GRIDS)
def test_learned_starts_and_jitter_rests_as_center(grid):
    center = sincos_2d(DIM, grid, "center")
    assert torch.equal(sincos_2d(DIM, grid, "learned", phase=torch.zeros(2, PAIRS)), center)
    assert torch.equal(sincos_2d(DIM, grid, "jitter"), center)
    still = sincos_2d(DIM, grid, "jitter", shift=torch.zeros(3, 2))
    assert torch.equal(still, center.expand(3, -1, -1))


def test_a_phase_is_added_to_the_angle_of_its_axis_and_frequency():
    grid, phase = (7, 5), some_phase()
    code = sincos_2d(DIM, grid, "learned", phase=phase)
    rows, columns = ([i - (size - 1) / 2 for i in range(size)] for size in grid)
    expected = code_by_loops(DIM, rows, columns, phase.numpy())
    np.testing.assert_allclose(code, expected, rtol=0, atol=1e-13)
    # The angle addition theorem.
    center = split(sincos_2d(DIM, grid, "center"))
    for phi, (axis, (sines, cosines)) in zip(phase, split(code).items(), strict=True):
        sin, cos = center[axis]
        torch.testing.assert_close(sines, sin * phi.cos() + cos * phi.sin(), rtol=0, atol=1e-13)
        torch.testing.assert_close(cosines, cos * phi.cos() - sin * phi.sin(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_the_phase_of_one_axis_leaves_the_other_alone(axis):
    phase = some_phase()
    phase[["column", "row"].index(axis)] = 0
    changed = split(sincos_2d(DIM, (4, 4), "learned", phase=phase))
    center = split(sincos_2d(DIM, (4, 4), "center"))
    for name in center:
        same = all(torch.equal(a, b) for a, b in zip(center[name], changed[name], strict=True))
        assert same == (name != axis), name


def test_jitter_shifts_the_coordinates_of_each_image():
    grid = (7, 5)
    shift = torch.rand(4, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    codes = sincos_2d(DIM, grid, "jitter", shift=shift)
    assert codes.dtype == torch.float64 and codes.shape == (4, 35, DIM)
    for code, (down, right) in zip(codes, shift.tolist(), strict=True):
        rows = [i - 3 + down for i in range(7)]
        columns = [j - 2 + right for j in range(5)]
        np.testing.assert_allclose(code, code_by_loops(DIM, rows, columns), rtol=0, atol=1e-13)
    alone = torch.cat([sincos_2d(DIM, grid, "jitter", shift=one[None]) for one in shift])
    assert torch.equal(alone, codes)


def test_a_whole_shift_is_a_move_by_one_patch():
    code = sincos_2d(DIM, (6, 5), "jitter", shift=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    center = sincos_2d(DIM, (6, 5), "center").reshape(6, 5, DIM)
    down, right = code.reshape(2, 6, 5, DIM)
    torch.testing.assert_close(down[:-1], center[1:], rtol=0, atol=1e-13)
    torch.testing.assert_close(right[:, :-1], center[:, 1:], rtol=0, atol=1e-13)


# --- A constant offset only rotates ---


def constant_offsets() -> dict[str, torch.Tensor]:
    """Codes of a 7 x 5 grid with offsets that are the same for all of its patches."""
    return {
        "center": sincos_2d(DIM, (7, 5), "center"),
        "learned": sincos_2d(DIM, (7, 5), "learned", phase=some_phase()),
        "jitter": sincos_2d(DIM, (7, 5), "jitter", shift=torch.tensor([[0.31, -0.47]]))[0],
    }


@pytest.mark.parametrize("name", ["center", "learned", "jitter"])
def test_a_constant_offset_rotates_each_pair_and_no_more(name):
    plain, moved = sincos_2d(DIM, (7, 5)), constant_offsets()[name]
    assert (plain - moved).abs().max() > 0.1
    for axis in ("row", "column"):
        before, after = (torch.stack(split(code)[axis], dim=-1) for code in (plain, moved))
        for k in range(PAIRS):
            # The linear map that takes this pair, of all patches, to what the offset made of it.
            rotation = torch.linalg.lstsq(before[:, k], after[:, k]).solution
            torch.testing.assert_close(before[:, k] @ rotation, after[:, k], rtol=0, atol=1e-9)
            eye = torch.eye(2, dtype=torch.float64)
            torch.testing.assert_close(rotation @ rotation.T, eye, rtol=0, atol=1e-9)
            assert abs(torch.linalg.det(rotation) - 1) < 1e-9
    # So the similarity of any two patches, all that attention could see at first, is unchanged.
    torch.testing.assert_close(moved @ moved.T, plain @ plain.T, rtol=0, atol=1e-12)


# --- Numbers, gradients, devices ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_arithmetic_is_float64(dtype):
    phase, shift = some_phase().to(dtype), torch.tensor([[0.3, -0.2]], dtype=dtype)
    code = sincos_2d(DIM, (7, 5), "learned", phase=phase, shift=shift)
    assert code.dtype == torch.float64
    wide = sincos_2d(DIM, (7, 5), "learned", phase=phase.double(), shift=shift.double())
    assert torch.equal(code, wide)


@pytest.mark.parametrize("pos_offset", list(COORDINATES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_a_code(pos_offset, dtype):
    settings = {"phase": some_phase().float(), "shift": torch.tensor([[0.3, -0.2], [0.1, 0.4]])}
    expected = sincos_2d(DIM, (7, 5), pos_offset, **settings)
    with torch.autocast("cpu", dtype):
        code = sincos_2d(DIM, (7, 5), pos_offset, **settings)
    assert code.dtype == torch.float64 and torch.equal(code, expected)


def test_the_gradient_reaches_every_phase():
    phase = some_phase().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda phi: sincos_2d(DIM, (3, 2), "learned", phase=phi), (phase,), eps=1e-6, atol=1e-7
    )
    parameter = torch.nn.Parameter(torch.zeros(2, PAIRS))  # as it starts, in float32
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, DIM, dtype=torch.float64, generator=generator)
    (sincos_2d(DIM, (3, 2), "learned", phase=parameter) * weights).sum().backward()
    assert parameter.grad.dtype == torch.float32
    assert parameter.grad.abs().min() > 0


def test_a_code_is_computed_where_it_is_asked_for():
    assert sincos_2d(DIM, (3, 2), device=torch.device("meta")).device.type == "meta"
    phase = torch.zeros(2, PAIRS, device="meta")
    assert sincos_2d(DIM, (3, 2), "learned", phase=phase).device.type == "meta"
    shift = torch.zeros(5, 2, device="meta")
    code = sincos_2d(DIM, (3, 2), "jitter", shift=shift)
    assert code.device.type == "meta" and code.shape == (5, 6, DIM)


def test_bad_settings_say_what_is_valid():
    for dim in (6, 30, 1):
        with pytest.raises(BadInput, match=f"multiple of 4.*{dim}"):
            sincos_2d(dim, (4, 4))
    with pytest.raises(BadInput, match="'centre'") as error:
        sincos_2d(DIM, (4, 4), "centre")
    assert all(name in str(error.value) for name in COORDINATES)
