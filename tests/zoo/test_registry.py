import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softcfg import Pipeline, UserError
from softcfg.zoo import MODELS, ModelEntry, resolve
from softcfg.zoo.source import hash_files
from tiny_models import module

GOLDEN = Path(__file__).parents[1] / "golden"
KEYS = {
    **{f"alitok-{size}": GOLDEN / "alitok" / f"keys-generator-{size}.json" for size in ("b", "l", "xl")},
    **{f"rar-{size}": GOLDEN / "rar" / f"keys-rar-{size}.json" for size in ("b", "l", "xl", "xxl")},
    **{f"robustok-{size}": GOLDEN / "robustok" / f"keys-rar-{size}.json" for size in ("b", "l")},
    **{
        f"llamagen-{size}-{pixels}": GOLDEN / "llamagen" / f"keys-gpt-{size}.json"
        for size, pixels in [("b", 256), ("l", 256), *((size, 384) for size in ("b", "l", "xl", "xxl", "3b"))]
    },
    **dict.fromkeys(("lumina-mgpt-2", "lumina-mgpt-2-omni"), GOLDEN / "lumina" / "keys-7b.json"),
    **{f"janus-pro-{size}": GOLDEN / "janus" / f"keys-hf-{size}.json" for size in ("1b", "7b")},
    **{f"janus-pro-{size}-original": GOLDEN / "janus" / f"keys-original-{size}.json" for size in ("1b", "7b")},
    "emu3-gen": GOLDEN / "emu3" / "keys-gen-hf.json",
    "emu3-gen-original": GOLDEN / "emu3" / "keys-gen-original.json",
    **{f"llamagen-t2i-xl-{pixels}": GOLDEN / "llamagen-t2i" / "keys-gpt-xl-t2i.json" for pixels in (256, 512)},
}
MODEL_YAML = """\
name: shapes
generator: {family: alitok, config: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2}, checkpoint: g.pt}
tokenizer: {family: maskgit-vq, parameters: 123}
sampling: {guidance_scale: 3, temperature: 0.9}
classes: [square, 0]
description: two shapes
"""


@pytest.mark.parametrize("name", KEYS)
def test_models_have_exactly_the_released_tensors(name: str) -> None:
    entry = MODELS[name]
    tensors = json.loads(KEYS[name].read_text())["tensors"]
    released = entry.generator.family.needed(tensors)
    generator, tokenizer = (module(part, "meta") for part in entry.components)
    assert {key: list(tensor.shape) for key, tensor in generator.state_dict().items()} == released
    for part, half in zip(entry.components, (generator, tokenizer), strict=True):
        assert part.parameters == sum(tensor.numel() for tensor in half.state_dict().values())
    if entry.generator.file == entry.tokenizer.file:
        needed = entry.tokenizer.family.needed(
            {key: torch.empty(shape, device="meta") for key, shape in tensors.items()}
        )
        assert needed.keys() == tokenizer.state_dict().keys()
    if name.startswith("emu3"):
        assert (generator.num_tokens, generator.config.code_count) == (90 * 91 + 3, tokenizer.codebook_size)
        assert tokenizer.num_tokens == 90 * 90
    elif not name.startswith("lumina"):
        assert (generator.num_tokens, generator.vocab_size) == (tokenizer.num_tokens, tokenizer.codebook_size)
    else:
        assert (generator.num_tokens, generator.config.num_codes) == (96 * 97 + 1, tokenizer.codebook_size)


@pytest.mark.parametrize("name", KEYS)
def test_configurations_are_those_of_the_released_models(name: str) -> None:
    released = json.loads(KEYS[name].read_text())["config"]
    if "block_size_by_image_size" in released:
        released["block_size"] = released["block_size_by_image_size"][name.rpartition("-")[2]]
    entry = MODELS[name]
    ours = {key: value for key, value in entry.generator.config.items() if key in released}
    if "special_ids" in ours:
        released["special_ids"] = {key: released["special_ids"][key] for key in ours["special_ids"]}
    assert ours == {key: released[key] for key in ours}
    assert entry.generator.config.keys() - released.keys() <= {"image_size", "block_size", "multiple_of"}
    if "default_sampling" in released:
        defaults = {key.removeprefix("randomize_"): value for key, value in released["default_sampling"].items()}
        assert entry.sampling == defaults
        assert entry.generator.file.name == released["checkpoint_file"]


