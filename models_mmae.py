"""M-MAE, and MAE, which is the same class with its terms off.

MAE (He et al., arXiv 2111.06377): the encoder sees visible patches alone, a light decoder predicts
the pixels of the masked ones. M-MAE adds LScale and an offset in the position code here, and its
masks in `util/mask/strategies.py`; the model is handed the mask, so it knows of no strategy.

Shape legend: B images, L patches, K visible, M masked (L = K + M), N tokens, D channels, V values
of a patch (ph*pw*C).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from models_layers import (
    CrossTrunk,
    DecoderTrunk,
    LayerNorm,
    PatchPCA,
    check_lscale,
    embed_patches,
    init_weights,
    make_block,
    pair,
    run,
    split_ids,
    take,
)
from util.errors import BadInput
from util.mask.patches import patch_statistics, patchify
from util.mask.pos_embed import COORDINATES, sincos_2d
from util.spec import Pair

DECODERS = ("full", "cross")


class MaskedAutoencoderViT(nn.Module):
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
        decoder: full: MAE's; cross: masked tokens read the encoder's outputs and not each other
            (CrossMAE, see `CrossTrunk`).
        predict_ratio: share of the masked patches that `cross` predicts while training.
        encoder_mask_tokens: the encoder sees all patches, the masked ones as a learned token with
            their position; the decoder has no token of its own (MAE's ablation).
        pca_components: the target is so many PCA coefficients of a patch (MAE's ablation), largest
            variance first; until `pca.set` is called the loss is NaN, see `PatchPCA`.

    Attributes:
        grid: (gh, gw) patches.

    Parameters are named as in timm and in the official MAE weights. `pos_embed` and
    `decoder_pos_embed` are frozen and hold the code without phase and shift.

    Raises:
        BadInput: sizes that do not fit each other.
    """

    grad_checkpointing = False

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
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.norm_pix_loss, self.pos_offset = norm_pix_loss, pos_offset
        self.decoder, self.predict_ratio = decoder, predict_ratio
        self.encoder_mask_tokens, self.pca_components = encoder_mask_tokens, pca_components
        self._check(num_heads, decoder_embed_dim, decoder_num_heads)
        if depth < 1 or not mlp_ratio > 0:
            raise BadInput(f"depth {depth} and mlp_ratio {mlp_ratio} must be positive")
        check_lscale(lscale_init)
        if not (math.isfinite(branch_init) and branch_init >= 0):
            raise BadInput(f"branch_init must be a number from 0 on, not {branch_init}")
        (h, w), (ph, pw) = self.img_size, self.patch_size
        self.grid = (h // ph, w // pw)
        num_tokens = 1 + self.grid[0] * self.grid[1]

        self.patch_embed = PatchEmbed(self.img_size, self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            make_block(embed_dim, num_heads, mlp_ratio, lscale_init) for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim)

        if decoder == "full":
            self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        if encoder_mask_tokens:
            self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        else:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            torch.zeros(1, num_tokens, decoder_embed_dim), requires_grad=False
        )
        if decoder == "full":
            self.decoder_blocks: DecoderTrunk | CrossTrunk = DecoderTrunk(
                decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio, lscale_init
            )
        else:
            self.decoder_blocks = CrossTrunk(
                decoder_embed_dim,
                embed_dim,
                decoder_depth,
                decoder_num_heads,
                mlp_ratio,
                lscale_init,
                outputs=depth + 1,
            )
        self.decoder_norm = LayerNorm(decoder_embed_dim)
        values = ph * pw * in_chans
        self.decoder_pred = nn.Linear(decoder_embed_dim, pca_components or values)
        self.pca = None if pca_components is None else PatchPCA(values, pca_components)

        # Phases of `learned`, row axis then column axis; a decoder of another width has its own.
        self.pos_phase = self.decoder_pos_phase = None
        if pos_offset == "learned":
            self.pos_phase = nn.Parameter(torch.zeros(2, embed_dim // 4))
            self.decoder_pos_phase = nn.Parameter(torch.zeros(2, decoder_embed_dim // 4))
        self.initialize_weights()
        for block in (*self.blocks, *self.decoder_blocks):
            block.attn.proj.weight.data *= branch_init
            block.mlp.fc2.weight.data *= branch_init

    def _check(self, num_heads: int, decoder_embed_dim: int, decoder_num_heads: int) -> None:
        sides = zip(self.img_size, self.patch_size, strict=True)
        if any(patch < 1 or side < 1 or side % patch for side, patch in sides):
            raise BadInput(
                f"image size {self.img_size} is not a multiple of the patch size {self.patch_size}"
            )
        if self.img_size == self.patch_size:
            raise BadInput(f"an image of one patch {self.patch_size} cannot be masked")
        if self.in_chans < 1:
            raise BadInput(f"in_chans must be at least 1, not {self.in_chans}")
        if self.pos_offset not in COORDINATES:
            raise BadInput(
                f"unknown pos_offset {self.pos_offset!r}, choose from {list(COORDINATES)}"
            )
        if self.decoder not in DECODERS:
            raise BadInput(f"unknown decoder {self.decoder!r}, choose from {list(DECODERS)}")
        if not 0 < self.predict_ratio <= 1 or (self.predict_ratio < 1 and self.decoder == "full"):
            raise BadInput(
                f"predict_ratio {self.predict_ratio} must be above 0 and at most 1, and below 1 "
                "needs decoder 'cross': full blocks mix all masked tokens"
            )
        if self.encoder_mask_tokens and self.decoder == "cross":
            raise BadInput(
                "encoder_mask_tokens needs decoder 'full': the queries of 'cross' are mask tokens "
                "of its own"
            )
        if self.pca_components is not None and self.norm_pix_loss:
            raise BadInput("norm_pix_loss and pca_components are two targets; choose one")
        for part, dim, heads in (
            ("encoder", self.embed_dim, num_heads),
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
            code = sincos_2d(pos_embed.shape[-1], self.grid, self.pos_offset)
            pos_embed.data[0, 1:].copy_(code)  # the class token's code stays zero
        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        token = self.encoder_mask_token if self.encoder_mask_tokens else self.mask_token
        nn.init.normal_(token, std=0.02)

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
            return fixed[:, 1:]
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
    ) -> Iterator[Tensor]:
        """The visible patches' tokens before the blocks and after each, the last one normalised.

        [B, L, V] and int64 [B, K] to depth + 1 times [B, 1 + K, D]; with `ids_masked` [B, M], which
        encoder_mask_tokens needs, [B, 1 + K + M, D].
        """
        code = self.position_code("encoder", shift_B2)
        x_BKD = embed_patches(self.patch_embed.proj, take(patches_BLV, ids_visible))
        x_BKD = x_BKD + take(code, ids_visible)
        tokens = [(self.cls_token + self.pos_embed[:, :1]).expand(len(x_BKD), -1, -1), x_BKD]
        if ids_masked is not None:
            tokens.append(self.encoder_mask_token + take(code, ids_masked))
        x_BND = torch.cat(tokens, dim=1)
        for block in self.blocks:
            yield x_BND
            x_BND = run(block, x_BND, recompute=self.grad_checkpointing)
        yield self.norm(x_BND)

    def forward_encoder(
        self,
        patches_BLV: Tensor,
        ids_visible: Tensor,
        shift_B2: Tensor | None = None,
        ids_masked: Tensor | None = None,
    ) -> Tensor:
        """The last of what `encode` gives."""
        for x_BND in self.encode(patches_BLV, ids_visible, shift_B2, ids_masked):
            latent_BND = x_BND
        return latent_BND

    def forward_cross_decoder(
        self, outputs: list[Tensor], ids_BM: Tensor, shift_B2: Tensor | None = None
    ) -> Tensor:
        """Predict some masked patches: what `encode` gives, and int64 [B, M], to [B, M, V]."""
        x_BMD = self.mask_token + take(self.position_code("decoder", shift_B2), ids_BM)
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x_BMD, outputs)))

    def forward_decoder(
        self,
        latent_BND: Tensor,
        ids_visible: Tensor,
        ids_masked: Tensor,
        shift_B2: Tensor | None = None,
    ) -> Tensor:
        """Predict the masked patches: [B, 1 + K, D] to [B, M, V], raster order.

        With encoder_mask_tokens, from [B, 1 + K + M, D].
        """
        x_BND = self.decoder_embed(latent_BND)
        code = self.position_code("decoder", shift_B2)
        K = ids_visible.shape[1]
        cls_token = x_BND[:, :1] + self.decoder_pos_embed[:, :1]
        visible = x_BND[:, 1 : 1 + K] + take(code, ids_visible)
        token = x_BND[:, 1 + K :] if self.encoder_mask_tokens else self.mask_token
        masked = token + take(code, ids_masked)
        # Attention does not know order: visible first and masked last saves MAE's unshuffle.
        x_BND = torch.cat([cls_token, visible, masked], dim=1)
        x_BMD = self.decoder_blocks(x_BND, num_queries=ids_masked.shape[1])
        return self.decoder_pred(self.decoder_norm(x_BMD))

    def target(self, patches: Tensor) -> Tensor:
        """What the decoder is to predict of patches [..., V].

        Their pixels, normalised pixels, or PCA coefficients [..., pca_components].
        """
        if self.pca is not None:
            return self.pca(patches)
        if not self.norm_pix_loss:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def pixels_of(self, pred: Tensor) -> Tensor:
        """The inverse of `target` for PCA coefficients: [..., pca_components] to [..., V].

        Pixels stay as they are; normalised ones do too, for their statistics are not predicted.
        """
        return pred if self.pca is None else self.pca.inverse(pred)

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        num_visible: int | None = None,
        shift: Tensor | None = None,
        order: Tensor | None = None,
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

        Returns:
            loss: scalar, squared error, mean over a patch's target and all predicted patches.
            pred: [B, M, V], the predicted patches (all masked ones, if there is no order) in raster
                order, in the space of the target.
            mask: as given.
        """
        if num_visible is None:
            num_visible = self.count_visible(mask)
        if images.shape[1:] != (self.in_chans, *self.img_size):
            raise BadInput(
                f"images are {tuple(images.shape[1:])}, the model was built for "
                f"{(self.in_chans, *self.img_size)} (channels, height, width)"
            )
        if len(mask) != len(images):
            raise BadInput(f"{len(mask)} masks for {len(images)} images")
        if shift is not None and self.pos_offset != "jitter":
            raise BadInput(f"pos_offset {self.pos_offset!r} takes no shift")
        if shift is not None and shift.shape != (len(images), 2):
            raise BadInput(f"shift is {tuple(shift.shape)}, expected {(len(images), 2)}")
        patches_BLV = patchify(images, self.patch_size)
        ids_visible, ids_masked = split_ids(mask, num_visible)
        if self.decoder == "cross":
            ids_masked = self.chosen(ids_masked, order)
            outputs = list(self.encode(patches_BLV, ids_visible, shift))
            pred = self.forward_cross_decoder(outputs, ids_masked, shift)
        else:
            seen = ids_masked if self.encoder_mask_tokens else None
            latent = self.forward_encoder(patches_BLV, ids_visible, shift, seen)
            pred = self.forward_decoder(latent, ids_visible, ids_masked, shift)
        target = self.target(take(patches_BLV, ids_masked))
        loss = F.mse_loss(pred.to(target.dtype), target)
        return {"loss": loss, "pred": pred, "mask": mask}

    def num_predicted(self, num_visible: int) -> int:
        """Masked patches of an image that are predicted while training, at least one."""
        masked = self.grid[0] * self.grid[1] - num_visible
        return max(1, round(self.predict_ratio * masked))

    def chosen(self, ids_BM: Tensor, order_BL: Tensor | None) -> Tensor:
        """Of the masked patches int64 [B, M] those to predict, in raster order: int64 [B, P]."""
        num_visible = self.grid[0] * self.grid[1] - ids_BM.shape[1]
        count = self.num_predicted(num_visible)
        if order_BL is None or count == ids_BM.shape[1]:
            return ids_BM
        first = order_BL.gather(1, ids_BM).argsort(dim=1, stable=True)[:, :count]
        return ids_BM.gather(1, first.sort(dim=1).values)

    def count_visible(self, mask: Tensor) -> int:
        """Visible patches of each row of a mask [B, L], after checking it.

        Raises:
            BadInput: not a boolean mask of this grid, or rows with different counts.
        """
        num_patches = self.grid[0] * self.grid[1]
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != num_patches:
            raise BadInput(
                f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool [B, {num_patches}]"
            )
        counts = (~mask).sum(dim=1).unique().tolist()
        if len(counts) != 1 or not 0 < counts[0] < num_patches:
            raise BadInput(f"every row needs the same count of visible patches, found {counts}")
        return int(counts[0])
