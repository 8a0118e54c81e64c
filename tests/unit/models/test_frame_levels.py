"""Laws of frames: those appended in time, and levels of each frame."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from sat_train.encoding.conditions.condition import DitInputs
from sat_train.errors import SatTrainError
from sat_train.models.dit.frame_levels import CLEAN
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.rotary import RotaryPositions
from sat_train.models.dit.transformer import DiffusionTransformer
from tests.unit.models.mixins import LAYERS, Branch, Fuser, with_modules
from tests.unit.models.narrow import inputs, randomized

KINDS = [
    {"positions": "rotary"},
    {"positions": "sincos"},
    {"positions": "rotary_learned"},
    {"positions": "rotary", "patch": (2, 2, 2), "latent_size": (6, 4, 6), "ofs_width": 16},
]
FRAMES = 3  # patches of the narrow transformer's clip


def case(kind: dict[str, object], frames: int, seed: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns latent, timesteps, text and ofs for so many patches of frames."""
    generator = torch.Generator().manual_seed(seed)
    per_patch = 2 if "patch" in kind else 1
    latent = torch.randn(2, frames * per_patch, 4, 4, 6, generator=generator)
    ofs = torch.tensor([2.0, 2.0]) if "ofs_width" in kind else None
    return latent, torch.tensor([7, 901]), torch.randn(2, 5, 12, generator=generator), ofs


def gradients(dit: DiffusionTransformer, *args: object, **options: object) -> dict[str, Tensor]:
    v = dit(*args, **options)
    v.square().mean().backward()
    own = {name: parameter.grad for name, parameter in dit.named_parameters()}
    assert all(gradient is not None for gradient in own.values())
    return {"v": v.detach(), **own}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in expected.items():
        bound = tolerance * max(tensor.abs().max().item(), 0.01)  # without rotation a key's bias has none
        assert torch.allclose(actual[name], tensor, rtol=tolerance, atol=bound), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_appended_frame_is_the_next_frame_of_a_longer_grid(kind, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)  # several add up otherwise in other shapes
    dit = randomized(**kind)
    latent, timesteps, text, ofs = case(kind, FRAMES)
    cut = latent.shape[1] * (FRAMES - 1) // FRAMES
    level = timesteps[:, None].expand(-1, latent.shape[1])
    longer = dit(latent, timesteps, text, None, ofs, levels_bt=level)[:, :cut]
    appended = dit(
        latent[:, :cut],
        timesteps,
        text,
        None,
        ofs,
        levels_bt=level[:, :cut],
        frames_bfchw=latent[:, cut:],
        frame_index_f=torch.arange(cut, latent.shape[1]),
        frame_level_bf=level[:, cut:],
    )
    # the same products in other shapes of the last layer alone
    assert torch.allclose(appended, longer, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equal_levels_agree_with_the_plain_path(kind):
    args = case(kind, FRAMES)
    latent, timesteps, text, ofs = args
    expected = gradients(randomized(**kind), latent, timesteps, text, None, ofs)
    levels = timesteps[:, None].expand(-1, latent.shape[1])
    actual = gradients(randomized(**kind), latent, timesteps, text, None, ofs, levels_bt=levels)
    assert_close(actual, expected, 1e-5)


def test_each_token_has_the_modulation_of_its_frame():
    dit = randomized()
    latent, timesteps, text = inputs()
    levels = torch.tensor([[CLEAN, 3, 500], [17, 901, 901]])
    seen: list[tuple[Tensor, ...]] = []

    class Seeing(Mixin):
        def before_blocks(self, hidden_bld, forward):
            context = forward.block.with_tokens(2)
            seen.append((context.segments.lengths(5 + 18 + 6 + 2), dit.blocks[0].modulate(context)))

    dit.add_mixin("seeing", Seeing())
    frames = {"frames_bfchw": latent[:, :1], "frame_index_f": torch.tensor([0])}
    dit(latent, timesteps, text, levels_bt=levels, **frames)
    (lengths, modulations), plain = seen[0], {}
    for level in (*levels.flatten().tolist(), *timesteps.tolist()):
        context = dit.block_context(dit.time_features(torch.tensor([level])), latent, text)
        plain[level] = [row[0] for row in dit.blocks[0].modulate(context)]
    assert lengths == [5, 6, 6, 6, 6, 2]
    for sample, own in enumerate(timesteps.tolist()):
        steps = [own, *levels[sample].tolist(), CLEAN, own]
        for kind, rows in enumerate(modulations):
            expected = torch.stack([plain[s][kind][int(i > 0)] for i, s in enumerate(steps)])
            assert torch.allclose(rows[sample], expected, atol=1e-5)


def frames_and_levels() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "levels_bt": torch.tensor([[CLEAN, 7, 7], [CLEAN, 400, 901]]),
        "frames_bfchw": torch.randn(2, 2, 3, 4, 6, generator=generator),  # without the last channel
        "frame_index_f": torch.tensor([0, 5]),
    }


