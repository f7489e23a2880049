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
            model: with `embed_dim`, `decoder_embed_dim`, `lscale_init`, `num_patches` and `blocks`.
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
        model.decoder_pos_embed = nn.Parameter(
            torch.zeros(1, 1 + model.num_patches, model.decoder_embed_dim), requires_grad=False
        )

    def token(self, model: Any) -> nn.Parameter:
        """The parameter that stands for masked patches."""
        return model.mask_token

    def num_predicted(self, model: Any, masked: int) -> int:
        """How many of so many masked patches of an image are predicted while training."""
        return masked

    def predict(
        self,
        model: Any,
        patches_BLV: Tensor,
        ids_visible: Tensor,
        ids_masked: Tensor,
        shift_B2: Tensor | None,
        order_BL: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Encode and decode.

        Args:
            patches_BLV: pixels. ids_visible, ids_masked: int64 [B, K] and [B, M], raster order.
            shift_B2: of the positions. order_BL: which masked patches are predicted first.

        Returns:
            [B, P, T] and which patches these are, int64 [B, P]; P is M for most decoders.
        """
        seen = ids_masked if self.encodes_masked else None
        latent_BND = model.forward_encoder(patches_BLV, ids_visible, shift_B2, seen)
        x_BND = model.decoder_embed(latent_BND)
        code = model.position_code("decoder", shift_B2)
        K = ids_visible.shape[1]
        cls_token = x_BND[:, :1] + model.decoder_pos_embed[:, :1]
        visible = x_BND[:, 1 : 1 + K] + take(code, ids_visible)
        token = x_BND[:, 1 + K :] if self.encodes_masked else model.mask_token
        masked = token + take(code, ids_masked)
        # Attention does not know order: visible first and masked last saves MAE's unshuffle.
        x_BND = torch.cat([cls_token, visible, masked], dim=1)
        x_BMD = model.decoder_blocks(x_BND, num_queries=ids_masked.shape[1])
        return model.decoder_pred(model.decoder_norm(x_BMD)), ids_masked


DECODERS: Registry[type[Decoder]] = Registry("decoder", {"full": Decoder})


class EncodedTokensDecoder(Decoder):
    """`Decoder` behind an encoder that sees mask tokens too (MAE's ablation)."""

    encodes_masked = True

    def _add_token(self, model: Any) -> None:
        model.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, model.embed_dim))

    def token(self, model: Any) -> nn.Parameter:
        """See `Decoder.token`."""
        return model.encoder_mask_token


@DECODERS.register("cross")
class CrossDecoder(Decoder):
    """CrossMAE's: masked tokens read the encoder's outputs and not each other (`CrossTrunk`)."""

    predicts_some = True

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

    def num_predicted(self, model: Any, masked: int) -> int:
        """At least one."""
        return max(1, round(model.predict_ratio * masked))

    def predict(
        self,
        model: Any,
        patches_BLV: Tensor,
        ids_visible: Tensor,
        ids_masked: Tensor,
        shift_B2: Tensor | None,
        order_BL: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See `Decoder.predict`; without an order all masked patches are predicted."""
        ids_BP = self._choose(model, ids_masked, order_BL)
        outputs = list(model.encode(patches_BLV, ids_visible, shift_B2))
        x_BPD = model.mask_token + take(model.position_code("decoder", shift_B2), ids_BP)
        x_BPD = model.decoder_blocks(x_BPD, outputs)
        return model.decoder_pred(model.decoder_norm(x_BPD)), ids_BP

    def _choose(self, model: Any, ids_BM: Tensor, order_BL: Tensor | None) -> Tensor:
        """Of the masked patches int64 [B, M] those to predict, in raster order: int64 [B, P]."""
        count = self.num_predicted(model, ids_BM.shape[1])
        if order_BL is None or count == ids_BM.shape[1]:
            return ids_BM
        first = order_BL.gather(1, ids_BM).argsort(dim=1, stable=True)[:, :count]
        return ids_BM.gather(1, first.sort(dim=1).values)
