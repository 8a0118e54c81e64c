"""Hashes of the frozen encoders of a configuration, and the cache that belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sat_train.config import RunConfig
from sat_train.config.parts.reference import weights_files
from sat_train.config.reference_rules import references_in
from sat_train.data.clips.bad_clip import BadClip
from sat_train.distributed.collectives import on_rank_0
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.work_queue import gather_after_work
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.index import CacheIndex, OpenCache, Use
from sat_train.encoding.cache.key import EncoderDigests, digest
from sat_train.errors import DataError
from sat_train.files import hash_file, reading
from sat_train.interchange.sources import find_weights
from sat_train.models.build import compute_dtype, encoder_dtype
from sat_train.models.text.t5_folder import find_t5_folders

# Settings of the autoencoder that change its latents, besides its numbers.
_WITH_EFFECT = {"encode_chunk_frames", "tiling", "tile_size", "tile_overlap"}


def open_cache(config: RunConfig, mesh: ProcessMesh, use: Use) -> OpenCache:
    """Opens `data.cache_dir` for the encoders of this configuration.

    Raises:
        DataError: The weights of an encoder neither exist nor are known to the cache.
        CheckpointError: Their format is unknown.

    Ranks: all; rank 0 hashes the weights, once: the cache remembers the digest.
    """
    data = config.require_data()
    assert data.cache_dir is not None, "the configuration requires a folder wherever there is a cache"
    folder = Path(data.cache_dir)
    file_metadata = FileMetadata(folder, identity=data.cache_identity, timeout_s=data.worker_timeout_s)

    def hash_encoders() -> EncoderDigests:
        digests = digest_encoders(config, file_metadata)
        file_metadata.publish()
        return digests

    digests = on_rank_0(mesh, hash_encoders, may_take_long=True)
    return OpenCache(folder, CacheIndex(folder), file_metadata, digests, use)


def share_files(mesh: ProcessMesh, file_metadata: FileMetadata) -> None:
    """Saves the hashes of each rank, and shares them with the others.

    Ranks: all.
    """
    for learnt in gather_after_work(mesh, file_metadata.learnt()):
        file_metadata.merge(learnt)
    file_metadata.publish()


def digest_encoders(config: RunConfig, file_metadata: FileMetadata) -> EncoderDigests:
    """Hashes weights, settings and dtype of the encoders.

    Raises:
        DataError: As `open_cache`.
        CheckpointError: Likewise.
    """
    vae, text = config.spec.vae, config.spec.text
    settings = {
        **vae.model_dump(mode="json", include=_WITH_EFFECT),
        **config.spec.coder.model_dump(mode="json", exclude={"out_ch"}),
    }
    dtype = encoder_dtype(config.args)
    return EncoderDigests(
        vae=digest(
            kind="vae",
            weights=_weights(
                file_metadata, vae.ckpt_path, lambda: find_weights(vae.ckpt_path, part="vae").files
            ),
            settings=settings,
            dtype=str(dtype),
        ),
        text=digest(
            kind="text",
            weights=_weights(file_metadata, text.model_dir, lambda: _t5_files(Path(text.model_dir))),
            max_length=text.max_length,
            dtype=[str(dtype), str(compute_dtype(config.args))],
        ),
        files={path: _weights(file_metadata, path, partial(_files_at, path)) for path in _files_of(config)},
    )


def _files_of(config: RunConfig) -> set[str]:
    return {path for each in config.model.conditions.values() for path in weights_files(each.params)}


def digest_part_files(config: RunConfig, cache: OpenCache | None) -> dict[str, str]:
    """Hashes the contents of the files of weights that parts name, by path.

    Args:
        config: The configuration.
        cache: The open cache, whose hashes are used; of files that are only known to it, too. Other files
            that do not exist are left out.

    Raises:
        DataError: A file cannot be read.

    Ranks: one.
    """
    known = {} if cache is None else cache.encoder_digests.files
    paths = {each.name for _, each in references_in(config) if not each.group}
    fresh = {path: _digest_at(path) for path in paths - known.keys() if Path(path).exists()}
    return dict(sorted({**known, **fresh}.items()))


def _digest_at(path: str) -> str:
    with reading(path, error=DataError, expected="a file or folder of weights"):
        return digest(files=[hash_file(file) for file in _files_at(path)])


def _files_at(path: str) -> Sequence[Path]:
    """Returns a file, or all files of a folder."""
    found = Path(path)
    return [found] if found.is_file() else sorted(file for file in found.rglob("*") if file.is_file())


def _weights(file_metadata: FileMetadata, path: str, files: Callable[[], Sequence[Path]]) -> str:
    """Hashes files, or returns the cache's digest for this path where the encoder is not on this machine."""
    if Path(path).exists():
        try:
            fresh = digest(files=[file_metadata.sha256(file.absolute()) for file in files()])
        except BadClip as error:
            raise DataError(f"{path}: {error.detail}") from None
        file_metadata.remember(path, fresh)
        return fresh
    cached = file_metadata.named(path)
    if cached is None:
        raise DataError(
            f"{path} does not exist, and the cache holds nothing that was encoded with it",
            expected="the encoder's weights, or a cache that was filled with weights at this path",
            remedy="correct the path in model, or data.cache_dir",
        )
    return cached


def _t5_files(folder: Path) -> list[Path]:
    weights, tokenizer = find_t5_folders(folder)
    patterns = ("config.json", "*.safetensors", "*.bin")
    files = {file for pattern in patterns for file in weights.glob(pattern)}
    names = ("spiece.model", "tokenizer.json")
    return [*sorted(files), *(tokenizer / name for name in names if (tokenizer / name).is_file())]