def test_recomputed_and_compiled_blocks_agree_with_modules_frames_and_levels():
    torch._dynamo.reset()
    counters.clear()
    results = []
    for recompute, backend in (("off", None), ("full", None), ("full", "aot_eager")):
        dit = with_modules(
            {"control": Branch(*range(LAYERS)), "motion": Fuser(*range(LAYERS))}, recompute=recompute
        )
        if backend:
            dit.compile_blocks(backend=backend)
        results.append(gradients(dit, *inputs(), **frames_and_levels()))
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1, "all blocks share one"
    assert_close(results[2], results[0], 2e-5)


def test_modules_see_the_video_alone():
    seen: list[tuple[int, ...]] = []

    class Seeing(Mixin):
        def after_block(self, x_bld, *, part, block, context):
            video = context.video(x_bld)
            seen.append((*video.shape[1:4], x_bld.shape[1]))
            assert torch.equal(context.video(context.tokens(video)), video)
            return context.tokens(torch.zeros_like(video))

    base, own = with_modules({}), with_modules({"seeing": Seeing(), "control": Branch(0, zero=True)})
    frames = frames_and_levels()
    v = own(*inputs(), **frames)
    assert set(seen) == {(3, 2, 3, 5 + 18 + 12)}
    assert torch.equal(v, base(*inputs(), **frames))
    assert v.shape == inputs()[0].shape, "appended frames are not predicted"


def test_an_appended_frame_is_clean_unless_it_has_a_level_and_matters_by_its_time():
    dit = randomized()
    frames = frames_and_levels()
    expected = dit(*inputs(), **frames)
    clean = torch.full((2, 2), CLEAN)
    assert torch.equal(dit(*inputs(), **frames, frame_level_bf=clean), expected)
    assert not torch.allclose(dit(*inputs(), **frames, frame_level_bf=clean + 300), expected, atol=1e-4)
    later = frames | {"frame_index_f": torch.tensor([0, 6])}
    assert not torch.allclose(dit(*inputs(), **later), expected, atol=1e-5)


def test_a_module_may_modulate_every_frame():
    class Later(Mixin):
        frames = 3

        def time_features(self, forward):
            own = forward.dit.time_features(torch.full_like(forward.timesteps_b, 7))
            return own[:, None].expand(-1, self.frames, -1) if self.frames else own

    seen: dict[int, Tensor] = {}

    class Emb(Mixin):
        def before_blocks(self, hidden_bld, forward):
            seen[Later.frames] = forward.block.emb_bd

    dit = with_modules({"later": Later(), "emb": Emb(), "motion": Fuser(0)})
    dit(*inputs(), frames_bfchw=inputs()[0][:, :1], frame_index_f=torch.tensor([0]))
    Later.frames = 0
    dit(*inputs(), frames_bfchw=inputs()[0][:, :1], frame_index_f=torch.tensor([0]))
    assert seen[3].shape == seen[0].shape == (2, 1 + 3 + 1, 16)
    assert torch.equal(seen[3][:, 1:4], seen[0][:, 1:4])
    added = dit.time_features(torch.tensor([7, 7]))
    for row in (0, 4):  # neither text nor what is appended
        assert torch.allclose(seen[3][:, row] + added, seen[0][:, row], atol=1e-6)
    Later.frames = 2
    with pytest.raises(SatTrainError, match=r"time features of shape \[2, 2, 16\](.|\n)*\[2, 3, 16\]"):
        dit(*inputs())


