import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from softcfg import Pipeline, SoftCFG
from softcfg.cli import released
from softcfg.cli.main import main
from softcfg.zoo import MODELS
from tiny_models import lumina_on_hub, write_lumina_files

# As published, without the parts that only training reads but for a few lines.
ALITOK_XL = """
experiment:
    project: "generation"
    name: "alitok_xl"
    max_train_examples: 1_281_167
model:
    vq_model:
        codebook_size:  4096
        token_size: 32
        num_latent_tokens: 273
    generator:
        hidden_size: 1280
        num_hidden_layers: 32
        num_attention_heads: 16
        dropout: 0.1
        class_label_dropout: 0.1
        image_seq_len:  273
        condition_num_classes: 1000
        randomize_temperature: 1.0
        guidance_scale: 13.0
        guidance_scale_pow: 1.4
        softcfg_strength: 0
        step_norm: False
        use_checkpoint: False
        seed: 2
optimizer:
    params:
        learning_rate: 4e-4
lr_scheduler:
    params:
        learning_rate: ${optimizer.params.learning_rate}
"""


@pytest.fixture
def xl(tmp_path: Path) -> Path:
    path = tmp_path / "alitok_xl.yaml"
    path.write_text(ALITOK_XL)
    return path


def parse(*words: str) -> Any:
    from softcfg.cli.main import _rewritten, build_parser

    args = build_parser().parse_args(_rewritten(["sample", *words]))
    released.apply(args)
    return args


def test_words_become_flags() -> None:
    assert released.as_flags(
        ["config=a.yaml", "experiment.output_dir=out/x=y", "--model.generator.guidance-scale=9",
         "--model.vq_ckpt", "f.pt", "--labels", "0-9", "runs/my.model", "alitok.xl", "--top-p=0.9", "1.5"]
    ) == [
        "--config", "a.yaml", "--set", "experiment.output_dir=out/x=y", "--set", "model.generator.guidance_scale=9",
        "--set", "model.vq_ckpt=f.pt", "--labels", "0-9", "runs/my.model", "alitok.xl", "--top-p=0.9", "1.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", "f.stop=2.8 photo", "--prompt", "config=x"], {"prompt": ["f.stop=2.8 photo", "config=x"]}),
        (["--output-dir", "runs.lr=3"], {"output_dir": "runs.lr=3"}),
        (["--output_dir", "runs.lr=3"], {"output_dir": "runs.lr=3"}),
        (["--save-path", "runs.lr=3", "--cfg", "2"], {"output_dir": "runs.lr=3", "guidance_scale": 2.0}),
        (["--plugin", "my.plug=in"], {"plugin": ["my.plug=in"]}),
        (["--set", "a.b=c"], {"set": ["a.b=c"]}),
        (["--speculative-jacobi", "a.b=c"], {"speculative_jacobi": 16, "set": ["a.b=c"]}),
        (["--step-norm", "a.b=c", "--seed=3", "a.d=e"], {"step_norm": True, "set": ["a.b=c", "a.d=e"]}),
    ],
)
def test_the_value_of_a_flag_is_no_override(words: list[str], expected: dict[str, Any]) -> None:
    from softcfg.cli.main import _rewritten, build_parser

    args = build_parser().parse_args(_rewritten(["sample", "fashion", *words]))
    assert args.model == "fashion"
    assert {name: getattr(args, name) for name in expected} == expected
    assert "set" in expected or args.set == []


