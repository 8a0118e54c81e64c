"""Files of the shape that zai-org/CogVideo ships in `sat/configs`: its names, keys and oddities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SGM = "sgm.modules.diffusionmodules"


@dataclass(frozen=True)
class Member:
    """One of CogVideo's eight model files, as the numbers in which they differ."""

    name: str
    layers: int = 42
    width: int = 3072
    scale_factor: float = 0.7
    shift: float | None = 1.0
    rotary: bool = True
    image: bool = False
    learned: bool = False
    is_1_5: bool = False
    lora_rank: int | None = None


MEMBERS = (
    Member("cogvideox_2b", layers=30, width=1920, scale_factor=1.15258426, shift=3.0, rotary=False),
    Member("cogvideox_2b_lora", layers=30, width=1920, shift=3.0, rotary=False, lora_rank=128),
    Member("cogvideox_5b"),
    Member("cogvideox_5b_lora", lora_rank=128),
    Member("cogvideox_5b_i2v", image=True, learned=True),
    Member("cogvideox_5b_i2v_lora", image=True, learned=True, lora_rank=256),
    Member("cogvideox1.5_5b", shift=None, is_1_5=True),
    Member("cogvideox1.5_5b_i2v", shift=None, image=True, is_1_5=True),
)


def model_file(member: Member) -> dict[str, Any]:
    """Returns the content of a model file, in the spelling of that project."""
    model: dict[str, Any] = {
        "scale_factor": member.scale_factor,
        "disable_first_stage_autocast": True,
        "log_keys": ["txt"],
        "denoiser_config": {
            "target": f"{_SGM}.denoiser.DiscreteDenoiser",
            "params": {
                "num_idx": 1000,
                "quantize_c_noise": False,
                "weighting_config": {"target": f"{_SGM}.denoiser_weighting.EpsWeighting"},
                "scaling_config": {"target": f"{_SGM}.denoiser_scaling.VideoScaling"},
                "discretization_config": _schedule(member),
            },
        },
        "network_config": {"target": "dit_video_concat.DiffusionTransformer", "params": _network(member)},
        "conditioner_config": _conditioner(member),
        "first_stage_config": _first_stage(),
        "loss_fn_config": _loss(member),
        "sampler_config": _sampler(member),
    }
    if member.image:
        model |= {"latent_input": False, "noised_image_input": True, "noised_image_dropout": 0.05}
    if member.image and member.is_1_5:
        model |= {"noised_image_all_concat": False, "augmentation_dropout": 0.15}
    if member.is_1_5 and not member.image:
        model["latent_input"] = True
    if member.lora_rank:
        model["not_trainable_prefixes"] = ["all"]
    return {"model": model}


def _schedule(member: Member) -> dict[str, Any]:
    slot: dict[str, Any] = {"target": f"{_SGM}.discretizer.ZeroSNRDDPMDiscretization"}
    return slot if member.shift is None else slot | {"params": {"shift_scale": member.shift}}


def _network(member: Member) -> dict[str, Any]:
    side = (
        {"latent_width": 300, "latent_height": 300}
        if member.is_1_5
        else {"latent_width": 90, "latent_height": 60}
    )
    ofs = {"ofs_embed_dim": 512} if member.is_1_5 and member.image else {}
    return {
        **ofs,
        **side,
        "time_embed_dim": 512,
        "elementwise_affine": True,
        "num_frames": 81 if member.is_1_5 else 49,
        "time_compressed_rate": 4,
        "num_layers": member.layers,
        "patch_size": [2, 2, 2] if member.is_1_5 else 2,
        "in_channels": 32 if member.image else 16,
        "out_channels": 16,
        "hidden_size": member.width,
        "adm_in_channels": 256,
        "num_attention_heads": member.width // 64,
        "transformer_args": {
            "checkpoint_activations": True,
            "vocab_size": 1,
            "max_sequence_length": 64,
            "layernorm_order": "pre",
            "skip_init": False,
            "model_parallel_size": 1,
            "is_decoder": False,
        },
        "modules": _modules(member),
    }


def _modules(member: Member) -> dict[str, Any]:
    position: dict[str, Any] = {"text_length": 224 if member.is_1_5 else 226}
    if member.rotary:
        position["hidden_size_head"] = 64
    else:
        position |= {"height_interpolation": 1.875, "width_interpolation": 1.875}
    if member.learned:
        position["learnable_pos_embed"] = True
    kind = "Rotary3DPositionEmbeddingMixin" if member.rotary else "Basic3DPositionEmbeddingMixin"
    modules: dict[str, Any] = {
        "pos_embed_config": {"target": f"dit_video_concat.{kind}", "params": position},
        "patch_embed_config": {
            "target": "dit_video_concat.ImagePatchEmbeddingMixin",
            "params": {"text_hidden_size": 4096},
        },
        "adaln_layer_config": {"target": "dit_video_concat.AdaLNMixin", "params": {"qk_ln": True}},
        "final_layer_config": {"target": "dit_video_concat.FinalLayerMixin"},
    }
    if member.lora_rank:
        modules["lora_config"] = {
            "target": "sat.model.finetune.lora2.LoraMixin",
            "params": {"r": member.lora_rank},
        }
    return modules


