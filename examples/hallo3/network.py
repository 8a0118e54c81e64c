"""The condition and the module in torch.

Source: fudan-generative-vision/hallo3@e342dce.
"""

from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from sat_train.extend import Condition, DitInputs, Mixin, zero_


class AudioFeatures(Condition):
    """The features of the frames of a latent frame, as tokens side by side."""

    tensors = frozenset({"features"})
    reads_caption = False

    def encode(self, sample, encoders):
        features = sample.fields[self.params.field].reshape(len(sample.video_tchw), -1, self.params.features)
        return {"features": self.latent_frames(features, "stack").flatten(1, 2)}  # [t, 4 tokens, width]

    def inputs(self, encoded, random, latent_shape):
        frames, patch = encoded["features"], self.model.patch[0]
        return DitInputs(extras={self.name: frames.unflatten(1, (-1, patch)).flatten(2, 3)})


class CrossAttention(nn.Module):
    """Attention of the tokens of each frame to the features of that frame; at first it adds nothing."""

    def __init__(self, model, width):
        super().__init__()
        self.heads = model.heads
        self.norm = nn.LayerNorm(model.width)
        self.query = nn.Linear(model.width, model.width)
        self.key_value = nn.Linear(width, 2 * model.width)
        self.out = zero_(nn.Linear(model.width, model.width))

    def forward(self, video_bthwd, features_btmd):
        query = self.split(self.query(self.norm(video_bthwd)).flatten(2, 3))
        key, value = self.key_value(features_btmd).chunk(2, dim=-1)
        seen = scaled_dot_product_attention(query, self.split(key), self.split(value))
        return self.out(seen.transpose(2, 3).flatten(3).view_as(video_bthwd))

    def split(self, x_btld):
        """Returns heads: `[b, t, n, l, k]`."""
        return x_btld.unflatten(-1, (self.heads, -1)).transpose(2, 3)


class FrameCrossAttention(Mixin):
    """Cross-attention behind the chosen blocks."""

    def __init__(self, params, model):
        super().__init__(params, model)
        blocks = map(str, range(0, model.layers, params.every))
        self.per_block = nn.ModuleDict({block: CrossAttention(model, params.features) for block in blocks})

    def after_block(self, x_bld, *, part, block, context):
        return context.tokens(part(context.video(x_bld), context.extras[self.params.condition]))
