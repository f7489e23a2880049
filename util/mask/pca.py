"""Principal components of patches, from sums: the patches need not be in memory together."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from util.errors import BadInput


class PatchFit(NamedTuple):
    """Principal components, float64.

    Attributes:
        mean: [V], of the patches.
        basis: [V, components] orthonormal columns, largest variance first, each with its entry of
            largest magnitude positive, as scikit-learn's `PCA.components_`.
        share: of the patches' total variance that lies in them, 0 to 1.
        patches: that it was fitted on.
    """

    mean: Tensor
    basis: Tensor
    share: float
    patches: int


class PatchMoments:
    """Sums of patches and of their products, in float64.

    Args:
        values: of a patch.
    """

    def __init__(self, values: int) -> None:
        self.values = values
        # Rows: the products, the sum, and the count in the first place.
        self.sums = torch.zeros(values + 2, values, dtype=torch.float64)

    def update(self, patches: Tensor) -> None:
        """Add patches [n, V] of normalised pixels: near 0, so the sums lose no digits."""
        patches = patches.detach().cpu().double()
        self.sums[: self.values] += patches.T @ patches
        self.sums[-2] += patches.sum(dim=0)
        self.sums[-1, 0] += len(patches)

    def sum_over(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Take in what the other processes have added."""
        self.sums = sum_over_ranks(self.sums)

    def principal(self, components: int) -> PatchFit:
        """The directions of largest variance.

        Raises:
            BadInput: more components than a patch has values, or no more patches than components.
        """
        count = int(self.sums[-1, 0])
        if components > self.values:
            raise BadInput(
                f"--pca_components {components} is more than the {self.values} values of a patch"
            )
        if count <= components:
            raise BadInput(
                f"{count} patches are too few for {components} PCA components; raise --pca_patches"
            )
        mean = self.sums[-2] / count
        products = self.sums[: self.values]
        covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
        variances, directions = torch.linalg.eigh(covariance)  # ascending
        basis = directions.flip(1)[:, :components]
        largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
        share = variances.flip(0)[:components].sum() / variances.sum()
        return PatchFit(mean, basis * largest.sign(), float(share), count)