@pytest.mark.parametrize("style", ["config={}", "--config={}"])
def test_a_released_command_line(xl: Path, style: str) -> None:
    args = parse(
        style.format(xl), "experiment.output_dir=output/alitok_xl", "experiment.generator_checkpoint=weights/xl.bin",
        "model.generator.guidance_scale=9", "--model.generator.guidance_scale_pow=1.5", "--model.generator.seed", "7",
        "model.generator.softcfg_strength=1.0", "model.generator.step_norm=True",
        "model.generator.randomize_temperature=1.02",
    )  # fmt: skip
    assert args.model.name == "alitok-xl"
    assert args.model.generator == MODELS["alitok-xl"].generator
    expected = {
        "guidance_scale": 9, "guidance_scale_pow": 1.5, "softcfg_strength": 1.0, "step_norm": True,
        "temperature": 1.02, "seed": 7, "output_dir": "output/alitok_xl", "generator_checkpoint": "weights/xl.bin",
        "num_samples": 50_000, "npz": True, "preset": "released",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_flags_win_over_overrides_and_these_over_the_file(xl: Path) -> None:
    args = parse(f"config={xl}", "model.generator.guidance_scale=9", "--guidance-scale", "5", "--no-npz",
                 "--num-samples=10", "--preset", "paper")  # fmt: skip
    assert args.guidance_scale == 5.0
    assert args.guidance_scale_pow == 1.4
    assert args.softcfg_strength == 0
    assert args.step_norm is False
    assert (args.npz, args.num_samples, args.preset) == (False, 10, "paper")


def test_another_perturbation_leaves_the_files_softcfg_aside(xl: Path) -> None:
    args = parse(f"config={xl}", "--perturbation", "none")
    assert (args.guidance_scale, args.softcfg_strength, args.step_norm, args.preset) == (13.0, None, None, None)
    args = parse(f"config={xl}", "--perturbation", "none", "model.generator.softcfg_strength=1")
    assert args.softcfg_strength == 1  # for which the command has an error


def test_configurations_of_plain_guidance_mean_plain_guidance(tmp_path: Path) -> None:
    config = yaml.safe_load(ALITOK_XL)
    for name in ("softcfg_strength", "step_norm", "seed"):
        del config["model"]["generator"][name]
    config["model"]["generator"].update(hidden_size=768, num_hidden_layers=24)
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(config))
    args = parse("--config", str(tmp_path / "b.yaml"))
    assert (args.model.name, args.softcfg_strength, args.seed) == ("alitok-b", 0.0, 42)


