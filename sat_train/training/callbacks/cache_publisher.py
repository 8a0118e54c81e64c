"""Publishes what a run has encoded for the cache, also when the run ends early."""

from __future__ import annotations

from sat_train.encoding.cache.shards import ShardWriter
from sat_train.training.loop.callback import Callback


class CachePublisher(Callback):
    """Publishes the last shard.

    Args:
        writer: Holds what has been encoded.
    """

    optional = True  # what it fails to keep is encoded again

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer

    def closed(self) -> None:
        """Publishes what is left."""
        self._writer.publish_or_warn()
