"""Weighted k-nearest-neighbour classification: exact, in chunks, the bank spread over processes.

Features become unit vectors on a grid of 2^-26. A float64 product of two of them then has no
rounding at all, in whatever order it is summed, so similarities, ties and votes are the same for
any chunk sizes and any number of processes. (In float32 the last bits depend on the shape of the
product: splitting 300 queries changed 89 % of the similarities.)

Shape legend: Q queries, N images of this process's share of the bank, D features, k neighbours, C
classes, W processes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from util.console import counted
from util.errors import BadInput
from util.float64 import to_float64
from util.train.dist import Processes

# Products of such numbers are multiples of 2^-52, and sums of them stay below 2 for unit vectors:
# float64's 53 bits hold them all. (In float32 a number above 1/4 has no finer steps anyway.)
STEPS = 2.0**26
NOBODY = torch.iinfo(torch.int64).max  # number of a neighbour that is not there


class Bank(NamedTuple):
    """Images of one process: its share of the bank, or its queries; on the CPU.

    Attributes:
        features: float32 [N, D], as `unit` gives them.
        number: int64 [N], ascending; an image's place in the set, over all processes.
        label: int64 [N], 0 to C - 1.
    """

    features: Tensor
    number: Tensor
    label: Tensor


class Neighbours(NamedTuple):
    """The nearest of each query, most similar first, of equals the lower number first.

    Where there are fewer than k, the rest have similarity -inf, number `NOBODY` and label 0.

    Attributes:
        similarity: float64 [Q, k], cosine.
        number: int64 [Q, k], as in `Bank`; label: int64 [Q, k].
    """

    similarity: Tensor
    number: Tensor
    label: Tensor


def unit(features: Tensor) -> Tensor:
    """L2-normalised features, rounded to multiples of 2^-26; zeros stay zeros.

    Args:
        features: float [N, D].

    Returns:
        float32 [N, D], which holds such numbers exactly; on the same device or, if that has no
        float64, on the CPU.
    """
    normalised = torch.nn.functional.normalize(to_float64(features), dim=1)
    return normalised.mul(STEPS).round().div(STEPS).float()


def nearest(queries: Tensor, bank: Bank, k: int, bank_chunk: int = 8192) -> Neighbours:
    """The k nearest of one process's share of the bank.

    On the queries' device it holds, for a chunk of R bank rows, 8 Q R bytes of similarities, four
    times that where many are equal, and 12 (Q + R) D bytes of features: nothing grows with N.

    Args:
        queries: float32 [Q, D], as `unit` gives them.
        k: neighbours, 1 or more.
        bank_chunk: R.

    Returns:
        on the queries' device, or on the CPU if that has no float64.
    """
    queries = to_float64(queries)
    Q, device = len(queries), queries.device
    found = Neighbours(
        torch.full((Q, k), -torch.inf, dtype=torch.float64, device=device),
        torch.full((Q, k), NOBODY, device=device),
        torch.zeros(Q, k, dtype=torch.int64, device=device),
    )
    for start in range(0, len(bank.features), bank_chunk):
        features, number, label = (t[start : start + bank_chunk].to(device) for t in bank)
        similarity, column = largest(queries @ features.double().T, k)
        chunk = Neighbours(similarity, number[column], label[column])
        found = best([found, chunk], k)
    return found


def largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, of equals the leftmost; in no particular order.

    Args:
        similarity: [Q, R].

    Returns:
        values and columns, both [Q, min(k, R)].
    """
    Q, R = similarity.shape
    if k >= R:
        return similarity, torch.arange(R, device=similarity.device).expand(Q, R)
    value, column = similarity.topk(k + 1, dim=1)
    # topk takes any of several equals. That matters where they stand on both sides of the cut.
    torn = value[:, k - 1] == value[:, k]
    value, column = value[:, :k], column[:, :k]
    if torn.any():
        ordered = similarity[torn].sort(dim=1, descending=True, stable=True)
        value[torn], column[torn] = ordered.values[:, :k], ordered.indices[:, :k]
    return value, column