def test_rar_by_overrides(xl: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(ALITOK_XL)
    generator, tokenizer = config["model"]["generator"], config["model"]["vq_model"]
    generator.update(hidden_size=768, num_hidden_layers=24, intermediate_size=3072, image_seq_len=256)
    tokenizer.update(codebook_size=1024, num_latent_tokens=256)
    tokenizer["pretrained_tokenizer_weight"] = "maskgit-vqgan-imagenet-f16-256.bin"
    (tmp_path / "rar.yaml").write_text(yaml.safe_dump(config))
    flags = [f"config={tmp_path}/rar.yaml", "experiment.generator_checkpoint=rar_l.bin"]
    sizes = ["model.generator.hidden_size=1024", "model.generator.intermediate_size=4096"]
    args = parse(*flags, *sizes)
    assert args.model.name == "rar-l"
    # The files that the released script downloads by these names.
    assert args.generator_checkpoint is None
    assert args.tokenizer_checkpoint is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.generator.guidance_scal=9", "unknown override 'model.generator.guidance_scal'; did you mean"),
        ("--model.generator.softcfg_strenght=1", "did you mean model.generator.softcfg_strength?"),
        ("experiment.outputdir=x", "did you mean experiment.output_dir?"),
        ("modle.generator.step_norm=True", "did you mean model.generator.step_norm?"),
        ("model.generator.guidance_scale=much", "guidance_scale must be a finite number >= 0, got 'much'"),
        ("model.generator.step_norm=maybe", "step_norm must be True or False, got 'maybe'"),
        ("model.generator.seed=1.5", "model.generator.seed must be an integer, got 1.5"),
        ("experiment.output_dir=''", "experiment.output_dir must not be empty"),
        ("model.generator.seed=[1", "override model.generator.seed=[1 is not a YAML value"),
    ],
)  # fmt: skip
def test_bad_overrides(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    assert main(["sample", str(model_folder), "--output-dir", str(tmp_path / "out"), word]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("softcfg: error") == 1
    assert not (tmp_path / "out").exists()


def test_configurations_that_fit_no_model(xl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", f"config={xl}", "model.generator.hidden_size=1000"]) == 2
    assert f"no known model has the sizes in {xl}; give MODEL too" in capsys.readouterr().err
    assert main(["sample", "config=/nowhere.yaml"]) == 2
    assert "/nowhere.yaml does not exist" in capsys.readouterr().err
    assert main(["sample", "model.generator.guidance_scale=3"]) == 2
    assert "MODEL is missing" in capsys.readouterr().err


def test_a_training_checkpoint_with_its_configuration(model_folder: Path, tmp_path: Path) -> None:
    """The whole way: sizes from the file, weights by override, results as the released samplers leave them."""
    known = yaml.safe_load((model_folder / "model.yaml").read_text())
    config = {
        "experiment": {"name": "tiny"},
        "model": {
            "vq_model": {"codebook_size": 20},
            "generator": {**known["generator"]["config"], "dropout": 0.1, "randomize_temperature": 1.1,
                          "guidance_scale": 2.0, "guidance_scale_pow": 1.0, "softcfg_strength": 0, "seed": 5},
        },
        "training": {"per_gpu_batch_size": 8},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "output" / "tiny"
    words = [
        str(model_folder), f"config={tmp_path}/tiny.yaml", f"experiment.output_dir={out}",
        f"experiment.generator_checkpoint={model_folder}/generator.safetensors", "training.per_gpu_batch_size=4",
        "--model.generator.guidance_scale=4", "model.generator.softcfg_strength=1", "model.generator.step_norm=True",
        "--num-samples", "5",
    ]  # fmt: skip
    assert main(["sample", *words]) == 0
    guidance = SoftCFG.released(guidance_scale=4.0, guidance_scale_pow=1.0)
    expected = Pipeline.from_pretrained(model_folder)([0, 1, 2, 3, 0], guidance, seed=5, temperature=1.1)
    with np.load(tmp_path / "output" / "tiny.npz") as content:
        assert np.array_equal(content["arr_0"], expected.pixels)
    assert sorted(path.name for path in out.glob("0*.png")) == [f"{n:06d}.png" for n in range(5)]
    assert json.loads((out / "run.json").read_text())["guidance"]["confidence"] == "sampled"


def test_a_tokenizer_beside_the_generator_is_found(xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTCFG_CHECKPOINTS", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    assert parse(f"config={xl}").tokenizer_checkpoint is None
    (tmp_path / "AliTok.pth").write_bytes(b"x")
    args = parse(f"config={xl}", f"experiment.generator_checkpoint={tmp_path}/mine.bin")
    assert args.tokenizer_checkpoint == str(tmp_path / "AliTok.pth")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "AliTok.pth").write_bytes(b"x")
    assert parse(f"config={xl}").tokenizer_checkpoint == "weights/AliTok.pth"


# ---- every command line of the READMEs of the released code, after the name of its program

RAR = "config={rar} experiment.output_dir={size} experiment.generator_checkpoint={size}.bin "
RAR += "model.generator.hidden_size={0} model.generator.num_hidden_layers={1} model.generator.num_attention_heads=16 "
RAR += "model.generator.intermediate_size={2} model.generator.randomize_temperature={3} "
RAR += "model.generator.guidance_scale={4} model.generator.guidance_scale_pow={5}"
C2I = "--vq-ckpt ./vq_ds16_c2i.pt --gpt-ckpt ./{0} --gpt-model {1} --image-size 384"
PLAIN = {"softcfg_strength": 0.0}


def rar(size: str, *values: Any) -> str:
    return RAR.replace("{size}", size).replace("{rar}", "RAR_YAML").format(*values)


README: list[tuple[str, str, dict[str, Any]]] = [
    (
        "--config ALITOK_YAML --experiment.output_dir=output/softcfg_alitok_xl "
        "--experiment.generator_checkpoint=weights/alitok_xl.bin --model.generator.guidance_scale=9 "
        "--model.generator.guidance_scale_pow=1.5 --model.generator.softcfg_strength=1 "
        "--model.generator.step_norm=True",
        "alitok-xl",
        {"guidance_scale": 9, "guidance_scale_pow": 1.5, "softcfg_strength": 1, "step_norm": True,
         "preset": "released"},
    ),
    (
        "--model_path LUMINA --save_path outputs/softcfg_lumina/ --task t2i --cfg 9.0 --temperature 1.0 --top_k 2048 "
        "--speculative_jacobi --softcfg_strength 1.0 --softcfg_disable_step_norm false",
        "lumina-mgpt-2",
        {"guidance_scale": 9.0, "temperature": 1.0, "top_k": 2048, "speculative_jacobi": 16, "softcfg_strength": 1.0,
         "step_norm": True, "task": None, "output_dir": "outputs/softcfg_lumina/", "quantize": None},
    ),
    (
        "--model_path Alpha-VLLM/Lumina-mGPT-2.0 --save_path save_samples/ --cfg 4.0 --top_k 4096 --temperature 1.0 "
        "--width 768 --height 768",
        "lumina-mgpt-2",
        {"guidance_scale": 4.0, "top_k": 4096, "width": 768, "height": 768, "speculative_jacobi": 0, "step_norm": None},
    ),
    (
        "--model_path Alpha-VLLM/Lumina-mGPT-2.0 --save_path save_samples/ --cfg 4.0 --top_k 4096 --temperature 1.0 "
        "--width 768 --height 768 --task depth --input_image_path /path/to/image.jpg --prompt words",
        "lumina-mgpt-2",
        {"task": "depth", "image": "/path/to/image.jpg", "prompt": ["words"]},
    ),
    (
        "--model_path Alpha-VLLM/Lumina-mGPT-2.0 --save_path save_samples/ --cfg 4.0 --top_k 4096 --temperature 1.0 "
        "--width 768 --height 768 --speculative_jacobi --quant",
        "lumina-mgpt-2",
        {"speculative_jacobi": 16, "quantize": "int4"},
    ),
    (
        "config=ROBUSTOK_YAML experiment.output_dir=output/softcfg_robus "
        "experiment.generator_checkpoint=weights/rar_b.pt model.generator.guidance_scale=16.0 "
        "model.generator.guidance_scale_pow=2.75 model.generator.softcfg_strength=1 model.generator.step_norm=True",
        "robustok-b",
        {"guidance_scale": 16.0, "guidance_scale_pow": 2.75, "softcfg_strength": 1, "step_norm": True},
    ),
    (rar("rar_b", 768, 24, 3072, 1.0, 16.0, 2.75), "rar-b", {"temperature": 1.0, "guidance_scale": 16.0, **PLAIN}),
    (rar("rar_l", 1024, 24, 4096, 1.02, 15.5, 2.5), "rar-l", {"temperature": 1.02, "guidance_scale": 15.5, **PLAIN}),
    (rar("rar_xl", 1280, 32, 5120, 1.02, 6.9, 1.5), "rar-xl", {"guidance_scale_pow": 1.5, **PLAIN}),
    (rar("rar_xxl", 1408, 40, 6144, 1.02, 8.0, 1.2), "rar-xxl", {"num_samples": 50_000, "npz": True, **PLAIN}),
    (C2I.format("c2i_L_384.pt", "GPT-L"), "llamagen-l-384", {"guidance_scale": 4.0, "top_k": 2000, **PLAIN}),
    (C2I.format("c2i_XXL_384.pt", "GPT-XXL --from-fsdp"), "llamagen-xxl-384", {"num_samples": 8, **PLAIN}),
    (
        "--vq-ckpt ./vq_ds16_t2i.pt --gpt-ckpt ./t2i_XL_stage1_256.pt --gpt-model GPT-XL --image-size 256",
        "llamagen-t2i-xl-256",
        {"labels": None, "num_samples": None, "images_per_prompt": 1, **PLAIN},
    ),
    (
        "--vq-ckpt ./vq_ds16_t2i.pt --gpt-ckpt ./t2i_XL_stage2_512.pt --gpt-model GPT-XL --image-size 512",
        "llamagen-t2i-xl-512",
        {"prompts": None, **PLAIN},
    ),
    *(
        (
            C2I.format(f"c2i_{size}.pt", f"GPT-{size}{fsdp}") + f" --image-size-eval 256 --cfg-scale {scale}",
            f"llamagen-{size.lower()}-384",
            {"guidance_scale": scale, "num_samples": 50_000, "labels": "random", "npz": True, "top_k": 0,
             "generator_checkpoint": f"./c2i_{size}.pt", **PLAIN},
        )
        for size, fsdp, scale in (
            ("B", "", 2.0), ("L", "", 2.0), ("XL", "", 1.75), ("XXL", " --from-fsdp", 1.75),
            ("3B", " --from-fsdp", 1.65),
        )
    ),
]  # fmt: skip


def config_of(name: str) -> str:
    entry = MODELS[name]
    return yaml.safe_dump(
        {"model": {"generator": dict(entry.generator.config), "vq_model": dict(entry.tokenizer.config)}}
    )


@pytest.mark.parametrize(
    ("line", "model", "expected"), README, ids=lambda value: value[:60] if isinstance(value, str) else ""
)
def test_command_lines_of_the_readmes(
    line: str, model: str, expected: dict[str, Any], xl: Path, tmp_path: Path
) -> None:
    for word, name in (("RAR_YAML", "rar-b"), ("ROBUSTOK_YAML", "robustok-b")):
        (tmp_path / word).write_text(config_of(name))
        line = line.replace(word, str(tmp_path / word))
    checkpoint = tmp_path / "lumina"
    checkpoint.mkdir()
    for file in ("model.safetensors.index.json", "config.json", "tokenizer.json"):
        (checkpoint / file).write_text("{}")
    args = parse(*line.replace("ALITOK_YAML", str(xl)).replace("LUMINA", str(checkpoint)).split())
    name = args.model if isinstance(args.model, str) else args.model.name
    assert name == model
    assert {key: getattr(args, key) for key in expected} == expected
    if "lumina" in model:
        assert args.prompt


def test_a_lumina_checkpoint_is_drawn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "lumina-mgpt-2", lumina_on_hub())
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "outputs"
    checkpoint.mkdir()
    write_lumina_files(checkpoint)
    words = ["sample", "--model_path", str(checkpoint), "--save_path", str(out), "--task", "t2i", "--cfg", "9.0",
             "--temperature", "1.0", "--top_k", "2048", "--speculative_jacobi", "--softcfg_strength", "1.0",
             "--softcfg_disable_step_norm", "false"]  # fmt: skip
    assert main(words) == 0
    assert "4 examples are drawn" in capsys.readouterr().err
    settings = json.loads((out / "run.json").read_text())
    assert settings["guidance"]["guidance_scale"] == 9.0
    assert settings["guidance"]["step_norm"] is True
    assert len(list(out.glob("0*.png"))) == 4
    assert main(words) == 0  # continues
    for name in ("config.json", "tokenizer.json"):
        (checkpoint / name).unlink()
    assert main([*words, "--prompt", "red apple"]) == 2
    assert f"--model-path {checkpoint} lacks config.json, tokenizer.json of tiny-lumina" in capsys.readouterr().err
    assert main(["sample", "--model_path", "nowhere"]) == 2
    assert "--model-path: there is no folder nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("--softcfg_disable_step_norm", "--no-step-norm"),
        ("--softcfg_disable_step_norm true", "--no-step-norm"),
        ("--softcfg-disable-step-norm=False", "--step-norm"),
        ("--step_norm True", "--step-norm"),
        ("--step_norm false --cfg=9 --quant", "--no-step-norm --guidance-scale 9 --quantize int4"),
        ("--step-norm fashion", "--step-norm fashion"),
    ],
)
def test_switches(words: str, flags: str) -> None:
    assert released.as_flags(words.split()) == flags.split()


def test_a_switch_that_is_neither(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "fashion", "--step_norm=maybe"]) == 2
    assert "--step-norm takes true, false or nothing, got 'maybe'" in capsys.readouterr().err


def test_no_images_are_not_taken_for_the_usual_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--gpt-model", "GPT-B", "--num-samples", "0"]) == 2
    assert "--num-samples must be at least 1, got 0" in capsys.readouterr().err
