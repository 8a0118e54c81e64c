"""Renders a diffusers script that samples an exported model as the run itself does."""

from __future__ import annotations

from pathlib import Path

from sat_train.config import RunConfig
from sat_train.config.parts.guidance_parts import DynamicGuidanceParams, GuidanceConfig
from sat_train.models.build import compute_dtype
from sat_train.sampling.build import SamplingSettings, build_sampling

_DIFFUSERS_EXPONENT = 5.0
_BASE = "{folder of the base model in diffusers' format}"


def diffusers_snippet(config: RunConfig, dest: str | Path, *, is_lora: bool) -> str:
    """Returns the script that samples an exported model with the right settings.

    Args:
        config: The model's configuration; its sampling settings are used.
        dest: The exported folder.
        is_lora: Whether only adapters were exported, for `load_lora_weights`.

    Raises:
        ConfigError: No setting gives the size of a video.
    """
    settings = build_sampling(config)
    is_image = config.model.noised_image_input
    pipeline = "CogVideoXImageToVideoPipeline" if is_image else "CogVideoXPipeline"
    loader = "export_to_video, load_image" if is_image else "export_to_video"
    folder = _base_folder(config) if is_lora else dest
    lines = [
        "import torch",
        f"from diffusers import {pipeline}",
        f"from diffusers.utils import {loader}",
        "",
        f'pipe = {pipeline}.from_pretrained("{folder}", torch_dtype={compute_dtype(config.args)})',
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
    ]
    if is_lora:
        lines.append(f'pipe.load_lora_weights("{dest}", adapter_name="lora")')
        lines.append('pipe.set_adapters("lora", 1.0)  # 1.0 is as trained, whatever lora_alpha was')
    return "\n".join(
        [*lines, *_call(config, settings), f'export_to_video(video, "video.mp4", fps={settings.fps:g})']
    )


def _call(config: RunConfig, settings: SamplingSettings) -> list[str]:
    length = config.spec.text.max_length
    guidance = config.spec.guidance
    image = ['    image=load_image("first_frame.png"),'] if config.model.noised_image_input else []
    empty = '    negative_prompt_embeds=torch.zeros_like(text),  # trained so: no caption is zeros, not ""'
    null = [empty] if config.model.null_condition == "zero" else ['    negative_prompt="",']
    words = f"do_classifier_free_guidance=False, max_sequence_length={length}"
    return [
        f'text, _ = pipe.encode_prompt("a prompt", {words})',
        "video = pipe(",
        *image,
        "    prompt_embeds=text,",
        *null,
        f"    max_sequence_length={length},",
        f"    num_frames={settings.num_frames},",
        f"    height={settings.height},",
        f"    width={settings.width},",
        f"    num_inference_steps={settings.steps},",
        f"    guidance_scale={guidance.params.scale:g},",
        f"    use_dynamic_cfg={guidance.target == 'DynamicGuidance'},{_guidance_note(guidance)}",
        f"    generator=torch.Generator().manual_seed({config.args.seed}),",
        ").frames[0]",
    ]


def _guidance_note(guidance: GuidanceConfig) -> str:
    if guidance.target not in ("ConstantGuidance", "DynamicGuidance"):
        return f"  # diffusers has no {guidance.target}: the scale is constant there"
    params = guidance.params
    if isinstance(params, DynamicGuidanceParams) and params.exp != _DIFFUSERS_EXPONENT:
        return f"  # the exponent of this model is {params.exp:g}; diffusers has 5"
    return ""


def _base_folder(config: RunConfig) -> str:
    """Returns the diffusers folder that the run started from, or a placeholder for the user to fill in."""
    load = Path(config.args.load or "")
    return next((str(f) for f in (load, load.parent) if (f / "model_index.json").is_file()), _BASE)