def _conditioner(member: Member) -> dict[str, Any]:
    encoder = {
        "is_trainable": False,
        "input_key": "txt",
        "ucg_rate": 0.1,
        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
        "params": {"model_dir": "t5-v1_1-xxl", "max_length": 224 if member.is_1_5 else 226},
    }
    return {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [encoder]}}


def _first_stage() -> dict[str, Any]:
    coder = {
        "double_z": True,
        "z_channels": 16,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 2, 4],
        "attn_resolutions": [],
        "num_res_blocks": 3,
        "dropout": 0.0,
        "gather_norm": True,
    }
    return {
        "target": "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper",
        "params": {
            "cp_size": 1,
            "ckpt_path": "somewhere/vae/3d-vae.pt",
            "ignore_keys": ["loss"],
            "loss_config": {"target": "torch.nn.Identity"},
            "regularizer_config": {"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"},
            "encoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D", "params": coder},
            "decoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": coder},
        },
    }


def _loss(member: Member) -> dict[str, Any]:
    groups = {"group_num": 40} if member.is_1_5 else {}
    timesteps = {
        "target": f"{_SGM}.sigma_sampling.DiscreteSampling",
        "params": {
            "uniform_sampling": True,
            "num_idx": 1000,
            **groups,
            "discretization_config": _schedule(member),
        },
    }
    fixed = {"fixed_frames": 0} if member.image else {}
    params = {"offset_noise_level": 0, "sigma_sampler_config": timesteps, **fixed}
    return {"target": f"{_SGM}.loss.VideoDiffusionLoss", "params": params}


def _sampler(member: Member) -> dict[str, Any]:
    guidance = {"target": f"{_SGM}.guiders.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": 50}}
    return {
        "target": f"{_SGM}.sampling.VPSDEDPMPP2MSampler",
        "params": {
            "num_steps": 50,
            "verbose": True,
            "discretization_config": _schedule(member),
            "guider_config": guidance,
        },
    }


def sft_file() -> dict[str, Any]:
    """Returns the content of `sft.yaml`; its loss-scale keys stand beside `fp16` instead of inside."""
    return {
        "args": {
            "checkpoint_activations": True,
            "model_parallel_size": 1,
            "experiment_name": "lora-disney",
            "mode": "finetune",
            "load": "{your CogVideoX SAT folder}/transformer",
            "no_load_rng": True,
            "train_iters": 1000,
            "eval_iters": 1,
            "eval_interval": 100,
            "eval_batch_size": 1,
            "save": "ckpts_5b_lora",
            "save_interval": 500,
            "log_interval": 20,
            "train_data": ["disney"],
            "valid_data": ["disney"],
            "split": "1,0,0",
            "num_workers": 8,
            "force_train": True,
            "only_log_video_latents": True,
        },
        "data": {
            "target": "data_video.SFTDataset",
            "params": {"video_size": [480, 720], "fps": 8, "max_num_frames": 49, "skip_frms_num": 3.0},
        },
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 50,
            "gradient_clipping": 0.1,
            "zero_optimization": {
                "stage": 2,
                "cpu_offload": False,
                "contiguous_gradients": False,
                "overlap_comm": True,
                "reduce_scatter": True,
                "reduce_bucket_size": 1000000000,
                "allgather_bucket_size": 1000000000,
                "load_from_fp32_weights": False,
            },
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": True},
            "fp16": {"enabled": False},
            "loss_scale": 0,
            "loss_scale_window": 400,
            "hysteresis": 2,
            "min_loss_scale": 1,
            "optimizer": {
                "type": "sat.ops.FusedEmaAdam",
                "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-4},
            },
            "activation_checkpointing": {
                "partition_activations": False,
                "contiguous_memory_optimization": False,
            },
            "wall_clock_breakdown": False,
        },
    }


def inference_file() -> dict[str, Any]:
    """Returns the content of that project's `inference.yaml`."""
    return {
        "args": {
            "latent_channels": 16,
            "mode": "inference",
            "load": "{your CogVideoX SAT folder}/transformer",
            "batch_size": 1,
            "input_type": "txt",
            "input_file": "configs/test.txt",
            "sampling_image_size": [768, 1360],
            "sampling_num_frames": 22,
            "sampling_fps": 16,
            "bf16": True,
            "output_dir": "outputs",
            "force_inference": True,
        }
    }
