"""Images that cannot be decoded, and what takes their place."""

import numpy as np
import pytest
import torch
from odd_files import odd_files
from torch.utils.data import DataLoader, Dataset

from util.data.datasets import build_dataset
from util.data.images import BadImage
from util.data.randomness import Key
from util.data.replace import BAD_SLOTS, bad_slots, decode, find_fault
from util.errors import BadInput


class Holes:
    """Image i is i, except the broken ones."""

    def __init__(self, length: int, broken: set[int]) -> None:
        self.length, self.broken = length, broken
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, int]:
        self.asked.append(index)
        if index in self.broken:
            raise BadImage(f"{index}.jpg", "broken")
        return index, 100 + index


class Decoded(Dataset):
    """What a worker does with `decode`."""

    def __init__(self, source) -> None:
        self.source = source

    def __getitem__(self, key: Key) -> dict:
        image, label, bad = decode(self.source, key, seed=3)
        return {"x": int(np.asarray(image).sum()), "y": label, "bad": bad_slots(bad)}


def test_a_good_image_is_itself():
    source = Holes(5, {1})
    assert decode(source, Key(0, 2), seed=0) == (2, 102, [])
    assert source.asked == [2]


def test_a_bad_image_is_replaced_with_its_label():
    image, label, bad = decode(Holes(50, {7}), Key(0, 7), seed=0)
    assert image != 7 and label == 100 + image and bad == [7]


@pytest.mark.parametrize("other", [Key(1, 7), Key(0, 8), Key(0, 7, 1)])
def test_the_replacement_is_a_function_of_seed_and_key(other):
    source = Holes(1_000_000, {7, 8})
    first = decode(source, Key(0, 7), seed=0)[0]
    assert decode(source, Key(0, 7), seed=0)[0] == first
    assert decode(source, other, seed=0)[0] != first
    assert decode(source, Key(0, 7), seed=1)[0] != first


def test_replacements_spread_over_the_set():
    seen = {decode(Holes(10, {0}), Key(epoch, 0), seed=0)[0] for epoch in range(100)}
    assert seen == set(range(1, 10))


def test_a_replacement_that_is_bad_too_is_replaced_and_named_once():
    good = {3}
    source = Holes(20, set(range(20)) - good)
    image, label, bad = decode(source, Key(0, 0), seed=0)
    assert (image, label) == (3, 103)
    assert bad[0] == 0 and len(bad) > 1 and 3 not in bad
    assert len(set(bad)) == len(bad) and source.asked == [*bad, 3]


@pytest.mark.parametrize("length", [1, 30])
def test_a_set_without_a_good_image_ends_with_a_message(length):
    source = Holes(length, set(range(length)))
    with pytest.raises(BadInput, match=rf"of {length} images were tried .*broken.*--data_path"):
        decode(source, Key(0, 0), seed=0)
    assert len(source.asked) <= length


def test_other_errors_pass():
    class Lost(Holes):
        def __getitem__(self, index: int) -> tuple[int, int]:
            raise OSError("stale mount")

    with pytest.raises(OSError, match="stale mount"):
        decode(Lost(5, set()), Key(0, 0), seed=0)


def test_slots_have_one_shape():
    for count in range(7):
        slots = bad_slots(list(range(count)))
        assert slots.dtype == torch.int64 and slots.shape == (BAD_SLOTS,)
        assert [i for i in slots.tolist() if i >= 0] == list(range(count))[:BAD_SLOTS]


def test_a_folder_of_odd_files_loads_the_same_with_any_workers(tmp_path):
    kinds = odd_files(tmp_path / "train/a")
    source = build_dataset("imagefolder", "train", tmp_path)
    assert sorted(kinds) == sorted(source.file_name(i).split("/")[-1] for i in range(len(source)))
    expected = {i for i in range(len(source)) if kinds[source.files[i][2:]] == "bad"}
    keys = [
        [Key(1, i) for i in range(s, min(s + 8, len(source)))] for s in range(0, len(source), 8)
    ]
    runs = []
    for workers in (0, 2):
        batches = list(DataLoader(Decoded(source), batch_sampler=keys, num_workers=workers))
        runs.append({k: torch.cat([batch[k] for batch in batches]) for k in batches[0]})
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    first = runs[0]["bad"][:, 0]
    assert set(first[first >= 0].tolist()) == expected
    found = runs[0]["bad"]
    assert set(found[found >= 0].tolist()) == expected


def test_the_fault_of_an_image_can_be_asked_for():
    source = Holes(3, {1})
    assert find_fault(source, 1) == "broken" and "changed since" in find_fault(source, 2)
