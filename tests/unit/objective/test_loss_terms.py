"""Laws of loss terms: how they add up, what they read, and preference pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.preference_memory import CONFIGS, MOST, compare
from sat_train.config.parts.loss_term_parts import MaskedErrorParams, PreferenceParams
from sat_train.encoding.conditions.condition import Condition
from sat_train.errors import SatTrainError
from sat_train.models.adapter import adapters_off
from sat_train.models.dit.mixin import Mixin
from sat_train.objective.loss_term import DiffusionError, LossTerm, WeightedTerm
from sat_train.objective.terms import MaskedError, Preference
from tests.networks import add_adapters


class Brightness(LossTerm):
    """The mean of the predicted clean latent, squared."""

    def __call__(self, step):
        return step.x0_pred().flatten(1).mean(1).square()


class Norm(LossTerm):
    def __call__(self, step):
        return step.outputs["state"].square().flatten(1).mean(1)


class StateTap(Mixin):
    """Projects the state after the first block."""

    def __init__(self, params=None, model=None):
        super().__init__(params, model)
        self.project = torch.nn.Linear(64, 3)

    def tap(self, hidden_bld, block, forward):
        forward.outputs["state"] = self.project(forward.block.video(hidden_bld))


class Losers(Condition):
    """Two videos that lost against each clip."""

    name = "losers"
    tensors = frozenset({"mean", "logvar"})
    params = SimpleNamespace(adds_rows=True)

    def __init__(self):
        pass


def with_encodings(batch, **encodings):
    return replace(batch, encodings={**batch.encodings, **encodings})


def gradients(pipeline, batch):
    pipeline.dit.zero_grad()
    output = pipeline.training_loss(batch)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in pipeline.dit.named_parameters() if p.grad is not None}


def test_terms_combine_linearly_and_weight_0_only_reports(make_pipeline, make_batch, encode):
    def run(**weights):
        terms = {"bright": WeightedTerm(Brightness(), weights["bright"])} if "bright" in weights else {}
        own = {"diffusion": WeightedTerm(DiffusionError(), weights.get("diffusion", 1.0))}
        pipeline = make_pipeline(loss_terms={**own, **terms}, min_snr_gamma=5.0)
        return gradients(pipeline, encode(pipeline, make_batch(range(4))))

    plain_pipeline = make_pipeline(min_snr_gamma=5.0)
    plain, plain_gradients = gradients(plain_pipeline, encode(plain_pipeline, make_batch(range(4))))
    reported, reported_gradients = run(bright=0.0)
    assert torch.equal(reported.loss, plain.loss)
    assert all(torch.equal(reported_gradients[n], g) for n, g in plain_gradients.items())
    assert float(reported.terms["bright"].mean()) > 0
    alone, alone_gradients = run(diffusion=0.0, bright=1.0)
    assert torch.equal(alone.terms["diffusion"], plain.loss_b)
    both, both_gradients = run(diffusion=0.5, bright=3.0)
    torch.testing.assert_close(both.loss, 0.5 * plain.loss + 3.0 * alone.loss)
    for name, gradient in both_gradients.items():
        expected = 0.5 * plain_gradients[name] + 3.0 * alone_gradients[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_module_that_only_a_term_reads_gets_a_gradient_and_changes_no_prediction(
    make_pipeline, make_batch, encode
):
    plain = make_pipeline()
    batch = encode(plain, make_batch(range(2)))
    pipeline = make_pipeline(loss_terms={"norm": WeightedTerm(Norm())})
    pipeline.dit.add_mixin("state", StateTap())
    output, found = gradients(pipeline, batch)
    assert torch.equal(output.terms["diffusion"], plain.training_loss(batch).loss_b)
    assert found["mixins.state.project.weight"].abs().max() > 0
    timesteps = torch.tensor([300, 700])
    pipeline.dit.eval()
    validated = pipeline.validation_loss(batch, timesteps_b=timesteps, with_terms=True)
    expected = plain.validation_loss(batch, timesteps_b=timesteps)
    assert torch.equal(validated.loss_b, expected.loss_b), "the validation loss knows no terms"
    assert set(validated.terms) == {"diffusion", "norm"}
    assert set(expected.terms) == {"diffusion"}


def test_an_output_that_no_module_keeps_is_named(make_pipeline, make_batch, encode):
    pipeline = make_pipeline(loss_terms={"norm": WeightedTerm(Norm())})
    with pytest.raises(SatTrainError, match="reads the output 'state', which no module keeps; kept are none"):
        pipeline.training_loss(encode(pipeline, make_batch([0])))


def test_a_masked_error_is_the_formula_over_the_frames_that_count(make_pipeline, make_batch, encode):
    params, steps = MaskedErrorParams(condition="hole"), []
    for outside in (False, True):
        term = MaskedError(params.model_copy(update={"outside": outside}), make_pipeline(patch_t=2).geometry)
        spy = WeightedTerm(lambda step: steps.append(step) or step.v_error_b(step.v_pred_btchw))
        pipeline = make_pipeline(patch_t=2, loss_terms={"masked": WeightedTerm(term), "spy": spy})
        batch = encode(pipeline, make_batch([0, 1], frames=9))  # 3 latent frames, and one of padding
        mask = (torch.rand(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.3).float()
        batch = with_encodings(replace(batch, num_shown=(9, 5)), hole={"mask": mask})
        output, step = pipeline.training_loss(batch), steps.pop()
        whole = torch.cat([mask[:, :1], mask], dim=1)
        whole = 1 - whole if outside else whole
        squares = (step.v_pred_btchw - step.v_true_btchw).square() * whole
        expected = torch.stack([squares[0].mean(), squares[1, :3].mean()])  # the last frame is repeated
        torch.testing.assert_close(output.terms["masked"], expected.detach())


@pytest.fixture
def pairs(make_pipeline, make_batch, encode):
    """A pipeline with adapters and two losers a clip, and a batch for it."""
    term = WeightedTerm(Preference(PreferenceParams(beta=10.0)), needs_reference=True)
    own = WeightedTerm(DiffusionError(), 0.0)
    pipeline = make_pipeline(caption_dropout=0.5, loss_terms={"diffusion": own, "preference": term})
    add_adapters(pipeline.dit, rank=2, alpha=2.0, targets=[r"attention\.dense", r"final_layer\.linear"])
    batch = encode(pipeline, make_batch(range(3)))
    generator = torch.Generator().manual_seed(0)
    clip = batch.encodings["clip"]
    shape = (3, 2, *clip["mean"].shape[1:])
    losers = {
        "mean": torch.randn(shape, generator=generator),
        "logvar": torch.randn(shape, generator=generator) - 3,
    }
    pipeline.conditions = (*pipeline.conditions, Losers())
    return pipeline, with_encodings(batch, losers=losers)


def open_adapters(dit):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if "matrix_B" in name:
                parameter.normal_(std=0.3, generator=generator)


def test_rows_of_a_pair_share_noise_timestep_and_conditions(pairs):
    pipeline, batch = pairs
    inputs = pipeline.training_inputs(batch)
    assert inputs.num_samples == 3
    assert len(inputs.timesteps_b) == 9
    for tensor in (inputs.eps_btchw, inputs.timesteps_b, inputs.dit.text_bld):
        assert torch.equal(tensor[:3], tensor[3:6])
        assert torch.equal(tensor[:3], tensor[6:])
    winners = replace(batch, encodings={n: e for n, e in batch.encodings.items() if n != "losers"})
    pipeline.conditions = pipeline.conditions[:-1]
    alone = pipeline.training_inputs(winners)
    assert torch.equal(inputs.x0_btchw[:3], alone.x0_btchw)
    assert torch.equal(inputs.eps_btchw[:3], alone.eps_btchw)
    assert torch.equal(inputs.timesteps_b[:3], alone.timesteps_b)


def test_the_preference_is_diffusion_dpo_and_log_2_at_the_start(pairs):
    pipeline, batch = pairs
    start = pipeline.training_loss(batch)
    torch.testing.assert_close(start.terms["preference"], torch.full((3,), math.log(2)))
    open_adapters(pipeline.dit)
    output = pipeline.training_loss(batch)
    assert torch.equal(output.loss_b, output.terms["preference"])
    assert output.timesteps_b.shape == (3,)
    inputs = pipeline.training_inputs(batch)
    expected = []
    for sample in range(3):
        errors = {}
        for row in (sample, sample + 3, sample + 6):
            abar = pipeline.alpha_bar[inputs.timesteps_b[row]].item()
            x0, eps = inputs.x0_btchw[row].double(), inputs.eps_btchw[row].double()
            x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
            target = math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0
            arguments = (x_t[None].float(), inputs.timesteps_b[row : row + 1], inputs.dit.text_bld[row][None])
            with torch.no_grad():
                own = pipeline.dit(*arguments)[0]
                with adapters_off(pipeline.dit):
                    base = pipeline.dit(*arguments)[0]
            errors[row] = [((v.double() - target) ** 2).mean().item() for v in (own, base)]
        won, lost = errors[sample], [errors[sample + 3], errors[sample + 6]]
        margins = [(won[0] - won[1]) - (other[0] - other[1]) for other in lost]
        expected.append(sum(math.log1p(math.exp(5.0 * margin)) for margin in margins) / 2)
    torch.testing.assert_close(output.loss_b, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert max(abs(each - math.log(2)) for each in expected) > 1e-3


def test_pairs_take_hardly_more_memory_than_a_lora_step_on_as_many_videos():
    pairs, plain = compare(CONFIGS / "model/cogvideox_tiny.yaml")
    assert plain <= pairs <= MOST * plain


def test_the_reference_has_no_gradient_and_the_adapters_are_on_behind_it(pairs):
    pipeline, batch = pairs
    open_adapters(pipeline.dit)
    _, found = gradients(pipeline, batch)
    assert any("matrix_B" in name and bool(gradient.abs().max() > 0) for name, gradient in found.items())
    latent = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = (latent, torch.tensor([500]), torch.zeros(1, 3, 8))
    with torch.no_grad():
        on = pipeline.dit(*arguments)
        with adapters_off(pipeline.dit):
            off = pipeline.dit(*arguments)
        assert torch.equal(pipeline.dit(*arguments), on)
        assert not torch.equal(off, on)


def test_a_decoded_prediction_carries_a_gradient_through_the_frozen_autoencoder(
    make_pipeline, make_batch, encode
):
    class Pixels(LossTerm):
        def __call__(self, step):
            self.video = step.decode(step.x0_pred())
            self.part = step.decode(step.x0_btchw, frames=(1, 3))
            self.whole = step.decode(step.x0_btchw, frames=(0, 3))
            self.x0 = step.x0_btchw
            return self.video.square().flatten(1).mean(1)

    term = Pixels()
    pipeline = make_pipeline(
        patch_t=2,
        loss_terms={"diffusion": WeightedTerm(DiffusionError(), 0.0), "pixels": WeightedTerm(term)},
    )
    batch = encode(pipeline, make_batch([0, 1], frames=9))
    _, found = gradients(pipeline, batch)
    assert term.video.shape == (2, 9, 3, 16, 16), "the padding of patches in time is not decoded"
    assert term.part.shape == (2, 5, 3, 16, 16)
    assert found["mixins.final_layer.linear.weight"].abs().max() > 0
    assert all(p.grad is None for p in pipeline.encoders.vae.parameters())
    pixels = pipeline.encoders.decode(term.x0[:, 1:] / pipeline.scale_factor)
    rounded = ((term.whole + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(rounded, pixels)
