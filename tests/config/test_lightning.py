"""Flags of FLUX-Lightning: the published command line, defaults, combinations that are refused."""

import argparse
import re
import shlex

import pytest

from ppcoat.config.flags import add_section_flags
from ppcoat.config.lightning import MISTAKES, TINY_FLUX, LightningConfig, lightning_config
from ppcoat.errors import ConfigError

# the documented command for 8 GPUs
PUBLISHED = """
    --data_path "your_path/laion-45w"
    --file_list_path "your_path/filelist_hwge1024_pwatermarkle0.5.txt"
    --pretrained_teacher_model "black-forest-labs/FLUX.1-dev"
    --output_dir outputs/lora_flux_lightning
    --tracker_project_name lora_flux_lightning
    --mixed_precision "bf16" --fp16_opt_level "O2" --resolution "1024" --lora_rank "32"
    --learning_rate "5e-6" --loss_type "huber" --adam_weight_decay "1e-3" --max_train_steps "28652"
    --dataloader_num_workers "32" --guidance_scale "3.5" --validation_steps "20000"
    --checkpointing_steps "1000" --checkpoints_total_limit "30" --train_batch_size "1"
    --gradient_accumulation_steps "1" --resume_from_checkpoint "latest" --seed "453645634"
    --num_euler_timesteps "100" --multiphase "4" --gradient_checkpointing
    --adv_weight 0.1 --adv_lr 1e-5 --pre_alloc_memory 76 --use_dmd_loss --dmd_weight 0.01
    --apply_reflow_loss --reflow_loss_weight 0.01
"""


def parse(text):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_section_flags(parser, LightningConfig)
    return lightning_config(vars(parser.parse_args(shlex.split(text))))


def test_the_published_command_is_taken_as_it_stands_and_is_the_default():
    config = parse(PUBLISHED)
    assert (config.resolution, config.learning_rate, config.seed) == (1024, 5e-6, 453645634)
    assert config.pretrained_teacher_model == "black-forest-labs/FLUX.1-dev"
    assert config.gradient_checkpointing and config.use_dmd_loss and config.apply_reflow_loss
    assert config.generator_steps == 14326
    assert config.encode_ahead is None and not config.strict_resume
    few = parse("--data_path your_path/laion-45w")
    alone = {"file_list_path", "pretrained_teacher_model", "gradient_checkpointing", "use_dmd_loss",
             "apply_reflow_loss", "pre_alloc_memory", "dataloader_num_workers",
             "resume_from_checkpoint"}  # fmt: skip
    for name in set(LightningConfig.model_fields) - alone:
        assert getattr(few, name) == getattr(config, name), name
    assert few.pretrained_teacher_model == TINY_FLUX
    named = parse("--data_path x --pretrained_teacher_model tiny_flux --vae tiny_flux")
    assert (named.pretrained_teacher_model, named.vae) == (TINY_FLUX, TINY_FLUX)


def test_every_field_is_a_flag_with_a_meaning_and_its_default_in_the_help():
    parser = argparse.ArgumentParser(prog="x")
    add_section_flags(parser, LightningConfig)
    text = " ".join(parser.format_help().split())
    for name, field in LightningConfig.model_fields.items():
        assert f"--{name}" in text and field.description
        assert " ".join(field.description.split())[:30].split(" ")[0] in text
    assert "(default: 28652)" in text and len(LightningConfig.model_fields) > 32


def test_the_run_in_the_lora_trainers_terms():
    run = parse(PUBLISHED).run_config("pictures")
    assert run.run_dir.as_posix() == "outputs/lora_flux_lightning/lora_flux_lightning"
    assert (run.network.linear, run.network.linear_alpha) == (32, 32)
    assert run.sample.sample_steps == 4 and run.sample.sample_every == 20000
    assert run.save.save_every == 1000 and run.save.max_step_saves_to_keep == 30
    assert run.model.dtype == "auto" and run.uses_fp8_optimizer
    strict = parse("--data_path x --resume_from_checkpoint latest --strict_resume").run_config("pictures")
    assert strict.save.strict_resume and not run.save.strict_resume
    exact = parse("--data_path x --deterministic").run_config("pictures")
    assert exact.train.deterministic and not run.train.deterministic
    exact = parse("--data_path x --mixed_precision no --lora_alpha 8").run_config("pictures")
    assert exact.model.dtype == "float32" and exact.network.linear_alpha == 8


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        ("--mixed_precision fp16", "overflow float16; use bf16"),
        ("--dmd_weight 0.1", "dmd_weight has no effect without use_dmd_loss"),
        ("--reflow_loss_weight 0.1", "reflow_loss_weight has no effect without apply_reflow_loss"),
        (
            "--adv_weight 0 --adv_lr 1e-4",
            "without adv_weight above 0; leave it out or give adv_weight above 0",
        ),
        ("--dataloader_num_workers 4", "dataloader_num_workers has no effect without file_list_path"),
        ("--image_column 2", "image_column has no effect without file_list_path"),
        ("--phase_delta published", "phase_delta has no effect without use_distill_loss"),
        ("--loss_type l2 --huber_c 0.1", "huber_c has no effect with loss_type l2"),
        ("--num_euler_timesteps 7", "came 7, wanted a divisor of 1000"),
        ("--num_euler_timesteps 2", "multiphase 4 is more than num_euler_timesteps 2"),
        ("--resume_from_checkpoint checkpoint-5", "came 'checkpoint-5', wanted latest"),
        ("--resolution 100", "resolution: came '100', wanted a multiple of 16"),
        ("--learning_rate nan", "learning_rate: came 'nan', wanted a finite number"),
        ("--lora_rank 1.5", "lora_rank: came '1.5'"),
        ("--encode_ahead 0", "encode_ahead: came '0', wanted greater than or equal to 1"),
        ("--encode_ahead -5", "encode_ahead: came '-5', wanted greater than or equal to 1"),
        ("--encode_ahead 5 --train_batch_size 3 --gradient_accumulation_steps 2", "at least the 6 pictures"),
        ("--strict_resume", "strict_resume has no effect without resume_from_checkpoint"),
        ("--validation_prompt \udce9l\udce9gant", "holds half of a character"),  # of a terminal in Latin-1
        ("--train_batch_size 0", "train_batch_size: came '0', wanted greater than or equal to 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(flags, refusal):
    with pytest.raises(ConfigError, match=re.escape(refusal)) as caught:
        parse(f"--data_path x {flags}")
    assert "\n" not in str(caught.value)


def test_unknown_settings_are_refused():
    with pytest.raises(ConfigError, match="learning_rat"):
        lightning_config({"data_path": "x", "learning_rat": 1})


def test_reference_restores_all_eight_mistakes_but_those_that_are_given():
    assert len(MISTAKES) == 8
    default, reference = parse("--data_path x"), parse("--data_path x --compat reference")
    for name in MISTAKES:
        assert getattr(default, name) == "fixed" and getattr(reference, name) == "published"
    mixed = parse("--data_path x --compat reference --last_sigma fixed")
    assert mixed.last_sigma == "fixed" and mixed.forward_noise == "published"
    assert parse("--data_path x --forward_noise published").last_sigma == "fixed"
