"""The photographs that scikit-image and scikit-learn ship in their wheels."""

from pathlib import Path

from PIL import Image

from util.data.images import IMAGENET_MEAN, IMAGENET_STD, PathLike, as_channels, read_image
from util.data.source import Source
from util.errors import BadInput, needs

# Real photographs only: no charts, logos, text or masks. The motorcycles are a stereo pair, so they
# stay on one side.
# fmt: off
PHOTOS = {
    "train": [
        "astronaut.png", "brick.png", "camera.png", "coins.png", "flower.jpg", "grass.png",
        "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
        "motorcycle_right.png", "retina.jpg", "rocket.jpg",
    ],
    "val": ["chelsea.png", "coffee.png", "china.jpg"],
}
# fmt: on
FROM_SKLEARN = {"china.jpg", "flower.jpg"}
PHOTOS_EPOCH = 2048
PHOTOS_VAL_CROPS = 64
# Two files are larger than this; whole, they would cost several times a crop of the others.
PHOTOS_LONGEST_SIDE = 768


class PhotosSource(Source):
    """The bundled photographs, decoded once and kept (13 MB for train).

    Train: index i is photograph i % n, whole, so an epoch is the files times a constant and each
    visit gets a crop of its own from the augmentation. Val: fixed square crops by index.
    """

    labelled = False  # every photograph is its own class

    def __init__(self, split: str, images: list[Image.Image]) -> None:
        classes = [Path(name).stem for name in PHOTOS["train"] + PHOTOS["val"]]
        super().__init__("photos", split, IMAGENET_MEAN, IMAGENET_STD, classes)
        self.images = images
        self.first_label = 0 if split == "train" else len(PHOTOS["train"])
        repeats = round(PHOTOS_EPOCH / len(images))
        self.length = len(images) * repeats if split == "train" else PHOTOS_VAL_CROPS

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        visit, file = divmod(index, len(self.images))
        image = self.images[file]
        if self.split == "val":
            image = image.crop(photo_crop(*image.size, visit))
        return as_channels(image, self.channels), self.first_label + file

    def file_name(self, index: int) -> str:
        return f"photos-{self.split}-{index} ({PHOTOS[self.split][index % len(self.images)]})"


def photo_crop(width: int, height: int, k: int) -> tuple[int, int, int, int]:
    """The k-th square of a photograph, (left, top, right, bottom) in pixels.

    Its side is from a third of the short side to all of it, evenly in the logarithm. By a Halton
    sequence: k = 0 is the largest centred square, and any first few differ in scale and position.
    """
    scale, x, y = (halton(k, base) for base in (2, 3, 5))
    side = round(min(width, height) * 3**-scale)
    left = round((x + 0.5) % 1 * (width - side))
    top = round((y + 0.5) % 1 * (height - side))
    return left, top, left + side, top + side


def halton(k: int, base: int) -> float:
    """The digits of k behind the point, in reverse: evenly spread over 0..1."""
    value, digit = 0.0, 1.0
    while k:
        digit /= base
        k, remainder = divmod(k, base)
        value += remainder * digit
    return value


def photos(split: str, data_path: PathLike | None) -> PhotosSource:
    """Photographs that the wheels of scikit-image and scikit-learn hold; whole files are held out.

    Statistics are ImageNet's. Labels number the files, train and val together.
    """
    skimage = needs("skimage", "scikit-image")
    sklearn = needs("sklearn", "scikit-learn")
    images = []
    for name in PHOTOS[split]:
        package, folder = skimage, "data"
        if name in FROM_SKLEARN:
            package, folder = sklearn, "datasets/images"
        path = Path(str(package.__file__)).parent / folder / name
        if not path.is_file():
            raise BadInput(
                f"{package.__name__} {package.__version__} ships no {path}; reinstall it from its "
                "wheel: pip install --force-reinstall scikit-image scikit-learn"
            )
        image = read_image(path, 3)
        image.thumbnail((PHOTOS_LONGEST_SIDE, PHOTOS_LONGEST_SIDE))
        images.append(image)
    return PhotosSource(split, images)
