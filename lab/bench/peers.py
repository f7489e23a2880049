"""What we are compared with: transformers' ViTMAE (step), PIL and torchvision (data)."""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

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
