"""Types that all share."""

Pair = tuple[int, int]  # height and width: of an image, a patch, a grid