def test_frames_that_do_not_fit_are_refused_by_name():
    class Own(RotaryPositions):
        def angles(self, grid, device):
            return 2 * super().angles(grid, device)

    table, latent = randomized(positions="rotary_learned"), inputs()[0]
    for time in (3, -1):
        with pytest.raises(SatTrainError, match=rf"no row .* times \[{time}\.0\](.|\n)*from 0 to 2"):
            table(*inputs(), frames_bfchw=latent[:, :1], frame_index_f=torch.tensor([time]))
    kind = KINDS[3]
    joint, (latent, timesteps, text, ofs) = randomized(**kind), case(kind, FRAMES)
    frame = {"frames_bfchw": latent[:, :1], "frame_index_f": torch.tensor([0])}
    with pytest.raises(SatTrainError, match="1 appended latent frames do not fill patches of 2"):
        joint(latent, timesteps, text, None, ofs, **frame)
    levels = torch.tensor([[CLEAN, 7, 7, 7, 7, 7]]).expand(2, -1)
    with pytest.raises(SatTrainError, match="latent frames of one patch have several levels"):
        joint(latent, timesteps, text, None, ofs, levels_bt=levels)
    rotary = randomized()
    with pytest.raises(SatTrainError, match="appended frames of shape"):
        rotary(*inputs(), frames_bfchw=torch.zeros(2, 1, 4, 4, 4), frame_index_f=torch.tensor([0]))
    rotary._positions.__class__ = Own
    with pytest.raises(SatTrainError, match="Own has its own angles, and none for frames"):
        rotary(*inputs(), frames_bfchw=inputs()[0][:, :1], frame_index_f=torch.tensor([0]))


def test_channels_stand_behind_the_latent_and_the_image():
    dit = randomized(in_channels=9)
    latent, timesteps, text = inputs()
    image, channels = torch.randn(2, 3, 2, 4, 6), torch.randn(2, 3, 3, 4, 6)
    whole = torch.cat([latent, image, channels], dim=2)
    expected = dit(whole, timesteps, text)
    assert torch.equal(dit(latent, timesteps, text, image, channels_btchw=channels), expected)


def test_inputs_of_several_conditions_join_in_their_order():
    one = DitInputs(
        channels_btchw=torch.zeros(2, 3, 1, 4, 6),
        frames_bfchw=torch.ones(2, 1, 4, 4, 6),
        frame_index_f=torch.tensor([0]),
    )
    two = DitInputs(
        channels_btchw=torch.ones(2, 3, 2, 4, 6),
        frames_bfchw=torch.ones(2, 2, 5, 4, 6),
        frame_index_f=torch.tensor([3, 4]),
        frame_level_bf=torch.full((2, 2), 9),
        extras={"depth": torch.ones(2, 3)},
    )
    merged = DitInputs.merged([one, two])
    assert merged.channels_btchw.sum(dim=(1, 3, 4))[0].tolist() == [0, 72, 72]
    assert merged.frames_bfchw.shape == (2, 3, 5, 4, 6)
    assert not merged.frames_bfchw[:, 0, 4].any()
    assert merged.frame_index_f.tolist() == [0, 3, 4]
    assert merged.frame_level_bf.tolist() == [[CLEAN, 9, 9]] * 2
    doubled = DitInputs.cat([merged, merged]).to(torch.device("cpu"), torch.bfloat16)
    assert doubled.frame_index_f.tolist() == [0, 3, 4], "the batch shares the times"
    assert doubled.frame_level_bf.tolist() == [[CLEAN, 9, 9]] * 4
    assert doubled.channels_btchw.dtype == torch.bfloat16
    assert doubled.keywords().keys() == {
        "channels_btchw",
        "frames_bfchw",
        "frame_index_f",
        "frame_level_bf",
        "extras",
    }
    with pytest.raises(AssertionError, match=r"two conditions set \['ofs_b'\]"):
        DitInputs.merged([DitInputs(ofs_b=torch.ones(2))] * 2)
    with pytest.raises(AssertionError, match="belong together"):
        DitInputs(frames_bfchw=torch.ones(2, 1, 4, 4, 6))
