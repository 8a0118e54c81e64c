"""YAML of SAT's forks: each key and class that a fork has added is answered by its name here."""

from __future__ import annotations

import fnmatch

import pytest

from sat_train.config.catalog import all_keys
from sat_train.config.sat_forks import FORK_KEYS
from sat_train.errors import ConfigError
from tests.unit.config.conftest import Load

# In the shape of each fork's files, with its keys and classes.
FORKS = {
    "hallo3": """
        args: {wav2vec_features: all, sample_rate: 16000}
        data: {target: data_video.Stage2_SFTDataset}
        model:
          not_trainable_prefixes: [ref_model]
          train_prefix: {ref_model: [attention], model: [face, attention]}
          ref_net_path: weights/transformer
          loss_fn_config: {params: {batch2model_keys: [audio_emb, face_emb]}}
          ref_network_config: {target: ref_dit_video_concat.DiffusionTransformer, params: {num_layers: 42}}
          network_config:
            params:
              add_audio_module: true
              transformer_args: {cross_attn_hidden_size: 768, face_cross_attn_hidden_size: 1024}
    """,
    "Tora": """
        args: {vis_traj_features: false, sample_flow: true, flow_path: trajs, no_flow_injection: false}
        model: {trainable_modules: [fuser, traj_extractor], unfreeze_adaLN_gate: true}
    """,
    "Concat-ID": """
        args: {contextimage2video: true}
        data: {target: data_video.FaceJsonMultiPerSFTDataset}
        model:
          ref_image_dropout: 0.1
          sampler_config: {target: sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler_cfg}
    """,
    "ReSim": """
        args: {sampling_video_size: [512, 896], n_prediction_round: 2, apply_traj: true, save_gt: true}
        data: {target: data_multi.MultiSourceDataset, params: {merge_static: true}}
        model:
          cond_inds_sampling: &given [0, 1, 2]
          en_and_decode_n_frames_a_time: 17
          network_config: {params: {modules: {patch_embed_config: {params: {cond_emb_in_dim: 512}}}}}
          conditioner_config:
            params:
              emb_models:
                - target: sgm.modules.encoders.modules.FrozenT5Embedder
                  input_key: txt
                  params: {model_dir: "asset:tiny/t5", max_length: 226}
                - target: sgm.modules.encoders.traj_encoder.TrajEncoder
                  input_key: fut_traj
                  is_trainable: true
                  params: {dim: 1024, zero_init: true}
          loss_fn_config:
            params:
              cond_inds: [[], [0]]
              cond_inds_prob: [0.5, 0.5]
              apply_cond_aug: V2
              sigma_sampler_config: {params: {custom_sampling: true}}
          sampler_config: {params: {cond_inds_sampling: *given, apply_cond_aug_chunk_inference: min}}
    """,
    "InsViE": """
        args: {test_folder: clips}
        model:
          video_input_dropout: 0.05
          use_lpips: true
          network_config:
            params: {modules: {patch_embed_config: {params: {is_edit: true, emb_ver: double_ch}}}}
          loss_fn_config: {params: {lpips_weight: 0.5, frameloss_weight: 0.5}}
          sampler_config:
            params: {guider_config: {target: sgm.modules.diffusionmodules.guiders.DynamicCFG_edit}}
    """,
    "DimensionX": """
        data: {params: {caption_dir: captions.csv, output_dir: seen}}
    """,
    "hologerry/CogVideo": """
        args: {sdedit_strength: 0.75, summary_dir: runs}
        data: {params: {cam_str: all, paths_post: "204"}}
    """,
}


@pytest.mark.parametrize("fork", FORKS)
def test_each_key_and_class_of_a_fork_is_answered(load: Load, fork: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(FORKS[fork])
    assert raised.value.faults
    for fault in raised.value.faults:
        assert "docs/extend.md" in fault.expected, fault
        assert fault.source.endswith("behind.yaml"), fault
    named = [fault for fault in raised.value.faults if fault.expected.startswith("a key that exists")]
    assert named, "a fork is told what its own keys did"
    assert all(f"; in {fork}: " in fault.expected or "emb_models" in fault.path for fault in named)


def test_a_second_embedder_is_one_answer_that_names_its_field(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"emb_models\.1 = .*trained encoder, of the batch's `fut_traj`"):
        load(FORKS["ReSim"])


def test_no_key_of_ours_is_taken_for_a_fork_s() -> None:
    taken = {key for key in all_keys() for pattern in FORK_KEYS if fnmatch.fnmatchcase(key, pattern)}
    assert not taken


def test_what_is_understood_is_noted_and_loads(load: Load) -> None:
    config = load("model: {trainable_modules: [adaln_layer]}")
    assert config.model.freeze == (".",)
    assert any("model.trainable_modules (model.freeze and model.train" in note for note in config.notes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: {train_prefix: [audio]}", r"model\.train_prefix = .*expected a mapping of words"),
        (
            "model: {trainable_modules: {fuser: 1}}",
            r"model\.trainable_modules = .*expected a list of regular",
        ),
        ("model: {trainable_modules: ['(']}", r"model\.trainable_modules = .*expected a list of regular"),
        ("model: {trainable_modules: [^fuser]}", r"expected .*names of modules, which begin with `model\.`"),
    ],
)
def test_what_is_none_is_refused(load: Load, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(text)


FIELDS = "data: {fields: {sound: {kind: per_frame}, pose: {kind: video}, note: {kind: text}}}\n"
LOSS = "model: {{loss_fn_config: {{params: {{batch2model_keys: {}}}}}}}"


def test_keys_from_batch_to_model_are_conditions_that_give_the_same_names(load: Load) -> None:
    config = load(FIELDS + LOSS.format("[sound, pose]"))
    made = {name: (each.target, each.params.field) for name, each in config.model.conditions.items()}
    assert made == {"sound": ("FieldValues", "sound"), "pose": ("ControlVideo", "pose")}
    assert config.model.conditions["pose"].params.into == "extras"
    assert any("batch2model_keys (model.conditions.sound, model.conditions.pose)" in n for n in config.notes)
    one = load(FIELDS + LOSS.format("sound") + "\n")
    assert list(one.model.conditions) == ["sound"]
    mine = (
        "args.seed=1",
        "model.conditions.sound={target: FieldValues, params: {field: sound, frames: stack}}",
    )
    assert load(FIELDS + LOSS.format("[sound]"), *mine).model.conditions["sound"].params.frames == "stack"


@pytest.mark.parametrize("names", ["[note]", "[audio]", "{audio: 1}", "[1]"])
def test_keys_that_no_field_and_no_condition_gives_are_refused(load: Load, names: str) -> None:
    with pytest.raises(ConfigError, match=r"batch2model_keys = .*expected names of values that modules read"):
        load(FIELDS + LOSS.format(names))
