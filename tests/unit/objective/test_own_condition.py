"""A condition that the package does not know: one class, and everything around it works."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sat_train.diffusion.constant_guidance import ConstantGuidance
from sat_train.encoding.cache.entries import CacheEntry
from sat_train.encoding.cache.key import digest
from sat_train.encoding.cache.shards import ShardWriter
from sat_train.encoding.conditions.condition import Condition, DitInputs
from sat_train.encoding.encode import EncodeAndKeep
from sat_train.encoding.encoded_batch import EncodedBatch
from sat_train.encoding.encoded_dataset import EncodedDataset
from tests.unit.data.videos import record_of, write_numbered
from tests.unit.encoding.cache.samples import open_dataset, read


class Brightness(Condition):
    """How bright the first frame is, as the number that 1.5-I2V calls `ofs`."""

    name = "brightness"
    tensors = frozenset({"level"})
    drop_probability = 0.5
    drop_purpose = "brightness_drop"

    def encode(self, sample, encoders):
        return {"level": sample.conditioning_image_chw().float().mean() / 255}

    def entry(self, facts):
        return CacheEntry(
            digest(kind=self.name, pixels=facts.clip.key), replace(facts.clip.info, kind=self.name)
        )

    def drop(self, encoded, dropped_b):
        return {"level": encoded["level"].masked_fill(dropped_b, 0.0)}

    def inputs(self, encoded, random, latent_shape):
        return DitInputs(ofs_b=encoded["level"])


@pytest.fixture
def pipeline(make_pipeline):
    pipeline = make_pipeline(ofs=0.0)
    pipeline.conditions = (pipeline.conditions[0], Brightness())
    return pipeline


def test_it_is_encoded_dropped_and_felt(pipeline, make_batch, encode):
    batch = encode(pipeline, make_batch(range(40), frames=1))
    level = batch.encodings["brightness"]["level"]
    given = pipeline.training_inputs(batch).dit.ofs_b
    assert {0.0, *level.tolist()} > set(given.tolist()) - {0.0}
    assert 8 <= int((given == 0).sum()) <= 32  # 20 expected, standard deviation 3.2
    brighter = replace(batch, encodings={**batch.encodings, "brightness": {"level": level + 1}})
    assert not torch.equal(pipeline.training_loss(brighter).loss_b, pipeline.training_loss(batch).loss_b)


def test_it_guides_where_it_says_so(pipeline, monkeypatch):
    seen = []

    def network(*args, ofs_b, **kwargs):
        seen.append(ofs_b.tolist())
        return pipeline.dit(*args, ofs_b=ofs_b, **kwargs)

    image = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    run = {"num_frames": 5, "height": 16, "width": 16, "steps": 1, "seeds": [0], "network": network}
    for guides, expected in ((False, [1.0, 1.0]), (True, [0.0, 1.0])):
        monkeypatch.setattr(Brightness, "guides", guides)
        seen.clear()
        pipeline.generate(["a"], image_bchw=image, guidance=ConstantGuidance(2.0), **run)
        assert seen == [expected]


def test_it_is_kept_in_the_cache_and_read(pipeline, tmp_path):
    write_numbered(tmp_path / "a.mp4", num_frames=30)
    records = [record_of(tmp_path / "a.mp4")]
    videos = open_dataset(tmp_path, records, video_size=(16, 16)).videos
    written = EncodedDataset(videos, open_dataset(tmp_path, records, use="write").cache, pipeline.conditions)
    writer = ShardWriter(tmp_path)
    keep = EncodeAndKeep(pipeline.encoders, pipeline.conditions, writer=writer, is_there=lambda _: False)
    encoded = keep(written.collate([read(written, 0).sample]))
    writer.publish()
    reader = EncodedDataset(videos, open_dataset(tmp_path, records, use="require").cache, pipeline.conditions)
    batch = reader.collate([read(reader, 0).sample])
    assert isinstance(batch, EncodedBatch)
    level = batch.encodings["brightness"]["level"]
    assert torch.equal(level, encoded.encodings["brightness"]["level"])
    assert float(level) > 0
