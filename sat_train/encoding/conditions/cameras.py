"""Cameras as Pluecker coordinates on the grid of the latent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.conditions.condition import DitInputs, Encoding
from sat_train.encoding.conditions.placed import PlacedCondition
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.errors import SatTrainError
from sat_train.models.encoders import Encoders


class PlueckerCameras(PlacedCondition):
    """Moment and direction of the ray through the center of each latent element, for each pixel frame.

    The six numbers of the `temporal_compression` pixel frames of a latent frame stand behind each other.

    Source: arXiv:2404.02101, section 3.2 (CameraCtrl).
    """

    tensors = frozenset({"rays"})

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Returns `rays`, float32 `[t, 6 * temporal_compression, h, w]`."""
        poses = self._poses(sample)
        intrinsics = sample.fields[self.params.intrinsics].float().expand(len(poses), 4)
        grid, (height, width) = self.latent_shape(sample), sample.video_tchw.shape[-2:]
        rays_t6hw = pluecker_rays(intrinsics, poses, (height, width), (grid.height, grid.width))
        rays = self.latent_frames(rays_t6hw, "stack").flatten(1, 2)
        return {"rays": rays.to(encoders.device)}

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Returns the coordinates."""
        return self.placed(encoded["rays"])

    def _poses(self, sample: VideoSample) -> Tensor:
        """Returns camera to world, float32 `[t, 3, 4]`."""
        poses = sample.fields[self.params.poses].float()
        if poses.dim() == 2 and poses.shape[1] in (12, 16):
            poses = poses.unflatten(1, (-1, 4))
        if poses.dim() != 3 or poses.shape[1] not in (3, 4) or poses.shape[2] != 4:
            raise SatTrainError(
                f"{sample.clip_id}: the poses of field '{self.params.poses}' have shape {tuple(poses.shape)}",
                expected="camera to world: [frames, 3, 4], [frames, 4, 4] or [frames, 12]",
            )
        return relative_poses(poses[:, :3]) if self.params.relative else poses[:, :3]


def relative_poses(poses_t34: Tensor) -> Tensor:
    """Returns poses (camera to world) in the coordinates of the first camera, `[t, 3, 4]`."""
    turn, place = poses_t34[:1, :, :3].mT, poses_t34[:1, :, 3:]
    return torch.cat([turn @ poses_t34[:, :, :3], turn @ (poses_t34[:, :, 3:] - place)], dim=2)


def pluecker_rays(
    intrinsics_t4: Tensor, poses_t34: Tensor, size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Returns the Pluecker coordinates of the rays through the cells of a grid.

    Args:
        intrinsics_t4: fx, fy, cx, cy of each frame in pixels; the corner of the picture is (0, 0).
        poses_t34: Camera to world, x right, y down, z forward.
        size: Height and width of the picture in pixels.
        grid: Rows and columns of cells.

    Returns:
        `[t, 6, rows, columns]`: origin x direction, then the direction, of unit length.
    """
    fx, fy, cx, cy = intrinsics_t4[:, :, None, None].unbind(1)
    rows, columns = (
        (torch.arange(cells) + 0.5) * side / cells for side, cells in zip(size, grid, strict=True)
    )
    x, y = torch.broadcast_tensors((columns - cx) / fx, (rows[:, None] - cy) / fy)
    ray_t3hw = torch.stack([x, y, torch.ones_like(x)], dim=1)
    direction = F.normalize(torch.einsum("tij,tjhw->tihw", poses_t34[:, :, :3], ray_t3hw), dim=1)
    origin = poses_t34[:, :, 3, None, None].expand_as(direction)
    return torch.cat([torch.cross(origin, direction, dim=1), direction], dim=1)
