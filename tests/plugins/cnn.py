"""A plugin for tests: a method whose encoder is a small convolutional network."""

import torch.nn.functional as F
from torch import nn

from models_protocols import Encoder, PretrainModel
from models_zoo import register_encoder, register_model
from util.spec import EncoderState, InputSpec


class ConvEncoder(Encoder):
    pools = ("avg", "max")
    stages = ("stem", "body")

    def __init__(self, img_size=16, in_chans=3, width=16, num_classes=0, global_pool=None,
                 drop_path=0.0, probe=False):  # fmt: skip
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.input, self.num_features = InputSpec(in_chans, size), width
        self.stem = nn.Conv2d(in_chans, width, 4, stride=4)
        self.body = nn.Sequential(nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU())
        self.make_head(num_classes, global_pool, probe)

    def forward_features(self, x):
        return self.body(self.stem(x))

    def pool(self, x, kind):
        return x.mean(dim=(2, 3)) if kind == "avg" else x.amax(dim=(2, 3))


class ConvModel(PretrainModel):
    def __init__(self, img_size=16, in_chans=3, width=16):
        super().__init__()
        self.encoder = ConvEncoder(img_size, in_chans, width)
        self.input, (h, w) = self.encoder.input, self.encoder.img_size
        self.mask_grid, self.width = (h // 4, w // 4), width
        self.predict = nn.Conv2d(width, 16 * in_chans, 1)

    def forward(self, x, mask, num_visible=None, **drawn):
        hidden = mask.reshape(-1, 1, *self.mask_grid).float()
        hidden = F.interpolate(hidden, scale_factor=4, mode="nearest")
        pred = F.pixel_shuffle(self.predict(self.encoder.forward_features(x * (1 - hidden))), 4)
        error = (pred.float() - x).square() * hidden
        return {"loss": error.sum() / hidden.sum() / x.shape[1], "pred": pred}

    def reconstruct(self, x, mask, num_visible=None):
        return self(x, mask)["pred"].float()

    def encoder_state(self):
        (h, w), sizes = self.encoder.img_size, {"in_chans": self.input.channels}
        arguments = {"img_size": [h, w], "width": self.width, **sizes}
        return EncoderState("cnn", arguments, self.encoder.state_dict())


register_encoder("cnn", ConvEncoder, small_cnn={"img_size": 16, "width": 16})
register_model("conv_model", ConvModel)
