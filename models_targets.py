"""What a masked autoencoder predicts of a patch, by name.

A target turns the pixels of patches into what is to be predicted of them, and a prediction back
into pixels. It may have buffers or parameters of its own, which the checkpoint keeps under the
target's name. A new one is one class under `@TARGETS.register("name")`.

Shape legend: V values of a patch (its pixels times its channels), T values of its target.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from util.errors import BadInput
from util.flag_types import MOST_PATCHES, MOST_WIDTH, number
from util.mask.patches import apply_statistics, patch_statistics
from util.mask.pca import PatchMoments
from util.names import Registry

STATISTICS_NOTE = (
    "Model of normalised pixels: each hidden patch is shown with its true mean and deviation, "
    "which the model does not predict; the fills beside it are given the same."
)
PCA_PER_IMAGE = 16  # patches of one image that a PCA is fitted on


class Target(nn.Module):
    """The pixels themselves, and the base class of all targets.

    Args:
        patch_values: V.
        settings: of a target, keyword arguments that a flag of its own decides (`from_args`).

    Attributes:
        size: T, numbers that are predicted of a patch.
        borrows_statistics, note: see `models_protocols.PretrainModel`.
    """

    borrows_statistics = False
    note: str | None = None

    def __init__(self, patch_values: int) -> None:
        super().__init__()
        self.size = patch_values

    @staticmethod
    def add_flags(group: argparse._ArgumentGroup) -> None:
        """Add the flags that are the target's own."""

    @staticmethod
    def from_args(values: Mapping[str, Any]) -> dict[str, Any]:
        """Its settings, of the values of all flags."""
        return {}

    def forward(self, patches: Tensor) -> Tensor:
        """[..., V] of normalised pixels to what is to be predicted, [..., T]."""
        return patches

    def to_pixels(self, pred: Tensor, true_patches: Tensor) -> Tensor:
        """A prediction as pixels: [B, M, T] and the true patches [B, M, V] to [B, M, V].

        What is taken from the true patches is a loan, which `note` has to tell of.
        """
        return pred

    def fit_images(self, values: Mapping[str, Any]) -> int:
        """Training images that it has to be fitted on before the first step; 0: none.

        Args:
            values: of all flags, by name.
        """
        return 0

    def fit(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        images: int,
        values: Mapping[str, Any],
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> str:
        """Fit it, see `models_protocols.PretrainModel.fit`.

        Args:
            batches: patches [B, L, V] and an order of them, [B, L], by which to pick some.
        """
        raise NotImplementedError


TARGETS: Registry[type[Target]] = Registry("target", {"pixels": Target})


@TARGETS.register("norm_pixels")
class NormalisedPixels(Target):
    """Each patch normalised by its own mean and deviation (MAE, section 3)."""

    borrows_statistics = True
    note = STATISTICS_NOTE

    def forward(self, patches: Tensor) -> Tensor:
        """[..., V] to [..., V]."""
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def to_pixels(self, pred: Tensor, true_patches: Tensor) -> Tensor:
        """See `Target.to_pixels`; mean and deviation are the true ones."""
        return apply_statistics(pred, true_patches)


@TARGETS.register("pca")
class PatchPCA(Target):
    """PCA coefficients of patches (MAE's ablation): a fixed linear map, fitted before training.

    Its buffers are in the checkpoint, so that neither a resume nor a picture fits it again. They
    are NaN until `set` is called: a target that nobody fitted must not be trained on.

    Args:
        patch_values: V.
        pca_components: coefficients kept, those of largest variance first.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, patch_values: int, pca_components: int = 96) -> None:
        super().__init__(patch_values)
        if not 1 <= pca_components <= patch_values:
            raise BadInput(
                f"pca_components {pca_components} must be from 1 to the {patch_values} values of a "
                "patch"
            )
        self.size = pca_components
        self.register_buffer("mean", torch.full((patch_values,), torch.nan))
        self.register_buffer("basis", torch.full((patch_values, pca_components), torch.nan))

    @property
    def note(self) -> str:  # type: ignore[override]
        """See `Target`."""
        return (
            f"Model of PCA coefficients: detail beyond the {self.size} of a patch is in no "
            "prediction of it."
        )

    @staticmethod
    def add_flags(group: argparse._ArgumentGroup) -> None:
        """`--pca_components` and `--pca_patches`."""
        group.add_argument(
            "--pca_components",
            type=number(int, 1, MOST_WIDTH),
            default=96,
            help="coefficients of --target pca",
        )
        group.add_argument(
            "--pca_patches",
            type=number(int, 2, MOST_PATCHES),
            default=65536,
            help=f"training patches to fit the PCA on, {PCA_PER_IMAGE} of an image where there are "
            "enough images; the checkpoint keeps the fit",
        )

    @staticmethod
    def from_args(values: Mapping[str, Any]) -> dict[str, Any]:
        """See `Target.from_args`."""
        return {"pca_components": values["pca_components"]}

    def set(self, mean: Tensor, basis: Tensor) -> None:
        """Take in a fit: [V], and orthonormal columns [V, components], see `util.mask.pca`."""
        self.mean.copy_(mean)
        self.basis.copy_(basis)

    def forward(self, patches: Tensor) -> Tensor:
        """[..., V] to coefficients [..., components]."""
        # As normalised pixels are: a target is not rounded to autocast's precision.
        with torch.autocast(patches.device.type, enabled=False):
            return (patches - self.mean) @ self.basis

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Coefficients [..., components] to the nearest patches that have them, [..., V]."""
        return coefficients @ self.basis.T + self.mean

    def to_pixels(self, pred: Tensor, true_patches: Tensor) -> Tensor:
        """See `Target.to_pixels`."""
        return self.inverse(pred)

    def fit_images(self, values: Mapping[str, Any]) -> int:
        """See `Target.fit_images`; `--pca_patches` says of how many patches."""
        return -(-int(values["pca_patches"]) // PCA_PER_IMAGE)

    def fit(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        images: int,
        values: Mapping[str, Any],
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> str:
        """Principal components of normalised patches, as many random ones of each image.

        Raises:
            BadInput: more components than values or patches; on every process alike.
        """
        per_image = -(-int(values["pca_patches"]) // images)
        moments = PatchMoments(len(self.mean))
        for patches, order in batches:
            ids = order.argsort(dim=1)[:, :per_image, None]
            picked = patches.gather(1, ids.expand(-1, -1, patches.shape[-1]))
            moments.update(picked.flatten(0, 1))
        moments.sum_over(sum_over_ranks)
        fit = moments.principal(self.size)
        self.set(fit.mean, fit.basis)
        return (
            f"{self.size} PCA coefficients of {len(fit.mean)} values hold {fit.share:.2%} of the "
            f"variance of {fit.patches:,} training patches"
        )
