"""Publication of a run's encoded samples to the cache, also when the run ends early."""

from __future__ import annotations

from sat_train.encoding.cache.write_behind import WriteBehind
from sat_train.training.loop.callback import Callback


class CachePublisher(Callback):
    """Publishes the last shard.

    Args:
        writer: Holds the encoded samples.
    """

    optional = True  # entries that it fails to publish are encoded again

    def __init__(self, writer: WriteBehind) -> None:
        self._writer = writer

    def closed(self) -> None:
        """Publishes the remaining entries."""
        self._writer.publish_or_warn()