def best(parts: list[Neighbours], k: int) -> Neighbours:
    """The k nearest among the neighbours that were found in several parts of the bank."""
    similarity, number, label = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    order = number.argsort(dim=1)
    by_number = similarity.gather(1, order)
    order = order.gather(1, by_number.argsort(dim=1, descending=True, stable=True))[:, :k]
    return Neighbours(*(tensor.gather(1, order) for tensor in (similarity, number, label)))


def neighbours(
    queries: Bank,
    bank: Bank,
    k: int,
    procs: Processes,
    *,
    query_chunk: int = 2048,
    bank_chunk: int = 8192,
) -> Iterator[tuple[Neighbours, Tensor]]:
    """The k nearest of the whole bank, for each query of this process. A collective.

    A chunk of queries, some of each process, goes to all; each looks in its own share of the bank,
    and sends what it found back to where the query came from. No process ever holds the whole bank.
    Beside its own share and queries, which stay on the CPU, a process needs what `nearest` does.

    Args:
        queries, bank: of this process; its share of the bank may be smaller than k, or empty.
        query_chunk: Q, over all processes (at least one of each).
        bank_chunk: see `nearest`.

    Yields:
        neighbours of the next queries, on the CPU, and the labels of these queries. As often on
        every process; the last ones may be empty.

    Raises:
        BadInput: k is larger than the whole bank; on every process alike.
    """
    size = sum(procs.gather(len(bank.features)))
    if k > size:
        raise BadInput(f"k is {k}, but the bank holds {counted(size, 'image')}; give a smaller --k")
    rows = max(1, query_chunk // procs.world_size)
    for start in range(0, max(procs.gather(len(queries.features))), rows):
        features, _, label = (tensor[start : start + rows] for tensor in queries)
        padded = features.new_zeros(rows, features.shape[1])  # collectives need equal shapes
        padded[: len(features)] = features
        found = nearest(_from_all(padded.to(procs.device), procs), bank, k, bank_chunk)
        if procs.world_size > 1:
            parts = [_to_askers(tensor, procs) for tensor in found]
            found = best([Neighbours(*part) for part in zip(*parts, strict=True)], k)
        yield Neighbours(*(tensor[: len(label)].cpu() for tensor in found)), label


def _from_all(tensor: Tensor, procs: Processes) -> Tensor:
    """The rows of every process, by rank: [R, ...] to [W * R, ...]."""
    if procs.world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(procs.world_size)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def _to_askers(tensor: Tensor, procs: Processes) -> tuple[Tensor, ...]:
    """Answers for every process, [W * R, ...], to those that each gave this one: W of [R, ...]."""
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor.contiguous())
    return received.chunk(procs.world_size)


def vote(found: Neighbours, k: int, temperature: float, num_classes: int) -> Tensor:
    """What the k nearest say: each has exp(similarity / temperature) votes for its class.

    The weights are relative to the nearest one's, so none overflows at any temperature.

    Args:
        found: at least k neighbours of each query.

    Returns:
        float64 [Q, C]; -1 for classes that no neighbour has, which is below any vote, also one
        that rounds to 0.

    Source: Wu et al. (arXiv 1805.01978), section 3.4, as used by DINO (arXiv 2104.14294).
    """
    similarity, label = found.similarity[:, :k], found.label[:, :k]
    weight = similarity.sub(similarity[:, :1]).div(temperature).exp()
    scores = weight.new_zeros(len(weight), num_classes).scatter_add_(1, label, weight)
    voted = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, label, True)
    return scores.where(voted, -1.0)


def rank_label(scores: Tensor, label: Tensor) -> Tensor:
    """How many classes stand before the right one, of equals the lower ones; 0: predicted.

    Args:
        scores: [Q, C], as `vote` gives them.
        label: int64 [Q].

    Returns:
        int64 [Q]; C where no neighbour has the right class.
    """
    own = scores.gather(1, label[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < label[:, None]
    before = (scores > own) | ((scores == own) & lower)
    return before.sum(dim=1).where(own[:, 0] >= 0, scores.shape[1])