@pytest.mark.parametrize(
    ("name", "scale", "top_k"),
    [("janus-pro-7b", 5.0, 0), ("emu3-gen", 3.0, 2048), ("llamagen-t2i-xl-512", 7.5, 1000)],
)
def test_text_to_image_models_draw_as_released(name: str, scale: float, top_k: int) -> None:
    sampling = {"temperature": 1.0, "top_k": top_k, "guidance_scale": scale, "schedule": "constant", "rule": "cfg"}
    family = MODELS[name].generator.family
    assert all(entry.sampling == sampling for entry in MODELS.values() if entry.generator.family == family)


@pytest.mark.parametrize("entry", MODELS.values(), ids=lambda entry: entry.name)
def test_every_model_has_a_licence(entry: ModelEntry) -> None:
    assert entry.licence
    if entry.name.startswith("janus"):
        assert "DeepSeek License Agreement" in entry.licence


def test_names_in_the_checkpoints_folder_are_unique() -> None:
    published = {file.published: file for entry in MODELS.values() for file in entry.files if not entry.folder}
    assert len({file.local_name for file in published.values()}) == len(published)
    assert MODELS["rar-b"].generator.file.local_name == "rar_b.bin"
    file = MODELS["robustok-b"].generator.file
    assert file.local_name == "robustok_rar_b.bin"
    assert file.published == "https://huggingface.co/qiuk6/RobusTok/blob/main/rar_b.bin"
    assert [file.published for file in MODELS["lumina-mgpt-2-omni"].files] == [
        "https://huggingface.co/Alpha-VLLM/Lumina-mGPT-2.0-Omni/blob/main/model.safetensors.index.json",
        "https://huggingface.co/Alpha-VLLM/Lumina-mGPT-2.0-Omni/blob/main/config.json",
        "https://huggingface.co/ai-forever/MoVQGAN/blob/main/movqgan_270M.ckpt",
        "https://huggingface.co/Alpha-VLLM/Lumina-mGPT-2.0-Omni/blob/main/tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llamagen-b-384", [2.25] * 5),
        ("robustok-b", [1, 1.49169, 3.11376, 5.0834, 5.99975]),
        ("robustok-l", [1, 1.82021, 3.84381, 5.89412, 6.74978]),
    ],
)
def test_default_guidance_is_that_of_the_released_sampler(name: str, expected: list[float]) -> None:
    from softcfg import CFG

    guidance = CFG(**{key: value for key, value in MODELS[name].sampling.items() if key != "temperature"})
    scales = guidance.scales(256)[[0, 64, 128, 192, 255]]
    assert scales.tolist() == pytest.approx(expected, abs=1e-5)


