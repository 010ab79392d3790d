"""GGUF files as KerasHub models, compared with what `transformers` reads of them."""

import gguf_files
import keras
import keras_hub
import numpy as np
import pytest
from helpers import to_numpy

import keras_ebft
from keras_ebft.models import cache, rotary, smollm, splitting

CODE = "def f(x):\n    return 123\n\n\n    # (foo)  it's\n\tnaïve 日本 1_000 éa\n"
TEXTS = (CODE, "<|im_start|>user\n\n  Hello!<|im_end|>\n", gguf_files.TEXT, " ", "   x")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def against_transformers(test):
    """Marks a test that needs PyTorch, slow to import beside another backend."""
    test = pytest.mark.filterwarnings("ignore")(test)
    return test if keras.backend.backend() == "torch" else pytest.mark.slow(test)


def logits(causal_lm, token_ids):
    x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    return to_numpy(causal_lm(x, training=False))


def token_rows(vocabulary=256, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, (2, 12))


def transformers_logits(folder, token_ids, **options):
    """What `transformers` computes, on PyTorch beside any backend."""
    transformers = pytest.importorskip("transformers", reason="pip install .[test]")
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(token_ids, dtype=torch.long)).logits.numpy()


def transformers_tokenizer(folder, **options):
    transformers = pytest.importorskip("transformers", reason="pip install .[test]")
    return transformers.AutoTokenizer.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tiny model of the llama architecture, read once."""
    path = tmp_path_factory.mktemp("tied") / "tiny.gguf"
    return keras_ebft.models.from_gguf(gguf_files.write(path), sequence_length=24)


@against_transformers
@pytest.mark.parametrize(
    ("architecture", "tied", "kind"),
    [
        ("llama", True, "F32"),
        ("llama", False, "F16"),
        ("llama", True, "Q8_0"),
        ("llama", False, "Q4_1"),
        ("qwen2", True, "F32"),
        ("qwen2", False, "Q8_0"),
        ("qwen2", True, "BF16"),
    ],
)
def test_logits_are_those_of_transformers(architecture, tied, kind, tmp_path):
    pre = {"llama": "smollm", "qwen2": "qwen2"}[architecture]
    path = gguf_files.write(tmp_path / "tiny.gguf", architecture, tied, kind, pre)
    causal_lm = keras_ebft.models.from_gguf(path)
    assert causal_lm.backbone.token_embedding.tie_weights == tied
    assert causal_lm.backbone.layer_norm_epsilon == 1e-5
    token_ids = token_rows()
    expected = transformers_logits(tmp_path, token_ids, gguf_file=path.name)
    np.testing.assert_allclose(logits(causal_lm, token_ids), expected, atol=2e-4)


@against_transformers
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants(kind, tmp_path):
    shape = gguf_files.INNER, gguf_files.WIDTH
    path = tmp_path / "tiny.gguf"
    packed = gguf_files.k_quantized(kind, shape)
    gguf_files.write(path, packed={"blk.0.ffn_up.weight": (packed, kind)})
    causal_lm = keras_ebft.models.from_gguf(path)
    token_ids = token_rows()
    expected = transformers_logits(tmp_path, token_ids, gguf_file=path.name)
    np.testing.assert_allclose(logits(causal_lm, token_ids), expected, atol=2e-4)


@against_transformers
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_texts_become_the_tokens_of_transformers(pre, tmp_path):
    path = gguf_files.write(tmp_path / "tiny.gguf", pre=pre)
    tokenizer = keras_ebft.models.from_gguf(path).preprocessor.tokenizer
    other = transformers_tokenizer(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        expected = other(text, add_special_tokens=False)["input_ids"]
        assert list(tokenizer(text)) == expected, text
        assert tokenizer.detokenize(expected) == text


@pytest.mark.on_torch
def test_digits_stand_alone_and_lines_end_as_they_were_learned(tied):
    tokenizer = tied.preprocessor.tokenizer
    words = [tokenizer.detokenize([int(i)]) for i in tokenizer("x = 123\n    y")]
    assert words == ["x", " ", "=", " ", "1", "2", "3", "\n   ", " ", "y"]


def test_linear_and_llama3_scaling(tmp_path):
    factors = rotary.llama3_divisors(50000.0, gguf_files.HEAD_DIM, 8.0)
    path = gguf_files.write(
        tmp_path / "a.gguf", tensors={"rope_freqs.weight": factors.astype("float32")}
    )
    backbone = keras_ebft.models.from_gguf(path).backbone
    assert backbone.rope_frequency_adjustment_factor == 8.0
    layer = backbone.transformer_layers[0]._self_attention_layer
    base = 50000.0 ** -(np.arange(0, gguf_files.HEAD_DIM, 2) / gguf_files.HEAD_DIM)
    found = layer.rotary_embedding_layer._get_inverse_freq(gguf_files.HEAD_DIM)
    np.testing.assert_allclose(to_numpy(found), base / factors, rtol=1e-4)
    scaled = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }
    path = gguf_files.write(tmp_path / "b.gguf", settings=scaled)
    backbone = keras_ebft.models.from_gguf(path).backbone
    assert backbone.rope_position_scaling_factor == 4.0


REFUSED = {
    "architecture": ({"architecture": "gemma"}, r"llama or qwen2.*'gemma'"),
    "yarn": ({"settings": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
    "part": ({"settings": {"llama.rope.dimension_count": 16}}, "turns 16"),
    "experts": ({"settings": {"llama.expert_count": 4}}, "4 experts"),
    "heads": ({"settings": {"llama.attention.key_length": 64}}, "heads of 64"),
    "frequencies": (
        {"tensors": {"rope_freqs.weight": np.full(16, 3.0, "float32")}},
        "scaled as Llama 3.1",
    ),
    "others": (
        {"tensors": {"blk.0.attn_q_norm.weight": np.ones(32, "float32")}},
        r"1 other tensors.*attn_q_norm",
    ),
    "splitting": ({"pre": "tekken"}, r"smollm.*'tekken'"),
    "tokenizer": ({"settings": {"tokenizer.ggml.model": "llama"}}, "kind 'llama'"),
    "end": (
        {"settings": {"tokenizer.ggml.eos_token_id": None}},
        "setting 'tokenizer.ggml.eos_token_id'",
    ),
    "setting": (
        {"settings": {"llama.embedding_length": None}},
        "setting 'llama.embedding_length'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case, tmp_path):
    changes, match = REFUSED[case]
    path = gguf_files.write(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(ValueError, match=f"(?s){match}"):
        keras_ebft.models.from_gguf(path)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="Check the path"):
        keras_ebft.models.from_gguf(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_bytes(b"no model at all" * 10)
    with pytest.raises(ValueError, match="Expected a GGUF file"):
        keras_ebft.models.from_gguf(tmp_path / "text.gguf")


def test_the_dtype_and_length_are_the_users(tmp_path):
    path = gguf_files.write(tmp_path / "tiny.gguf")
    causal_lm = keras_ebft.models.from_gguf(path, "mixed_bfloat16", sequence_length=17)
    assert causal_lm.backbone.compute_dtype == "bfloat16"
    assert causal_lm.backbone.variable_dtype == "float32"
    assert causal_lm.preprocessor.sequence_length == 17
    with pytest.raises(ValueError, match="sequence_length"):
        keras_ebft.models.from_gguf(path, sequence_length=1)


# As of every KerasHub model.
@pytest.mark.filterwarnings("ignore:`compile:UserWarning")
@pytest.mark.on_torch
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", ["keras", "preset"])
def test_saved_models_load_again(architecture, layout, tmp_path):
    path = gguf_files.write(tmp_path / "tiny.gguf", architecture)
    causal_lm = keras_ebft.models.from_gguf(path)
    if layout == "keras":
        causal_lm.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    else:
        causal_lm.save_to_preset(str(tmp_path / "preset"))
        loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset"))
    assert type(loaded) is type(causal_lm)
    token_ids = token_rows()
    np.testing.assert_array_equal(
        logits(loaded, token_ids), logits(causal_lm, token_ids)
    )
    first, second = causal_lm.preprocessor.tokenizer, loaded.preprocessor.tokenizer
    assert list(first(CODE)) == list(second(CODE))
    assert first.get_config() == second.get_config()
    assert second.end_token_id == 2
    template = keras_ebft.models.chat_template(loaded)
    assert template(QUESTION).endswith("France?<|im_end|>\n")


def test_a_model_to_be_trained_saves_and_loads(tied, tmp_path):
    model = keras_ebft.EBFTModel(tied, seed=0)
    model.compile(keras.optimizers.SGD(0.01))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    token_ids = token_rows()
    np.testing.assert_array_equal(
        logits(loaded.causal_lm, token_ids), logits(tied, token_ids)
    )


@against_transformers
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_exported_models_are_whole(architecture, tmp_path):
    pre = {"llama": "smollm", "qwen2": "qwen2"}[architecture]
    path = gguf_files.write(tmp_path / "tiny.gguf", architecture, pre=pre)
    causal_lm = keras_ebft.models.from_gguf(path)
    folder = tmp_path / "exported"
    keras_ebft.export_to_hugging_face(causal_lm, folder)
    token_ids = token_rows()
    expected = logits(causal_lm, token_ids)
    found = transformers_logits(folder, token_ids)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    other = transformers_tokenizer(folder)
    assert (other.eos_token, other.eos_token_id) == ("<|im_end|>", 2)
    tokenizer = causal_lm.preprocessor.tokenizer
    for text in TEXTS:
        ids = other(text, add_special_tokens=False)["input_ids"]
        assert ids == list(tokenizer(text)), text
    template = keras_ebft.data.ChatTemplate.from_preset(folder)
    assert template.prompt(QUESTION).endswith("<|im_start|>assistant\n")


@pytest.mark.on_torch
def test_texts_end_at_the_models_own_token(tied):
    preprocessor = tied.preprocessor
    row = to_numpy(preprocessor.generate_preprocess(["x"])["token_ids"])[0]
    assert row[0] == preprocessor.tokenizer("x")[0]
    inputs, _, _ = preprocessor(["x"])
    assert 2 in to_numpy(inputs["token_ids"])[0]
    embedding = tied.backbone.token_embedding.embeddings
    kept = to_numpy(embedding)
    changed = kept.copy()
    # Whatever is written, the end token is likeliest.
    hidden = tied.backbone(preprocessor.generate_preprocess(["x"]))
    changed[2] = 100.0 * to_numpy(hidden)[0, 0]
    embedding.assign(changed)
    tied.compile(sampler="greedy")
    assert tied.generate("x", max_length=20) == "x"
    embedding.assign(kept)


def test_a_model_without_a_template(byte_lm):
    with pytest.raises(ValueError, match="carries a chat template"):
        keras_ebft.models.chat_template(byte_lm)


@pytest.mark.backend_independent
def test_unknown_ways_of_splitting():
    assert splitting.way_of("smollm") == "digits"
    with pytest.raises(ValueError, match="'other'"):
        splitting.way_of("other")


@pytest.mark.backend_independent
class TestCache:
    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def test_a_folder_is_written_once(self, tmp_path):
        calls = []

        def write(folder):
            calls.append(folder)
            (folder / "file").write_text("whole")

        for _ in range(2):
            folder = cache.cached_folder("name", write)
            assert folder == tmp_path / "keras_ebft" / "name"
            assert (folder / "file").read_text() == "whole"
        assert len(calls) == 1
        assert calls[0] != folder

    def test_half_a_folder_is_never_seen(self, tmp_path):
        def fail(folder):
            (folder / "file").write_text("half")
            raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            cache.cached_folder("name", fail)
        assert list((tmp_path / "keras_ebft").iterdir()) == []

    def test_two_at_a_time(self, tmp_path):
        def write(folder):
            (folder / "file").write_text("mine")
            other = tmp_path / "keras_ebft" / "name"
            other.mkdir()
            (other / "file").write_text("the other's")

        folder = cache.cached_folder("name", write)
        assert (folder / "file").read_text() == "the other's"
        assert [path.name for path in folder.parent.iterdir()] == ["name"]

    def test_a_file_of_another_version_is_refused(self, tmp_path, monkeypatch):
        file = tmp_path / "model.gguf"
        file.write_bytes(b"another version")
        monkeypatch.setattr(smollm, "package_file", lambda: file)
        with pytest.raises(ValueError, match="install it again"):
            keras_ebft.models.smollm2()
        assert not (tmp_path / "keras_ebft" / "name").exists()

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setattr(smollm, "PACKAGE", "no-such-package-at-all")
        with pytest.raises(ImportError, match="pip install --no-deps"):
            keras_ebft.models.smollm2()


@pytest.fixture(scope="module")
def causal_lm():
    causal_lm = keras_ebft.models.smollm2(sequence_length=64)
    causal_lm.compile(sampler="greedy")
    return causal_lm


@pytest.mark.slow
@pytest.mark.on_torch
class TestSmolLM2:
    """The real model. It is installed by `make setup`: without it these fail."""

    def test_it_knows_something(self, causal_lm):
        assert causal_lm.count_params() == 134_515_008
        assert causal_lm.backbone.layer_norm_epsilon == 1e-5
        written = causal_lm.generate("The capital of France is", max_length=12)
        assert "Paris" in written

    def test_it_answers_and_stops(self, causal_lm):
        template = keras_ebft.models.chat_template(causal_lm)
        prompt = template.prompt(QUESTION)
        assert prompt.startswith("<|im_start|>system\n")
        x = causal_lm.preprocessor.generate_preprocess([prompt])
        written = causal_lm.generate(prompt, max_length=64, strip_prompt=True)
        assert "Paris" in written
        ids = causal_lm.preprocessor.tokenizer(written)
        assert len(ids) < 64 - to_numpy(x["padding_mask"]).sum()

    @pytest.mark.filterwarnings("ignore")
    def test_it_is_what_transformers_reads(self, causal_lm):
        path = smollm.package_file()
        source = {"gguf_file": path.name}
        tokenizer = transformers_tokenizer(path.parent, **source)
        own = causal_lm.preprocessor.tokenizer
        for text in TEXTS:
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert list(own(text)) == expected, text
        token_ids = np.array([own(CODE)])
        expected = transformers_logits(path.parent, token_ids, **source)
        np.testing.assert_allclose(logits(causal_lm, token_ids), expected, atol=2e-3)

    @pytest.mark.filterwarnings("ignore")
    def test_export_and_back(self, causal_lm, tmp_path):
        exported = tmp_path / "exported"
        keras_ebft.export_to_hugging_face(causal_lm, exported)
        token_ids = np.array([causal_lm.preprocessor.tokenizer(CODE)])
        expected = logits(causal_lm, token_ids)
        found = transformers_logits(exported, token_ids)
        np.testing.assert_allclose(found, expected, atol=2e-3)
        assert transformers_tokenizer(exported).eos_token == "<|im_end|>"
        loaded = keras_hub.models.CausalLM.from_preset(str(exported))
        assert loaded.preprocessor.tokenizer.end_token == "<|im_end|>"
        # KerasHub reads 1e-6 for the epsilon, whatever the folder says.
        assert loaded.backbone.layer_norm_epsilon == 1e-6
        np.testing.assert_allclose(logits(loaded, token_ids), expected, atol=0.3)

    @pytest.mark.filterwarnings("ignore:`compile:UserWarning")
    def test_the_keras_file_is_whole(self, causal_lm, tmp_path):
        causal_lm.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        own = causal_lm.preprocessor.tokenizer
        token_ids = np.array([own(CODE)])
        expected = logits(causal_lm, token_ids)
        np.testing.assert_array_equal(logits(loaded, token_ids), expected)
        assert list(loaded.preprocessor.tokenizer(CODE)) == list(own(CODE))

    def test_it_trains_on_strings(self, causal_lm):
        kept = causal_lm.get_weights()
        model = keras_ebft.EBFTModel(
            causal_lm, keras_ebft.BlockSampler(4, 16, 16, num_samples=2), seed=0
        )
        model.compile(keras.optimizers.SGD(1e-3))
        history = model.fit([CODE], batch_size=1, verbose=0).history
        assert np.isfinite(history["loss"][0])
        assert 0.0 < history["ce_loss"][0] < 6.0
        causal_lm.set_weights(kept)
