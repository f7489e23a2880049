"""Decoders of masked autoencoders, by name: how masked patches are predicted.

A decoder is a piece of `models_mmae.MaskedAutoencoderViT`, whose own parameters it makes, so that
these keep the names of the official weights. A new one is one class under
`@DECODERS.register("name")`.

Shape legend: B images, L patches, K visible, M masked (L = K + M), P predicted, N tokens, D
channels, V values of a patch.
"""

import math
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from models_layers import (
    LayerNorm,
    PretrainBlock,
    QueryBlock,
    attend,
    make_block,
    mlp_hidden,
    run,
    scaled,
    take,
)
from util.errors import BadInput
from util.mask.cells import Cells
from util.names import Registry


class DecoderTrunk(nn.ModuleList):
    """Decoder blocks whose last one runs on the masked tokens alone; parameters `{i}.*`."""

    grad_checkpointing = False

    def __init__(
        self, dim: int, depth: int, num_heads: int, mlp_ratio: float, lscale_init: float | None
    ) -> None:
        if depth < 1:
            raise BadInput(f"the decoder needs at least one block, not {depth}")
        kinds = [PretrainBlock] * (depth - 1) + [QueryBlock]
        super().__init__(make_block(dim, num_heads, mlp_ratio, lscale_init, kind) for kind in kinds)

    def forward(self, x_BND: Tensor, num_queries: int) -> Tensor:
        """[B, N, D] to [B, num_queries, D], the last tokens of the sequence."""
        *blocks, last = self
        for block in blocks:
            x_BND = run(block, x_BND, recompute=self.grad_checkpointing)
        return run(last, x_BND, num_queries, recompute=self.grad_checkpointing)