def test_listing_models_needs_no_torch() -> None:
    code = "import sys, softcfg.zoo; softcfg.zoo.resolve('rar-b'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_model_is_found_by_name_folder_or_file(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(MODEL_YAML)
    assert resolve("rar-xl") is MODELS["rar-xl"]
    entry = resolve(str(tmp_path))
    assert entry == resolve(tmp_path) == resolve(tmp_path / "model.yaml") == resolve(entry)
    assert entry.name == "shapes"
    assert entry.generator.family.name == "alitok"
    assert entry.generator.config["hidden_size"] == 64
    assert entry.generator.file.folder == entry.folder == tmp_path
    assert (entry.generator.file.name, entry.tokenizer.file.name) == ("g.pt", "tokenizer.safetensors")
    assert (entry.generator.parameters, entry.tokenizer.parameters) == (None, 123)
    assert entry.sampling == {"guidance_scale": 3, "temperature": 0.9}
    assert entry.classes == ("square", "0")
    assert not entry.bundled


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("alitok-xxl", "there is no model named 'alitok-xxl'; did you mean alitok-xl"),
        ("RAR_B", "did you mean rar-b"),
        ("qwertyuiop", "known: .*alitok-b, .*rar-xxl"),
        ("some/where", "there is no folder some/where; .* run `softcfg fetch some/where` first"),
        ("./nofolder", r"there is no folder \./nofolder; give the name of a model or the path of a model folder"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("~/mine", "there is no folder ~/mine"),
        ("../up", r"there is no folder \.\./up"),
        ("a/b/c", "there is no folder a/b/c"),
    ],
)
def test_unknown_models_get_suggestions(name: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        resolve(name)


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model\.yaml"):
        resolve(tmp_path)


@pytest.mark.parametrize("model", [3, None, b"fashion", ["fashion"]])
def test_what_is_no_name_of_a_model(model: object) -> None:
    with pytest.raises(UserError, match="a model is the name of one or the path of a model folder, got"):
        resolve(model)  # type: ignore[arg-type]


def test_examples_of_classes_that_there_are(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(MODEL_YAML + "examples: {0: 7, square: 18446744073709551615}")
    assert resolve(tmp_path).examples == {"0": 7, "square": 2**64 - 1}


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("family: alitok", "family: alitko", "unknown generator family 'alitko'; did you mean alitok"),
        ("family: maskgit-vq, ", "", "family must be a text, got None"),
        ("checkpoint: g.pt", "checkpoint: 3", "checkpoint must be a text, got 3"),
        ("guidance_scale: 3", "guidance_scale: big", "sampling.guidance_scale must be a number, got 'big'"),
        ("guidance_scale: 3", "schedule: 3", "sampling.schedule must be a text, got 3"),
        ("classes: [square, 0]", "classes: square", "classes must be a list, got 'square'"),
        ("generator: {", "generators: {", "generators is not known, but name, .*; did you mean generator"),
        ("description: two shapes", "foo: 1", "foo is not known, but name, description, .*examples"),
        (
            "parameters: 123",
            "parameter: 123",
            "tokenizer.parameter is not known, but family, .*did you mean parameters",
        ),
        ("parameters: 123", "parameters: true", "parameters must be a whole number, got True"),
        (
            "guidance_scale: 3",
            "temprature: 1",
            "sampling.temprature is not known, but .*top_p.*; did you mean temperatu",
        ),
        ("guidance_scale: 3", "strength: 0", "sampling.strength is not known, but temperature, .*, rule, seed"),
        ("guidance_scale: 3", "weak_share: 0.5", "sampling.weak_share is not known"),
        ("temperature: 0.9", "temperature: 0", "sampling.temperature must be a finite number > 0, got 0"),
        ("temperature: 0.9", "temperature: true", "sampling.temperature must be a number, got True"),
        ("temperature: 0.9", "top_k: 1.5", "sampling.top_k must be an integer >= 0 .*, got 1.5"),
        ("temperature: 0.9", "top_p: 2", "sampling.top_p must be in"),
        ("temperature: 0.9", "seed: -1", "sampling.seed must be a whole number in 0..2.64-1, got -1"),
        ("temperature: 0.9", "rule: agp", "sampling.rule must be one of cfg, .*got 'agp'"),
        ("description: two", "fid: true #", "fid must be a number, got True"),
        (
            "description: two",
            "examples: {sqare: 1} #",
            "the example 'sqare' is none of the classes; did you mean square",
        ),
        (
            "description: two",
            "examples: {square: -1} #",
            "seed of the example 'square' must be a whole number .* got -1",
        ),
        ("name: shapes", "name: [", "not valid YAML"),
    ],
)
def test_malformed_model_files_name_the_field(tmp_path: Path, old: str, new: str, text: str) -> None:
    assert MODEL_YAML.count(old) == 1
    (tmp_path / "model.yaml").write_text(MODEL_YAML.replace(old, new))
    with pytest.raises(UserError, match=text) as caught:
        resolve(tmp_path)
    assert str(tmp_path / "model.yaml") in str(caught.value)


def test_a_setting_of_texts_that_is_not_read(prompt_model_folder: Path, tmp_path: Path) -> None:
    """The template of the family would be taken without a word."""
    folder = shutil.copytree(prompt_model_folder, tmp_path / "copy")
    card = (folder / "model.yaml").read_text()
    assert "template:" in card
    (folder / "model.yaml").write_text(card.replace("template:", "tempalte:"))
    with pytest.raises(UserError, match=r"without a setting 'tempalte' under text; did you mean template"):
        Pipeline.from_pretrained(folder)


def test_files_that_texts_are_read_with_are_hashed_when_they_change(tmp_path: Path) -> None:
    """A run that goes on in the same process may find another one."""
    (tmp_path / "words.json").write_text("one")
    before = hash_files([tmp_path / "words.json"])
    (tmp_path / "words.json").write_text("another")
    assert hash_files([tmp_path / "words.json"]) != before
