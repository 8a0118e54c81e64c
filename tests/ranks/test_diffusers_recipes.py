"""The diffusers recipes train as CogVideo's diffusers trainer does: step for step, on the embedded model."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torch import Tensor

from sat_train.config import RunConfig, load_run_config
from sat_train.config.paths import expand_assets
from sat_train.distributed.processes import ProcessMesh, start_single_process, stop_processes
from sat_train.interchange.conversion import Conversion, convert
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.objective.training_inputs import TrainingInputs
from sat_train.training.build import train
from sat_train.training.callbacks.metrics_file import read_metrics
from sat_train.training.models import build_models, find_start_weights
from sat_train.training.run_data import open_data

pytestmark = pytest.mark.ranks

STEPS, WARMUP = 10, 9
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def recipe(preset: str, folder: Path) -> RunConfig:
    """The recipe as it is, but for short clips, and a short warm-up, so that ten steps move the weights."""
    files = [f"{preset}.yaml", f"recipe/diffusers_{preset}.yaml"]
    words = [
        *(f"args.train_iters={STEPS}", f"args.warmup={WARMUP}", f"args.save={folder}/runs"),
        *("args.eval_interval=null", "args.valid_video_interval=null", "args.log_interval=1"),
        *("args.num_workers=0", "args.tensorboard=false", f"args.experiment_name={preset}"),
        "data.params.max_num_frames=9",
    ]
    return load_run_config([CONFIGS / file for file in files], words)


def rotary(transformer: CogVideoXTransformer3DModel, latent_btchw: Tensor) -> tuple[Tensor, Tensor]:
    grid = (latent_btchw.shape[3] // 2, latent_btchw.shape[4] // 2)
    return get_3d_rotary_pos_embed(
        embed_dim=transformer.config.attention_head_dim,
        crops_coords=None,
        grid_size=grid,
        temporal_size=latent_btchw.shape[1],
        grid_type="slice",
        max_size=grid,
    )


def script_loss(transformer: CogVideoXTransformer3DModel, inputs: TrainingInputs) -> Tensor:
    """The loss of the script, for samples, noise, timesteps and captions that are given."""
    scheduler = CogVideoXDPMScheduler(
        snr_shift_scale=1.0, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    latent, timesteps = inputs.x0_btchw, inputs.timesteps_b
    noised = scheduler.add_noise(latent, inputs.eps_btchw, timesteps)
    predicted = transformer(
        hidden_states=noised,
        encoder_hidden_states=inputs.dit.text_bld,
        timestep=timesteps,
        image_rotary_emb=rotary(transformer, latent),
        return_dict=False,
    )[0]
    clean = scheduler.get_velocity(predicted, noised, timesteps)
    weights = (1 / (1 - scheduler.alphas_cumprod[timesteps])).view(-1, 1, 1, 1, 1)
    return torch.mean((weights * (clean - latent) ** 2).reshape(len(latent), -1), dim=1).mean()


def script(
    transformer: CogVideoXTransformer3DModel, steps: list[TrainingInputs], *, learning_rate: float
) -> list[float]:
    """Trains as the script does, with its defaults of `finetune/schemas/args.py`.

    One difference: its warm-up spends the first step at a rate of 0, ours begins one step further on.

    Source: zai-org/CogVideo@7a1af71 `finetune/trainer.py` prepare_optimizer and train,
    `finetune/models/cogvideox_t2v/lora_trainer.py` compute_loss.
    """
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trained, "lr": learning_rate}], betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4
    )
    schedule = get_scheduler("constant_with_warmup", optimizer=optimizer, num_warmup_steps=WARMUP)
    optimizer.step()  # of no gradient: the scheduler wants to be called after one
    schedule.step()
    losses = []
    for inputs in steps:
        loss = script_loss(transformer, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def add_their_lora(transformer: CogVideoXTransformer3DModel, dit: DiffusionTransformer) -> None:
    """Adds PEFT's adapters to a frozen transformer, with the initial values of ours."""
    names = ("to_q", "to_k", "to_v", "to_out.0")
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=128, lora_alpha=64, init_lora_weights=True, target_modules=list(names))
    )
    ours, theirs = dit.state_dict(), transformer.state_dict()
    for block in range(transformer.config.num_layers):
        for index, name in enumerate(names):
            layer = "query_key_value" if index < 3 else "dense"
            own = f"transformer.layers.{block}.attention.{layer}.matrix_%s.{index % 3}"
            other = f"transformer_blocks.{block}.attn1.{name}.lora_%s.default.weight"
            assert not theirs[other % "B"].any()
            assert not ours[own % "B"].any()
            theirs[other % "A"].copy_(ours[own % "A"])


def both_losses(mesh: ProcessMesh, folder: Path, preset: str) -> tuple[list[float], ...]:
    """Returns the losses of our run, of the script, and of the weights as they were."""
    config = recipe(preset, folder)
    data = open_data(config, mesh)
    pipeline = build_models(config, mesh, find_start_weights(config, mesh), data.encoding.encoders)
    encode = data.encoding.build_encode(mesh)
    steps = [pipeline.training_inputs(encode(batch)) for batch in islice(iter(data.train), STEPS)]
    weights = Path(expand_assets("asset:tiny/dit.safetensors"))
    out = convert(Conversion(weights, folder / f"{preset}_hf", "diffusers", model=config.spec))
    transformer = CogVideoXTransformer3DModel.from_pretrained(out / "transformer")
    if preset == "lora":
        add_their_lora(transformer, pipeline.dit)
    transformer.train()
    with torch.no_grad():
        before = [script_loss(transformer, inputs).item() for inputs in steps]
    theirs = script(transformer, steps, learning_rate=2e-5)
    train(config, mesh)
    (run,) = (folder / "runs").glob(f"{preset}-*")
    ours = [record["loss"] for record in read_metrics(run / "metrics.jsonl")]
    return ours, theirs, before


@pytest.mark.parametrize("preset", ["lora", "sft"])
def test_a_recipe_gives_the_losses_of_the_diffusers_script(tmp_path, preset):
    """In this process, which has imported diffusers already."""
    ours, theirs, before = both_losses(start_single_process(), tmp_path, preset)
    stop_processes()
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)  # fp32 sums in another order
    learned = max(abs(after - start) for after, start in zip(theirs, before, strict=True))
    assert learned > 1e-4, "ten steps must show more than the tolerance hides"


@pytest.mark.parametrize("preset", ["lora", "sft"])
def test_the_warm_up_of_a_recipe_is_that_of_the_script(preset):
    files = ["model/cogvideox_5b.yaml", f"{preset}.yaml", f"recipe/diffusers_{preset}.yaml"]
    config = load_run_config([CONFIGS / file for file in files], purpose="check", check_paths=False)
    assert (config.args.warmup, config.args.lr_decay_style) == (100, "constant")