class CrossAttention(nn.Module):
    """Attention of queries to a memory of another width; parameters q, kv, proj.

    Args:
        dim: width of the queries and of the result.
        memory_dim: width of the memory.
    """

    def __init__(self, dim: int, memory_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(memory_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BMD: Tensor, memory_BND: Tensor) -> Tensor:
        """Queries [B, M, D] and memory [B, N, memory_dim] to [B, M, D], before `proj`."""
        (B, M, D), N, heads = x_BMD.shape, memory_BND.shape[1], self.num_heads
        q = self.q(x_BMD).reshape(B, M, heads, D // heads).transpose(1, 2)
        kv = self.kv(memory_BND).reshape(B, N, 2, heads, D // heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        return attend(q, k, v).transpose(1, 2).reshape(B, M, D)


class CrossBlock(nn.Module):
    """A decoder block without self-attention: each query reads the memory and no other query.

    Names as in `Block`, plus `norm_memory` before the keys and values.
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        num_heads: int,
        mlp_ratio: float,
        lscale_init: float | None,
    ) -> None:
        super().__init__()
        self.norm_memory = LayerNorm(memory_dim)
        self.norm1 = LayerNorm(dim)
        self.attn = CrossAttention(dim, memory_dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = (
            nn.Identity() if lscale_init is None else LayerScale(dim, lscale_init) for _ in range(2)
        )

    def forward(self, x_BMD: Tensor, memory_BND: Tensor) -> Tensor:
        """Queries [B, M, D] and memory [B, N, memory_dim] to [B, M, D]."""
        mixed = self.attn(self.norm1(x_BMD), self.norm_memory(memory_BND))
        x_BMD = x_BMD + scaled(self.attn.proj, self.ls1, mixed)
        return x_BMD + scaled(self.mlp.fc2, self.ls2, mlp_hidden(self.mlp, self.norm2(x_BMD)))


class CrossTrunk(nn.ModuleList):
    """CrossMAE's decoder blocks: each reads its own learned weighted sum of the encoder's outputs.

    Args:
        dim: decoder width; memory_dim: encoder width.
        depth: decoder blocks.
        outputs: of the encoder that are mixed: its input and what each block gives.

    Parameters `{i}.*`, and `mix` [depth, outputs], which starts from N(0, 1 / outputs).

    Source: Fu et al., "Rethinking Patch Dependence for Masked Autoencoders" (arXiv 2401.14391).
    """

    grad_checkpointing = False

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        lscale_init: float | None,
        outputs: int,
    ) -> None:
        if depth < 1:
            raise BadInput(f"the decoder needs at least one block, not {depth}")
        super().__init__(
            CrossBlock(dim, memory_dim, num_heads, mlp_ratio, lscale_init) for _ in range(depth)
        )
        self.mix = nn.Parameter(torch.randn(depth, outputs) / math.sqrt(outputs))

    def forward(self, x_BMD: Tensor, outputs: list[Tensor]) -> Tensor:
        """Queries [B, M, D] and the encoder's outputs, each [B, N, memory_dim], to [B, M, D]."""
        memories = torch.einsum("io,obnd->ibnd", self.mix, torch.stack(outputs))
        for block, memory_BND in zip(self, memories, strict=True):
            x_BMD = run(block, x_BMD, memory_BND, recompute=self.grad_checkpointing)
        return x_BMD


class Decoder:
    """MAE's decoder: masked tokens and visible ones read each other, the last block queries alone.

    Attributes:
        encodes_masked: the encoder gets the masked patches too, as tokens.
        predicts_some: can predict a share of the masked patches, which it then chooses by `order`.
    """

    encodes_masked = False
    predicts_some = False

    def build(self, model: Any, depth: int, num_heads: int, mlp_ratio: float) -> None:
        """Give the model its decoder's parameters, in the order of the official weights.

        Args:
            model: with `embed_dim`, `decoder_embed_dim`, `lscale_init`, `blocks`, `cls_tokens` and
                `make_positions`.
        """
        model.decoder_embed = nn.Linear(model.embed_dim, model.decoder_embed_dim)
        self._add_token(model)
        self._add_positions(model)
        model.decoder_blocks = DecoderTrunk(
            model.decoder_embed_dim, depth, num_heads, mlp_ratio, model.lscale_init
        )

    def _add_token(self, model: Any) -> None:
        model.mask_token = nn.Parameter(torch.zeros(1, 1, model.decoder_embed_dim))

    def _add_positions(self, model: Any) -> None:
        model.decoder_pos_embed = model.make_positions(model.decoder_embed_dim)

    def token(self, model: Any) -> nn.Parameter:
        """The parameter that stands for masked patches."""
        return model.mask_token

    def num_predicted(self, model: Any, masked: int) -> int:
        """How many of so many masked patches of an image are predicted while training."""
        return masked

    def choose(self, model: Any, ids_BM: Tensor, order_BL: Tensor | None) -> Tensor:
        """Of the masked patches int64 [B, M] those to predict, in raster order: int64 [B, P].

        Args:
            order_BL: those of lowest order are predicted; None: all are.
        """
        return ids_BM

    def predict(
        self,
        model: Any,
        patches_BLV: Tensor,
        ids_visible: Tensor,
        ids_masked: Tensor,
        shift_B2: Tensor | None,
        order_BL: Tensor | None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode and decode.

        Args:
            patches_BLV: pixels. ids_visible, ids_masked: int64 [B, K] and [B, M], raster order.
            shift_B2: of the positions. order_BL: which masked patches are predicted first.
            kept: factors of the encoder's branches, see `models_layers.drop_path_factors`.

        Returns:
            [B, P, T] and which patches these are, int64 [B, P].
        """
        ids_BP = self.choose(model, ids_masked, order_BL)
        seen = ids_masked if self.encodes_masked else None
        more = {} if kept is None else {"kept": kept}
        latent_BND = model.forward_encoder(patches_BLV, ids_visible, shift_B2, seen, **more)
        x_BND = model.decoder_embed(latent_BND)
        code = model.position_code("decoder", shift_B2)
        first, K = model.cls_tokens, ids_visible.shape[1]
        cls_tokens = x_BND[:, :first] + model.decoder_pos_embed[:, :first]
        visible = x_BND[:, first : first + K] + take(code, ids_visible)
        token = x_BND[:, first + K :] if self.encodes_masked else model.mask_token
        masked = token + take(code, ids_BP)
        # Attention does not know order: visible first and masked last saves MAE's unshuffle.
        x_BND = torch.cat([cls_tokens, visible, masked], dim=1)
        x_BPD = model.decoder_blocks(x_BND, num_queries=ids_BP.shape[1])
        return model.decoder_pred(model.decoder_norm(x_BPD)), ids_BP


DECODERS: Registry[type[Decoder]] = Registry("decoder", {"full": Decoder})


class EncodedTokensDecoder(Decoder):
    """`Decoder` behind an encoder that sees mask tokens too (MAE's ablation)."""

    encodes_masked = True

    def _add_token(self, model: Any) -> None:
        model.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, model.embed_dim))

    def token(self, model: Any) -> nn.Parameter:
        """See `Decoder.token`."""
        return model.encoder_mask_token


class PredictsSome(Decoder):
    """A decoder that predicts a share of the masked patches while training, all of them after."""

    predicts_some = True

    def cells(self, model: Any) -> Cells:
        """What is predicted together."""
        return Cells(model.grid, (1, 1))

    def num_predicted(self, model: Any, masked: int) -> int:
        """In whole cells, at least one."""
        each = self.cells(model).patches_each
        return min(masked, each * max(1, round(model.predict_ratio * masked / each)))

    def choose(self, model: Any, ids_BM: Tensor, order_BL: Tensor | None) -> Tensor:
        """See `Decoder.choose`; the order of a cell is its first patch's."""
        count = self.num_predicted(model, ids_BM.shape[1])
        if order_BL is None or count == ids_BM.shape[1]:
            return ids_BM
        cells = self.cells(model)
        (h, w), (rows, columns) = cells.size, cells.grid
        firsts_BC = order_BL.unflatten(1, (rows, h, columns, w))[:, :, 0, :, 0].flatten(1)
        order_BL = cells.to_patches(firsts_BC)
        first = order_BL.gather(1, ids_BM).argsort(dim=1, stable=True)[:, :count]
        return ids_BM.gather(1, first.sort(dim=1).values)


@DECODERS.register("partial")
class PartialDecoder(PredictsSome):
    """MAE's decoder without the masked patches that are not predicted: those that are read each
    other and the visible ones. They are chosen in whole cells of the mask, so that a patch is
    predicted beside its neighbours. The parameters are those of `full`.
    """

    def cells(self, model: Any) -> Cells:
        """See `PredictsSome.cells`: a cell of the mask."""
        return model.predict_cells


@DECODERS.register("cross")
class CrossDecoder(PredictsSome):
    """CrossMAE's: masked tokens read the encoder's outputs and not each other (`CrossTrunk`)."""

    def build(self, model: Any, depth: int, num_heads: int, mlp_ratio: float) -> None:
        """See `Decoder.build`."""
        self._add_token(model)
        self._add_positions(model)
        model.decoder_blocks = CrossTrunk(
            model.decoder_embed_dim,
            model.embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            model.lscale_init,
            outputs=len(model.blocks) + 1,
        )

    def predict(
        self,
        model: Any,
        patches_BLV: Tensor,
        ids_visible: Tensor,
        ids_masked: Tensor,
        shift_B2: Tensor | None,
        order_BL: Tensor | None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Decoder.predict`; without an order all masked patches are predicted."""
        ids_BP = self.choose(model, ids_masked, order_BL)
        more = {} if kept is None else {"kept": kept}
        outputs = list(model.encode(patches_BLV, ids_visible, shift_B2, **more))
        x_BPD = model.mask_token + take(model.position_code("decoder", shift_B2), ids_BP)
        x_BPD = model.decoder_blocks(x_BPD, outputs)
        return model.decoder_pred(model.decoder_norm(x_BPD)), ids_BP
