"""What we are compared with: transformers' ViTMAE and MAE as its authors compute it (step), PIL and
torchvision (data).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from models_simmim import SimMIM
from util.data.images import IMAGENET_MEAN, IMAGENET_STD
from util.errors import BadInput, needs
from util.spec import Pair


def create_vitmae(arguments: Mapping[str, Any], img_size: int, mask_ratio: float) -> nn.Module:
    """transformers' ViTMAEForPreTraining with the sizes of one of our models, random weights.

    Args:
        arguments: of `MaskedAutoencoderViT`, square patches.

    Raises:
        BadInput: transformers is not installed.
    """
    vitmae = needs("transformers", "transformers")
    config = vitmae.ViTMAEConfig(
        image_size=img_size,
        patch_size=arguments["patch_size"],
        num_channels=arguments.get("in_chans", 3),
        hidden_size=arguments["embed_dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=4 * arguments["embed_dim"],
        decoder_hidden_size=arguments["decoder_embed_dim"],
        decoder_num_hidden_layers=arguments["decoder_depth"],
        decoder_num_attention_heads=arguments["decoder_num_heads"],
        decoder_intermediate_size=4 * arguments["decoder_embed_dim"],
        mask_ratio=mask_ratio,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    return vitmae.ViTMAEForPreTraining(config)


class SwinMIM(nn.Module):
    """transformers' SwinForMaskedImageModeling with the sizes of one of our models, random weights.

    Args:
        arguments: of `SimMIM` with Swin.

    Raises:
        BadInput: transformers is not installed.
    """

    def __init__(self, arguments: Mapping[str, Any], mask_ratio: float) -> None:
        super().__init__()
        library = needs("transformers", "transformers")
        names = ("patch_size", "embed_dim", "depths", "num_heads", "window_size")
        side, patch = arguments["img_size"], arguments["patch_size"]
        config = library.SwinConfig(
            image_size=side,
            num_channels=arguments.get("in_chans", 3),
            encoder_stride=patch * 2 ** (len(arguments["depths"]) - 1),
            drop_path_rate=0.0,
            attn_implementation="sdpa",
            **{name: arguments[name] for name in names},
        )
        self.model = library.SwinForMaskedImageModeling(config)
        presets = SimMIM.presets(arguments)["simmim"]
        self.cell = presets["mask_cell"][0]
        self.cells = side // patch // self.cell
        self.visible = SimMIM.num_visible(self.cells**2, mask_ratio)

    def gradient_checkpointing_enable(self) -> None:
        """As transformers' models have it."""
        self.model.gradient_checkpointing_enable()

    def forward(self, images: Tensor) -> Tensor:
        """The loss of images under new masks, drawn on their device."""
        noise = torch.rand(len(images), self.cells**2, device=images.device)
        mask = noise.argsort(dim=1).argsort(dim=1) >= self.visible
        mask = mask.view(-1, self.cells, self.cells)
        mask = mask.repeat_interleave(self.cell, 1).repeat_interleave(self.cell, 2)
        return self.model(images, bool_masked_pos=mask.flatten(1)).loss


class OfficialMAE(nn.Module):
    """MAE as its authors' code computes it, operation by operation; parameters have its names.

    Every patch is embedded, the visible ones are then chosen. Attention is products and a softmax.
    Mask tokens are put among the visible ones, every decoder block runs on all of them, and every
    patch is predicted; the loss is multiplied by the mask.

    Args:
        arguments: of `MaskedAutoencoderViT`, square patches.

    Source: He et al., arXiv 2111.06377, and its released code.
    """

    def __init__(self, arguments: Mapping[str, Any], img_size: int, mask_ratio: float) -> None:
        super().__init__()
        dim, width = arguments["embed_dim"], arguments["decoder_embed_dim"]
        channels, self.patch = arguments.get("in_chans", 3), arguments["patch_size"]
        self.mask_ratio = mask_ratio
        self.patch_embed = PatchEmbed(img_size, self.patch, channels, dim)
        patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim), requires_grad=False)
        self.blocks = _blocks(dim, arguments["depth"], arguments["num_heads"])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(
            torch.zeros(1, 1 + patches, width), requires_grad=False
        )
        self.decoder_blocks = _blocks(
            width, arguments["decoder_depth"], arguments["decoder_num_heads"]
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, self.patch**2 * channels)

    def forward(self, images: Tensor, noise_BL: Tensor | None = None) -> Tensor:
        """The loss of normalised pixels: float [B, C, H, W] to a scalar.

        Args:
            noise_BL: patches of the largest are masked; None: drawn here, on the device.
        """
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        B, L, D = x.shape
        visible = int(L * (1 - self.mask_ratio))
        noise = torch.rand(B, L, device=x.device) if noise_BL is None else noise_BL
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        x = x.gather(1, shuffle[:, :visible, None].expand(-1, -1, D))
        mask = torch.ones(B, L, device=x.device)
        mask[:, :visible] = 0
        mask = mask.gather(1, restore)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        tokens = self.mask_token.expand(B, L - visible, -1).to(x.dtype)
        among = torch.cat([x[:, 1:], tokens], dim=1)
        among = among.gather(1, restore.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], among], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        target = self._patches(images)
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        errors = ((pred - (target - mean) / (var + 1e-6).sqrt()) ** 2).mean(dim=-1)
        return (errors * mask).sum() / mask.sum()

    def _patches(self, images: Tensor) -> Tensor:
        B, C, H, W = images.shape
        side = self.patch
        x = images.reshape(B, C, H // side, side, W // side, side)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(B, -1, side**2 * C)


def _blocks(dim: int, depth: int, heads: int) -> nn.ModuleList:
    """timm's blocks without its fused attention."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    blocks = [Block(dim, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
    for block in blocks:
        block.attn.fused_attn = False
    return nn.ModuleList(blocks)


class UsualFiles(Dataset):
    """The usual path from files: PIL, then torchvision's first transforms, floats at the end.

    Args:
        files: paths.
        size: (h, w) of the crop, pixels.
        crop_scale: smallest and largest share of the image's area.
    """

    def __init__(self, files: list[str], size: Pair, crop_scale: tuple[float, float]) -> None:
        if not files:
            raise BadInput("no files to decode")
        self.files = files
        crop = transforms.RandomResizedCrop(
            size, scale=crop_scale, interpolation=transforms.InterpolationMode.BICUBIC
        )
        self.view = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
        self.floats = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        )
        self.levels = transforms.PILToTensor()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """One augmented and normalised crop: float32 [3, h, w]."""
        return self.floats(self._view(index))

    def pixels(self, index: int) -> Tensor:
        """One augmented crop, without floats and normalisation: uint8 [3, h, w]."""
        return self.levels(self._view(index))

    def _view(self, index: int) -> Image.Image:
        with open(self.files[index], "rb") as file:
            return self.view(Image.open(file).convert("RGB"))
