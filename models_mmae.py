"""M-MAE, and MAE, which is the same class with its terms off; the pieces of both.

MAE (He et al., arXiv 2111.06377): the encoder sees visible patches alone, a light decoder predicts
the pixels of the masked ones. M-MAE adds LScale and an offset in the position code here, and its
masks in `util/mask/strategies.py`; the model is handed the mask, so it knows of no strategy. How
masked patches are decoded, and what is predicted of them, are pieces: `models_decoders`,
`models_targets`.

Shape legend: B images, L patches, K visible, M masked (L = K + M), N tokens, D channels, V values
of a patch (ph*pw*C), n class tokens.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from torch import Tensor, nn

from models_decoders import DECODERS, CrossTrunk, DecoderTrunk, EncodedTokensDecoder
from models_layers import (
    LayerNorm,
    check_lscale,
    drop_path_factors,
    embed_patches,
    init_weights,
    make_block,
    pair,
    run,
    split_ids,
    take,
)
from models_protocols import PretrainModel, add_drop_path_flag, check_drop_path
from models_targets import TARGETS, Target
from util.errors import BadInput
from util.flag_types import (
    MOST_BLOCKS,
    MOST_LSCALE,
    MOST_WIDTH,
    number,
    optional,
    size_pair,
)
from util.mask.cells import make_cells
from util.mask.patches import masked_patches, patchify, put_masked
from util.mask.pos_embed import COORDINATES, sincos_2d
from util.spec import EncoderState, InputSpec, Pair

# Positions of patches: MAE's frozen code, or a trained table.
POSITIONS = ("sincos", "learned")
MOST_CLS_TOKENS = 256
# What `--method` presets; each flag of its own overrides. The first is the default.
METHODS: dict[str, dict[str, Any]] = {
    "mmae": {
        "mask": "mixed",
        "avg_share": 0.5,
        "avg_order": "far",
        "avg_temperature": 1.0,
        "lscale_init": 0.1,
        "pos_offset": "learned",
    },
    "mae": {
        "mask": "random",
        "avg_share": 0.5,
        "avg_order": "far",
        "avg_temperature": 1.0,
        "lscale_init": None,
        "pos_offset": "none",
    },
}


class MaskedAutoencoderViT(PretrainModel):
    """Masked autoencoder with a vision-transformer encoder.

    Args:
        img_size: side or (height, width), pixels; multiples of the patch size.
        patch_size: side or (height, width), pixels.
        in_chans: channels of the image.
        embed_dim, depth, num_heads, mlp_ratio: the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder.
        norm_pix_loss: the target is each patch normalised by its own mean and deviation.
        lscale_init: LScale's gamma at the start; None: no LScale.
        branch_init: factor on the last weights of every attention and MLP branch at the start.
            What LScale does to the first step, without its parameters: the study's control.
        pos_offset: none | center | learned | jitter, see `util.mask.pos_embed`.
        decoder: full: MAE's; partial: MAE's without the masked patches that are not predicted;
            cross: masked tokens read the encoder's outputs and not each other (CrossMAE, see
            `CrossTrunk`).
        predict_ratio: share of the masked patches that `partial` and `cross` predict in training.
        encoder_mask_tokens: the encoder sees all patches, the masked ones as a learned token with
            their position; the decoder has no token of its own (MAE's ablation).
        pca_components: the target is so many PCA coefficients of a patch (MAE's ablation), largest
            variance first; until `pca.set` is called the loss is NaN, see `PatchPCA`.
        target: name of another target, see `models_targets.TARGETS`; None: pixels, or what the two
            arguments above say.
        target_settings: keyword arguments of that target.
        cls_tokens: n class tokens; encoder and decoder keep them all.
        positions: sincos: MAE's frozen code; learned: trained tables in encoder and decoder, of
            class tokens too, which start from a truncated normal distribution of deviation .02.
        drop_path: stochastic depth of the encoder while training, rising linearly to this. It is
            drawn with each image, so that a run does not depend on how its batches are split.
        predict_cell: side, or (rows, columns), in patches, of the cells of which `partial` chooses
            whole ones; 0: a whole axis.

    Attributes:
        grid: (gh, gw) patches.

    Parameters are named as in timm and in the official MAE weights. `pos_embed` and
    `decoder_pos_embed` of `sincos` are frozen and hold the code without phase and shift.

    Raises:
        BadInput: sizes that do not fit each other.
    """

    grad_checkpointing = False
    decoder_blocks: DecoderTrunk | CrossTrunk
    decoder_pos_embed: nn.Parameter
    encoder_mask_token: nn.Parameter
    methods: ClassVar[Mapping[str, Mapping[str, Any]]] = METHODS
    default_model = "mae_vit_base_patch16"

    def __init__(
        self,
        img_size: int | Pair = 224,
        patch_size: int | Pair = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        lscale_init: float | None = None,
        pos_offset: str = "none",
        decoder: str = "full",
        predict_ratio: float = 1.0,
        encoder_mask_tokens: bool = False,
        pca_components: int | None = None,
        branch_init: float = 1.0,
        target: str | None = None,
        target_settings: Mapping[str, Any] | None = None,
        cls_tokens: int = 1,
        positions: str = "sincos",
        drop_path: float = 0.0,
        predict_cell: int | Pair = 1,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        self.in_chans, self.embed_dim, self.num_heads = in_chans, embed_dim, num_heads
        self.mlp_ratio, self.lscale_init = mlp_ratio, lscale_init
        self.norm_pix_loss, self.pos_offset = norm_pix_loss, pos_offset
        self.decoder, self.predict_ratio = decoder, predict_ratio
        self.decoder_embed_dim = decoder_embed_dim
        self.encoder_mask_tokens, self.pca_components = encoder_mask_tokens, pca_components
        self.cls_tokens, self.positions, self.drop_path = cls_tokens, positions, drop_path
        self._check(depth, decoder_embed_dim, decoder_num_heads, branch_init)
        (h, w), (ph, pw) = self.img_size, self.patch_size
        self.grid = self.mask_grid = (h // ph, w // pw)
        cell = (predict_cell,) if isinstance(predict_cell, int) else tuple(predict_cell)
        self.predict_cells = make_cells(self.grid, cell)
        self.input = InputSpec(in_chans, self.img_size)
        self.num_patches = self.grid[0] * self.grid[1]

        self.patch_embed = PatchEmbed(self.img_size, self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, cls_tokens, embed_dim))
        self.pos_embed = self.make_positions(embed_dim)
        self.blocks = nn.ModuleList(
            make_block(embed_dim, num_heads, mlp_ratio, lscale_init) for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim)

        self.decoding = EncodedTokensDecoder() if encoder_mask_tokens else DECODERS[decoder]()
        self.decoding.build(self, decoder_depth, decoder_num_heads, mlp_ratio)
        self.decoder_norm = LayerNorm(decoder_embed_dim)
        self.target_name, piece = self._make_target(target, target_settings, ph * pw * in_chans)
        self.decoder_pred = nn.Linear(decoder_embed_dim, piece.size)
        self.add_module(self.target_name, piece)

        # Phases of `learned`, row axis then column axis; a decoder of another width has its own.
        self.pos_phase = self.decoder_pos_phase = None
        if pos_offset == "learned":
            self.pos_phase = nn.Parameter(torch.zeros(2, embed_dim // 4))
            self.decoder_pos_phase = nn.Parameter(torch.zeros(2, decoder_embed_dim // 4))
        self.initialize_weights()
        for block in (*self.blocks, *self.decoder_blocks):
            block.attn.proj.weight.data *= branch_init
            block.mlp.fc2.weight.data *= branch_init

    def make_positions(self, width: int) -> nn.Parameter:
        """A table for class tokens and patches, 0 before it is initialised: [1, n + L, width]."""
        table = torch.zeros(1, self.cls_tokens + self.num_patches, width)
        return nn.Parameter(table, requires_grad=self.positions == "learned")

    def _make_target(
        self, name: str | None, settings: Mapping[str, Any] | None, patch_values: int
    ) -> tuple[str, Target]:
        """The target and its name, of the constructor's arguments."""
        if name is None:
            name = "norm_pixels" if self.norm_pix_loss else "pixels"
            if self.pca_components is not None:
                name, settings = "pca", {"pca_components": self.pca_components}
        return name, TARGETS.find(name)(patch_values, **(settings or {}))

    # ------------------------------------------------------------------- what everybody is told

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """M-MAE's terms, sizes of patches and decoder, the decoder's kind and the target."""
        add_term_flags(parser)
        add_architecture_flags(parser)
        add_target_flags(parser)

    @classmethod
    def from_args(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """See `PretrainModel.from_args`."""
        names = ("norm_pix_loss", "lscale_init", "branch_init", "pos_offset", "decoder",
                 "predict_ratio", "encoder_mask_tokens")  # fmt: skip
        arguments = {name: values[name] for name in names}
        if values["decoder"] == "partial":
            cell = list(values["mask_cell"])
            arguments["predict_cell"] = cell[0] if len(cell) == 1 else cell
        target = values["target"]
        arguments["pca_components"] = values["pca_components"] if target == "pca" else None
        if target not in ("pixels", "norm_pixels", "pca"):
            settings = TARGETS.find(target).from_args(values)
            arguments |= {"target": target, "target_settings": settings}
        sizes = ("patch_size", "decoder_depth", "decoder_embed_dim", "decoder_num_heads",
                 "cls_tokens", "positions", "drop_path")  # fmt: skip
        return arguments | {n: values[n] for n in sizes if values[n] is not None}

    @property
    def draws(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override]
        """`shift` of the positions, in patches, for `jitter`; `order` of the patches to predict,
        for a decoder that predicts some, or of those to fit a target on; `kept`: which branches of
        the encoder an image drops.
        """
        shift = {"shift": (2,)} if self.pos_offset == "jitter" else {}
        picks = self.predict_ratio < 1 or self.target_name == "pca"
        order = {"order": (self.num_patches,)} if picks else {}
        return shift | order | ({"kept": (len(self.blocks), 2)} if self.drop_path else {})

    @property
    def target(self) -> Target:
        """What is predicted of a patch."""
        return getattr(self, self.target_name)

    @property
    def borrows_statistics(self) -> bool:  # type: ignore[override]
        """See `PretrainModel`."""
        return self.target.borrows_statistics

    @property
    def note(self) -> str | None:
        """See `PretrainModel`."""
        return self.target.note

    def num_predicted(self, num_visible: int) -> int:
        """Masked patches of an image that are predicted while training, at least one."""
        return self.decoding.num_predicted(self, self.num_patches - num_visible)

    def adjust_lr(self, lr: float, num_visible: int) -> float:
        """CrossMAE's rule: fewer predictions, smaller steps."""
        # In this order: a run's learning rate keeps its last digit.
        return lr * self.num_predicted(num_visible) / (self.num_patches - num_visible)

    def describe(self, num_visible: int) -> str:
        """See `PretrainModel.describe`."""
        ph, pw = self.patch_size
        return (
            f"patches {ph} x {pw}: {super().describe(num_visible)}, "
            f"{self.num_predicted(num_visible)} predicted"
        )

    def fit_images(self, values: Mapping[str, Any]) -> int:
        """See `PretrainModel.fit_images`."""
        return self.target.fit_images(values)

    def fit(
        self,
        batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]],
        images: int,
        values: Mapping[str, Any],
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> str:
        """See `PretrainModel.fit`."""
        patches = ((patchify(x, self.patch_size), drawn["order"]) for x, drawn in batches)
        return f"target: {self.target.fit(patches, images, values, sum_over_ranks)}"

    def encoder_state(self) -> EncoderState:
        """See `PretrainModel.encoder_state`: a vision transformer with its class tokens."""
        arguments = {
            "img_size": list(self.img_size),
            "patch_size": list(self.patch_size),
            "in_chans": self.in_chans,
            "embed_dim": self.embed_dim,
            "depth": len(self.blocks),
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "lscale_init": self.lscale_init,
        }
        mine = ("patch_embed.", "cls_token", "pos_embed", "pos_phase", "blocks.", "norm.")
        weights = {k: v for k, v in self.state_dict().items() if k.startswith(mine)}
        if type(self).position_code is not MaskedAutoencoderViT.position_code:
            # A subclass with positions of its own: as a table, which nobody makes anew by formula.
            weights.pop("pos_phase", None)
            first = self.pos_embed[:, : self.cls_tokens].detach()
            weights["pos_embed"] = torch.cat([first, self.position_code().detach()], dim=1)
        elif self.positions == "sincos":
            arguments["pos_offset"] = self.pos_offset
        if self.cls_tokens > 1:
            arguments["cls_tokens"] = self.cls_tokens
        return EncoderState("vit", arguments, weights)

    # ------------------------------------------------------------------------------- the model

    def _check(
        self, depth: int, decoder_embed_dim: int, decoder_num_heads: int, branch_init: float
    ) -> None:
        sides = zip(self.img_size, self.patch_size, strict=True)
        if any(patch < 1 or side < 1 or side % patch for side, patch in sides):
            raise BadInput(
                f"image size {self.img_size} is not a multiple of the patch size {self.patch_size}"
            )
        if self.img_size == self.patch_size:
            raise BadInput(f"an image of one patch {self.patch_size} cannot be masked")
        if depth < 1 or not self.mlp_ratio > 0:
            raise BadInput(f"depth {depth} and mlp_ratio {self.mlp_ratio} must be positive")
        check_lscale(self.lscale_init)
        if not (math.isfinite(branch_init) and branch_init >= 0):
            raise BadInput(f"branch_init must be a number from 0 on, not {branch_init}")
        if self.in_chans < 1:
            raise BadInput(f"in_chans must be at least 1, not {self.in_chans}")
        if self.pos_offset not in COORDINATES:
            raise BadInput(
                f"unknown pos_offset {self.pos_offset!r}, choose from {list(COORDINATES)}"
            )
        if self.cls_tokens < 1:
            raise BadInput(f"cls_tokens must be at least 1, not {self.cls_tokens}")
        if self.positions not in POSITIONS:
            raise BadInput(f"unknown positions {self.positions!r}, choose from {list(POSITIONS)}")
        if self.positions == "learned" and self.pos_offset != "none":
            raise BadInput(
                f"pos_offset {self.pos_offset!r} is an offset of the sin-cos code, and positions "
                "'learned' have no code; choose pos_offset 'none' (M-MAE presets another) or "
                "positions 'sincos'"
            )
        check_drop_path(self.drop_path)
        some = DECODERS.find(self.decoder).predicts_some
        if not 0 < self.predict_ratio <= 1 or (self.predict_ratio < 1 and not some):
            raise BadInput(
                f"predict_ratio {self.predict_ratio} must be above 0 and at most 1, and below 1 "
                "needs decoder 'partial' or 'cross': MAE's predicts all masked patches"
            )
        if self.encoder_mask_tokens and self.decoder != "full":
            raise BadInput(
                "encoder_mask_tokens needs decoder 'full': it predicts each token that the encoder "
                "was given"
            )
        if self.pca_components is not None and self.norm_pix_loss:
            raise BadInput("norm_pix_loss and pca_components are two targets; choose one")
        for part, dim, heads in (
            ("encoder", self.embed_dim, self.num_heads),
            ("decoder", decoder_embed_dim, decoder_num_heads),
        ):
            if heads < 1 or dim < 1 or dim % heads or dim % 4:
                raise BadInput(
                    f"{part} width {dim} must be a multiple of its {heads} heads, and of 4 "
                    "for the position code"
                )

    def initialize_weights(self) -> None:
        """MAE's initialisation: as its code, the patch projection as if it were a Linear."""
        for pos_embed in (self.pos_embed, self.decoder_pos_embed):
            if self.positions == "learned":
                trunc_normal_(pos_embed, std=0.02)
                continue
            code = sincos_2d(pos_embed.shape[-1], self.grid, self.pos_offset)
            # A class token's code stays zero.
            pos_embed.data[0, self.cls_tokens :].copy_(code)
        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.decoding.token(self), std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass instead of keeping them (as timm's)."""
        self.grad_checkpointing = self.decoder_blocks.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters never decayed whatever their shape: angles have no preferred zero."""
        return {"pos_phase", "decoder_pos_phase"}

    def position_code(self, part: str = "encoder", shift_B2: Tensor | None = None) -> Tensor:
        """The code of the patches as the encoder or the decoder adds it.

        Args:
            part: encoder | decoder.
            shift_B2: [B, 2], row then column, in patches (`jitter`); None: no shift.

        Returns:
            [1, L, D], or [B, L, D] with a shift; in the dtype of the parameters.
        """
        fixed = self.pos_embed if part == "encoder" else self.decoder_pos_embed
        phase = self.pos_phase if part == "encoder" else self.decoder_pos_phase
        if phase is None and shift_B2 is None:
            return fixed[:, self.cls_tokens :]
        code = sincos_2d(fixed.shape[-1], self.grid, self.pos_offset, phase=phase, shift=shift_B2)
        code = code if code.ndim == 3 else code.unsqueeze(0)
        # Rounded first: the device may have no float64, see `util.float64`.
        return code.to(fixed.dtype).to(fixed.device)

    def encode(
        self,
        patches_BLV: Tensor,
        ids_visible: Tensor,
        shift_B2: Tensor | None = None,
        ids_masked: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The visible patches' tokens before the blocks and after each, the last one normalised.

        [B, L, V] and int64 [B, K] to depth + 1 times [B, n + K, D]; with `ids_masked` [B, M], which
        a decoder that `encodes_masked` needs, [B, n + K + M, D]. `kept` [B, depth, 2] are factors
        of the branches, see `drop_path_factors`.
        """
        code = self.position_code("encoder", shift_B2)
        x_BKD = embed_patches(self.patch_embed.proj, take(patches_BLV, ids_visible))
        x_BKD = x_BKD + take(code, ids_visible)
        cls_tokens = self.cls_token + self.pos_embed[:, : self.cls_tokens]
        tokens = [cls_tokens.expand(len(x_BKD), -1, -1), x_BKD]
        if ids_masked is not None:
            tokens.append(self.encoder_mask_token + take(code, ids_masked))
        x_BND = torch.cat(tokens, dim=1)
        for i, block in enumerate(self.blocks):
            yield x_BND
            factors = None if kept is None else kept[:, i]
            x_BND = run(block, x_BND, factors, recompute=self.grad_checkpointing)
        yield self.norm(x_BND)

    def forward_encoder(
        self,
        patches_BLV: Tensor,
        ids_visible: Tensor,
        shift_B2: Tensor | None = None,
        ids_masked: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The last of what `encode` gives."""
        more = {} if kept is None else {"kept": kept}  # what overrides a piece may not know it
        for x_BND in self.encode(patches_BLV, ids_visible, shift_B2, ids_masked, **more):
            latent_BND = x_BND
        return latent_BND

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        mask: Tensor,
        num_visible: int | None = None,
        shift: Tensor | None = None,
        order: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One masked autoencoding.

        Args:
            images: float [B, C, H, W], normalised.
            mask: bool [B, L], True = masked, the same count in every row.
            num_visible: False entries in each row. None: counted, which waits for the device;
                given, it is believed.
            shift: [B, 2] patches, the offset of `jitter`, for training. None: no shift.
            order: [B, L]; with a `predict_ratio` below 1 only that share of the masked patches is
                predicted, those of lowest order. None: all of them.
            kept: [B, depth, 2], what drop path draws, for training. None: nothing is dropped.

        Returns:
            loss: scalar, squared error, mean over a patch's target and all predicted patches.
            pred: [B, M, V], the predicted patches (all masked ones, if there is no order) in raster
                order, in the space of the target.
            mask: as given.
        """
        if num_visible is None:
            num_visible = self.count_unmasked(mask)
        self.check_images(images, mask)
        if shift is not None and self.pos_offset != "jitter":
            raise BadInput(f"pos_offset {self.pos_offset!r} takes no shift")
        if shift is not None and shift.shape != (len(images), 2):
            raise BadInput(f"shift is {tuple(shift.shape)}, expected {(len(images), 2)}")
        if kept is not None and not self.drop_path:
            raise BadInput("a model without drop_path keeps every branch")
        more = {} if kept is None else {"kept": drop_path_factors(kept, self.drop_path)}
        patches_BLV = patchify(images, self.patch_size)
        ids_visible, ids_masked = split_ids(mask, num_visible)
        pred, ids_predicted = self.decoding.predict(
            self, patches_BLV, ids_visible, ids_masked, shift, order, **more
        )
        target = self.target(take(patches_BLV, ids_predicted))
        loss = F.mse_loss(pred.to(target.dtype), target)
        return {"loss": loss, "pred": pred, "mask": mask}

    def reconstruct(self, x: Tensor, mask: Tensor, num_visible: int | None = None) -> Tensor:
        """See `PretrainModel.reconstruct`; visible patches are the input's own."""
        pred = self(x, mask, num_visible)["pred"].float()
        pixels = self.target.to_pixels(pred, masked_patches(x, mask, self.patch_size))
        return put_masked(x, mask, pixels, self.patch_size)


def add_term_flags(parser: argparse.ArgumentParser) -> None:
    """The terms of M-MAE that are in the model; its masks have flags of their own."""
    group = parser.add_argument_group("terms of the method (unset ones follow --method)")
    group.add_argument(
        "--lscale_init",
        type=optional(number(float, 0, MOST_LSCALE, open_low=True)),
        help="initial value of LScale's gamma; none: no LScale",
    )
    group.add_argument(
        "--branch_init",
        type=number(float, 0, MOST_LSCALE),
        default=1.0,
        help="factor on the initial last weights of each residual branch (the control of LScale)",
    )
    group.add_argument(
        "--pos_offset",
        choices=list(COORDINATES),
        help="of the sin-cos positions: none counts from 0 (MAE), center from the image's centre; "
        "learned: and trained phases; jitter: and a random shift of each training image",
    )


def add_architecture_flags(parser: argparse.ArgumentParser) -> None:
    """Patches, and the decoder."""
    group = parser.add_argument_group("architecture (unset sizes follow --model)")
    group.add_argument(
        "--patch_size", type=size_pair, help="patch size in pixels; default: that of --model"
    )
    group.add_argument(
        "--decoder",
        choices=list(DECODERS),
        default="full",
        help="partial: MAE's, without the masked patches that are not predicted; cross: "
        "CrossMAE's: masked tokens read what the encoder gives, and not each other",
    )
    group.add_argument(
        "--predict_ratio",
        type=number(float, 0, 1, open_low=True),
        default=1.0,
        help="share of the masked patches that --decoder partial (in whole cells of the mask) or "
        "cross predicts; the lr follows it",
    )
    for name, low, most, what in (
        ("depth", 1, MOST_BLOCKS, "blocks of the decoder"),
        ("embed_dim", 4, MOST_WIDTH, "width of the decoder"),
        ("num_heads", 1, MOST_WIDTH, "attention heads of the decoder"),
    ):
        group.add_argument(
            f"--decoder_{name}", type=number(int, low, most), help=f"{what}; default: the model's"
        )
    group.add_argument(
        "--encoder_mask_tokens",
        action="store_true",
        help="the encoder sees mask tokens too (MAE's ablation): about 3 times the computation",
    )
    group.add_argument(
        "--cls_tokens",
        type=number(int, 1, MOST_CLS_TOKENS),
        help="class tokens, which the decoder reads too; default: the model's, of MAE 1",
    )
    group.add_argument(
        "--positions",
        choices=POSITIONS,
        help="of patches and class tokens: sincos: MAE's frozen code; learned: trained tables in "
        "encoder and decoder; default: the model's",
    )
    add_drop_path_flag(group)


class SetTarget(argparse.Action):
    """`--target`, and `--norm_pix_loss`, MAE's name of one of its values: the last one counts."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        """Keep the two in step."""
        namespace.target = values if self.dest == "target" else "norm_pixels"
        namespace.norm_pix_loss = namespace.target == "norm_pixels"


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    """What the decoder predicts."""
    group = parser.add_argument_group("target")
    group.add_argument(
        "--target",
        choices=list(TARGETS),
        action=SetTarget,
        default="pixels",
        help="norm_pixels: patches normalised by themselves; pca: their PCA coefficients",
    )
    group.add_argument(
        "--norm_pix_loss",
        action=SetTarget,
        nargs=0,
        const=True,
        default=False,
        help="predict normalised pixels; MAE's name of --target norm_pixels",
    )
    for target in TARGETS.values():
        target.add_flags(group)
