"""Checkpoints in the Hugging Face layout, loaded back and compared."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import documents, family, to_numpy
from text_models import text_model

import keras_ebft
from keras_ebft import networks
from keras_ebft.networks import adapters

X = documents(2, 12)
# Layers of Gemma 2 alternate, those of Gemma 3 come in sixes; two suffice else.
EXPORTED = (
    "Gemma",
    "Gemma2",
    "Gemma3",
    "GPT2",
    "Llama",
    "Llama3",
    "Mistral",
    "Qwen",
    "Qwen3",
)


def logits(causal_lm):
    x = {"token_ids": X, "padding_mask": np.ones_like(X)}
    return to_numpy(causal_lm(x, training=False))


# Settings that the Hugging Face layout can express.
CHANGES = {
    "GPT2": {"intermediate_dim": 64},
    "Gemma": {"use_sliding_window_attention": False},
    # KerasHub does not read that a window is used.
    "Qwen": {"use_sliding_window_attention": False},
    "Gemma3": {"use_post_ffw_norm": True, "use_post_attention_norm": True},
}


def exportable(name):
    """A model of the settings that the Hugging Face layout can express."""
    causal_lm = family(name, **CHANGES.get(name, {}))
    # KerasHub reads Mistral's weights as float16.
    weights = causal_lm.get_weights()
    causal_lm.set_weights([w.astype("float16").astype(w.dtype) for w in weights])
    return causal_lm


def adapt(causal_lm):
    causal_lm.backbone.enable_lora(2)
    random = np.random.default_rng(1)
    for layer in adapters.adapted_layers(causal_lm.backbone):
        shape = layer.lora_kernel_b.shape
        layer.lora_kernel_b.assign(0.3 * random.normal(size=shape))


def load(path):
    # By its configuration alone: the folder has no tokenizer.
    backbone = keras_hub.models.Backbone.from_preset(str(path))
    name = type(backbone).__name__.replace("Backbone", "CausalLM")
    return getattr(keras_hub.models, name)(backbone=backbone, preprocessor=None)


CASES = [
    pytest.param(
        name,
        adapted,
        id=f"{name}-{'adapters' if adapted else 'plain'}",
        # The merged kernels of all families go one way: some are enough.
        marks=[pytest.mark.slow] if adapted and name not in ("Gemma", "Llama") else [],
    )
    for name in EXPORTED
    for adapted in (False, True)
]


@pytest.mark.on_torch
@pytest.mark.parametrize(("name", "adapted"), CASES)
def test_an_exported_model_loads_back_equal(name, adapted, tmp_path):
    causal_lm = exportable(name)
    base = logits(causal_lm)
    tolerance = 2e-5
    if adapted:
        adapt(causal_lm)
        tolerance = 1e-2 if name == "Mistral" else tolerance
    expected = logits(causal_lm)
    kernels = causal_lm.get_weights()
    keras_ebft.export_to_hugging_face(causal_lm, tmp_path)
    np.testing.assert_allclose(logits(load(tmp_path)), expected, atol=tolerance)
    # The model itself is left as it was, to the bit.
    for before, after in zip(kernels, causal_lm.get_weights()):
        np.testing.assert_array_equal(before, after)
    assert (np.abs(expected - base).max() > 1e-2) == adapted


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="files are written by way of NumPy on every backend, and compared above",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "adapted"), CASES)
def test_transformers_reads_an_exported_model(name, adapted, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install .[test]")
    import torch

    causal_lm = exportable(name)
    if adapted:
        adapt(causal_lm)
    keras_ebft.export_to_hugging_face(causal_lm, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        found = model(torch.tensor(X, dtype=torch.long)).logits.numpy()
    # KerasHub's epsilon in Qwen 3's normalised queries cannot be said in the layout.
    tolerance = 1e-3 if name == "Qwen3" else 2e-5
    np.testing.assert_allclose(found, logits(causal_lm), atol=tolerance)


def swap_tokens(backbone, one, other):
    """Makes a model say one token where it said another."""
    embedding = backbone.token_embedding
    weights = [(embedding.embeddings, 0)]
    if not embedding.tie_weights:
        weights.append((embedding.reverse_embeddings, 1))
    for weight, axis in weights:
        values = np.moveaxis(to_numpy(weight), axis, 0)
        values[[one, other]] = values[[other, one]]
        weight.assign(np.moveaxis(values, 0, axis))


def continued(causal_lm, token_ids, length):
    """Token ids that a model goes on with, greedily, up to and with an end token."""
    found = list(token_ids)
    while len(found) < length:
        x = {"token_ids": np.array([found]), "padding_mask": np.ones((1, len(found)))}
        found.append(int(to_numpy(causal_lm(x, training=False))[0, -1].argmax()))
        if found[-1] in networks.end_token_ids(causal_lm):
            break
    return found[len(token_ids) :]


GENERATED = [
    name if name in ("Llama", "Llama3") else pytest.param(name, marks=pytest.mark.slow)
    for name in EXPORTED
]


@pytest.mark.on_torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GENERATED)
def test_transformers_continues_a_text_as_the_model_does(name, tmp_path):
    """It begins with the same token, goes on with the same, and stops at the same."""
    transformers = pytest.importorskip("transformers", reason="pip install .[test]")
    text, length = "abab ab", 20
    causal_lm = text_model(name, **CHANGES.get(name, {}))
    x = causal_lm.preprocessor.generate_preprocess([text], sequence_length=length)
    prompt = to_numpy(x["token_ids"])[0][to_numpy(x["padding_mask"])[0].astype(bool)]
    prompt = [int(token) for token in prompt]
    # The first new token that was not there before becomes the end.
    end = networks.end_token_ids(causal_lm)[-1]
    said = continued(causal_lm, prompt, length)
    new = [token for token in said[1:] if token not in [*prompt, said[0]]]
    if new and end not in prompt:
        swap_tokens(causal_lm.backbone, new[0], end)
    expected = continued(causal_lm, prompt, length)
    # GPT-2's prompts begin with the end token, and one model only repeats itself.
    assert expected[-1] == end or name in ("GPT2", "Gemma")
    keras_ebft.export_to_hugging_face(causal_lm, tmp_path / "exported")

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt
    found = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_length=length,
    )[0, len(prompt) :].tolist()
    assert found == expected


def test_a_folder_with_a_tokenizer_is_a_whole_preset(tmp_path, byte_lm, caplog):
    keras_ebft.export_to_hugging_face(byte_lm, tmp_path)
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path))
    tokenizers = byte_lm.preprocessor.tokenizer, loaded.preprocessor.tokenizer
    first, second = (to_numpy(tokenizer("abab, x")) for tokenizer in tokenizers)
    np.testing.assert_array_equal(first, second)
    assert not caplog.records


def test_a_tokenizer_that_has_no_layout_is_reported(tmp_path, byte_lm, caplog):
    tokenizer = keras_hub.tokenizers.ByteTokenizer()
    assert type(tokenizer).__name__ == "ByteTokenizer"
    byte_lm = keras_hub.models.Llama3CausalLM(
        byte_lm.backbone, preprocessor=Preprocessor(tokenizer)
    )
    keras_ebft.export_to_hugging_face(byte_lm, tmp_path)
    assert "ByteTokenizer" in caplog.text


class Preprocessor(keras_hub.models.Llama3CausalLMPreprocessor):
    """A preprocessor with any tokenizer."""

    def __init__(self, tokenizer):
        keras_hub.models.Preprocessor.__init__(self)
        self.tokenizer = tokenizer


@pytest.mark.on_torch
def test_a_folder_is_written_whole_or_not_at_all(tmp_path, byte_lm, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("keras_ebft.export.hugging_face.write_tokenizer", fail)
        with pytest.raises(OSError, match="disk full"):
            keras_ebft.export_to_hugging_face(byte_lm, tmp_path / "new")
        assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(ImportError, match=r"safetensors.*keras_ebft\[export\]"):
            keras_ebft.export_to_hugging_face(byte_lm, tmp_path / "new")
        assert not list(tmp_path.iterdir())
    keras_ebft.export_to_hugging_face(byte_lm, tmp_path / "new")
    # Into a folder that is there, whose other files stay.
    (tmp_path / "new" / "notes.txt").touch()
    keras_ebft.export_to_hugging_face(byte_lm, tmp_path / "new")
    assert {"config.json", "notes.txt"} < {p.name for p in (tmp_path / "new").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


@pytest.mark.on_torch
@pytest.mark.parametrize("failing", range(1, 7))
def test_a_folder_that_is_there_is_replaced_whole_or_not_at_all(
    failing, tmp_path, monkeypatch
):
    from keras_ebft.export import hugging_face

    def contents(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    names = ["config.json", "model.safetensors", "generation_config.json"]
    folder = tmp_path / "there"
    folder.mkdir()
    for name in (*names[:2], "notes.txt"):
        (folder / name).write_text(f"old {name}")
    before, replace, calls = contents(folder), hugging_face.os.replace, []

    def counted(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError("no more")
        replace(source, target)

    def write():
        with hugging_face._written_whole(folder) as partial:
            for name in names:
                (partial / name).write_text(f"new {name}")

    monkeypatch.setattr(hugging_face.os, "replace", counted)
    # Three files, two of them in place of others.
    if failing <= 5:
        with pytest.raises(OSError, match="no more"):
            write()
        assert contents(folder) == before
    else:
        write()
        new = {name: f"new {name}".encode() for name in names}
        assert contents(folder) == {**before, **new}
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_families_without_a_layout_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"FalconBackbone.*save_to_preset"):
        keras_ebft.export_to_hugging_face(family("Falcon"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    half = family("Gemma2", use_post_ffw_norm=False)
    with pytest.raises(ValueError, match=r"GemmaBackbone with.*Gemma 2"):
        keras_ebft.export_to_hugging_face(half, tmp_path)


def test_quantized_models_are_refused(tmp_path):
    causal_lm = family("Llama")
    causal_lm.quantize("int8", filters="query")
    causal_lm.backbone.enable_lora(2)
    with pytest.raises(ValueError, match=r"quantized layers.*load_lora_weights"):
        keras_ebft.export_to_hugging_face(causal_lm, tmp_path)
