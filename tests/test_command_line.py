"""Runs from a file and a shell, in a folder that resumes and repeats them."""

import json
import logging
import re
import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from helpers import byte_causal_lm, set_random_seed

import keras_ebft

yaml = pytest.importorskip("yaml")
pytest.importorskip("pydantic")

from keras_ebft.cli import building, commands, main, runs, settings  # noqa: E402

# It passes values on.
pytestmark = pytest.mark.on_torch

ROOT = Path(__file__).parent.parent
PAIRS = [{"question": f"ab {n}?", "answer": f"cd{n} ab{n} ef"} for n in range(10)]


@pytest.fixture(scope="module", autouse=True)
def logging_as_before():
    """The command shows what the library logs."""
    logger = logging.getLogger("keras_ebft")
    before = logger.level, list(logger.handlers)
    yield
    logger.setLevel(before[0])
    logger.handlers[:] = before[1]


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """Folder of a tiny model that reads bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    set_random_seed(3)
    byte_causal_lm().save_to_preset(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of records."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in PAIRS))
    return str(path)


@pytest.fixture(scope="module")
def whole(preset, pairs, tmp_path_factory):
    """The output folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("runs")
    run = {**settings_of(preset, pairs), "output": str(folder / "whole")}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder / "whole"


@pytest.fixture
def write(tmp_path, monkeypatch, preset, pairs):
    """Function that writes `run.yaml` with changes, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        run = {**settings_of(preset, pairs), **changes}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        return "run.yaml"

    return write


def settings_of(preset, path):
    templates = {"prompt": "{question}", "answer": "{answer}"}
    return {
        "model": {"preset": preset},
        "data": {"train": {"path": path, **templates}, "validation_split": 0.2},
        "sampler": {
            "rollout_length": 2,
            "stride": 6,
            "context_length": 4,
            "num_samples": 2,
        },
        "feature_network": {"layers": [1]},
        "optimizer": {"name": "sgd", "learning_rate": 0.5},
        "training": {"batch_size": 4, "epochs": 2, "seed": 1, "verbose": 0},
        "output": "out",
    }


def weights(folder="out"):
    return keras_hub.models.CausalLM.from_preset(f"{folder}/preset").get_weights()


def is_same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def history(folder="out"):
    return json.loads(Path(folder, "history.json").read_text())


class Killed(keras.callbacks.Callback):
    """Ends the process, as far as a test can."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


def test_a_run_that_was_killed_goes_on(whole, tmp_path, monkeypatch, capsys, caplog):
    """As the uninterrupted one went, whose resolved settings it repeats."""
    monkeypatch.chdir(tmp_path)
    run = ["train", str(whole / "run.yaml"), "output=out"]
    assert history(whole)["epoch"] == [1.0, 2.0]
    assert np.isfinite(history(whole)["val_feature_matching_loss"]).all()
    with monkeypatch.context() as patch:
        patch.setattr(building, "make_callbacks", lambda settings: [Killed(1)])
        assert main(run) == 130
    assert "The same command" in capsys.readouterr().err
    assert history()["epoch"] == [1.0]
    assert main(["generate", "out", "ab"]) == 1
    assert "has not ended" in capsys.readouterr().err
    assert main(run) == 0
    assert history() == history(whole)
    assert is_same(weights(), weights(whole))
    # Nothing is left to do; with more epochs there is.
    stamp = Path("out/latest.weights.h5").stat().st_mtime_ns
    caplog.clear()
    assert main(run) == 0
    assert "has finished its 2 epochs" in caplog.text
    assert Path("out/latest.weights.h5").stat().st_mtime_ns == stamp
    assert main([*run, "training.epochs=3"]) == 0
    assert history()["epoch"] == [1.0, 2.0, 3.0]
    versions = json.loads(Path("out/versions.json").read_text())
    assert versions["keras"] == keras.__version__
    assert versions["backend"] == keras.backend.backend()


def test_another_run_does_not_resume(write, capsys):
    folder = runs.RunFolder("out")
    commands.claimed(folder, checked(write()))
    folder.checkpoint.touch()
    assert main(["train", write(), "optimizer.learning_rate=0.1"]) == 1
    message = capsys.readouterr().err
    assert "another: optimizer.learning_rate=0.1 in place of 0.5. Start" in message
    assert folder.read_settings().optimizer.learning_rate == 0.5


def test_a_run_that_never_trained_may_be_another(write, capsys):
    """As after a mistake in the file, which is mended and started again."""
    assert main(["train", write(), "data.train.path=missing.jsonl"]) == 1
    assert "missing.jsonl" in capsys.readouterr().err
    folder = runs.RunFolder("out")
    assert folder.read_settings().data.train.path == "missing.jsonl"
    settled = commands.claimed(folder, checked(write(), "optimizer.learning_rate=0.1"))
    assert folder.read_settings().optimizer == settled.optimizer
    assert settled.optimizer.learning_rate == 0.1


def test_more_epochs_keep_the_schedule(write):
    """A recipe's rate rises over a share of the epochs that were planned."""
    of_recipe = ("recipe.name=qa_code", "training.epochs=50", "training.seed=null")
    folder = runs.RunFolder("out")

    class Compiled:
        def compile(self, optimizer, **options):
            self.schedule = optimizer.get_config()["learning_rate"]["config"]

    def rates(said):
        model = Compiled()
        building.compile_model(model, said, rows=4 * said.training.batch_size)
        return model.schedule

    first = commands.claimed(folder, checked(write(), *of_recipe))
    folder.checkpoint.touch()
    more = (*of_recipe, "training.epochs=100")
    for overrides in (more, more, (*of_recipe, "training.epochs=150")):
        grown = commands.claimed(folder, checked(write(), *overrides))
        assert rates(grown) == rates(first)
        assert grown.training.seed == first.training.seed
    assert grown.training.epochs == 150
    assert rates(first)["decay_steps"] == 4 * 50
    # As files of earlier versions are read.
    grown.training.schedule_epochs = None
    assert rates(grown)["decay_steps"] == 4 * 150
    anew = checked(write(), *more, "training.schedule_epochs=100")
    with pytest.raises(ValueError, match="schedule_epochs=100 in place of 50"):
        commands.claimed(folder, anew)


def checked(file, *overrides):
    return settings.check_settings(settings.read_settings(file, overrides))


def test_evaluate_and_generate_use_the_trained_model(
    whole, capsys, monkeypatch, tmp_path
):
    assert main(["evaluate", str(whole)]) == 0
    measured = json.loads(capsys.readouterr().out)
    last = {n: v[-1] for n, v in history(whole).items() if n.startswith("val_")}
    assert {f"val_{n}": v for n, v in measured.items()} == pytest.approx(last)
    other = tmp_path / "other.txt"
    other.write_text("ab cd ef gh ij")
    assert main(["evaluate", str(whole), f"data.validation.path={other}"]) == 1
    assert "Received: both" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", iter(["ab\n", "cd\n"]))
    assert main(["generate", str(whole), "--max-length", "8"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    causal_lm = keras_hub.models.CausalLM.from_preset(str(whole / "preset"))
    written = keras_ebft.evaluation.TextGenerator(causal_lm, 8)(["ab", "cd"])
    wanted = [{"prompt": p, "completion": w[0]} for p, w in zip(("ab", "cd"), written)]
    assert lines == wanted


def yaml_of(page):
    (block,) = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S
    )
    return block


def test_a_page_about_runs(whole, write, tmp_path, capsys):
    pytest.importorskip("jinja2")
    lines = tmp_path / "written.jsonl"
    callback = {"name": "Completions", "documents": ["ab 1?cd1 ab1 ef"]}
    callback |= {"every": 1, "path": str(lines), "show": False}
    other = write(callbacks=[callback], output=str(tmp_path / "other"))
    assert main(["train", str(other)]) == 0
    assert lines.is_file()
    page = tmp_path / "page.html"
    capsys.readouterr()
    folders = [str(whole), str(tmp_path / "other")]
    assert main(["report", *folders, "--output", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text("utf-8")
    assert "whole" in text and "other" in text
    # What the rollouts stand beside.
    assert "ab1 ef" in text or "cd1" in text
    assert main(["report", str(tmp_path)]) == 1
    assert "no epoch of a run has ended" in " ".join(capsys.readouterr().err.split())


def test_the_file_of_the_docs_runs(tmp_path, monkeypatch, preset):
    """With a smaller model and fewer steps."""
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    Path("run.yaml").write_text(yaml_of("command_line.md"))
    smaller = [
        f"model.preset={preset}",
        "model.sequence_length=32",
        "model.lora_rank=2",
    ]
    smaller += ["data.pack.length=40", "training.epochs=1", "training.verbose=0"]
    assert main(["train", "run.yaml", *smaller, "feature_network.layers=[1.0]"]) == 0
    assert len(history("runs/first")["val_ce_loss"]) == 1
    said = yaml.safe_load(Path("runs/first/run.yaml").read_text())
    assert said["optimizer"]["learning_rate"] == 1e-4
    assert (said["sampler"]["num_samples"], said["sampler"]["temperature"]) == (2, 0.6)
    assert said["objective"]["ce_weight"] == 0.1
    before = keras_hub.models.CausalLM.from_preset(preset).get_weights()
    assert not is_same(weights("runs/first"), before)


def test_overrides_and_recipes_decide_together(write):
    run = write(recipe="translation", sampler={"stride": 3}, feature_network={})
    said = building.resolved(
        checked(run, "recipe.ce_weight=1e-2", "reward.whitening=null")
    )
    assert said["sampler"]["stride"] == 3
    assert said["sampler"]["rollout_length"] == 4
    assert said["feature_network"]["pooling"] == "mean"
    assert said["objective"]["ce_weight"] == 0.01
    assert said["reward"]["whitening"] is None
    assert said["data"]["pack"] == {"length": 1024}
    assert building.resolved(settings.check_settings(said)) == said
    own = checked(run, "feature_network.mode=middle", "data.pack=null")
    assert building.make_parts(own)["feature_network"].mode == "middle"
    assert building.resolved(own)["data"]["pack"] is None
    optimizer = building.make_optimizer(checked(run, "optimizer=adamw"), 200)
    config = optimizer.get_config()
    assert config["learning_rate"]["config"]["warmup_steps"] == 6
    assert config["global_clipnorm"] == 1.0
    plain = building.make_optimizer(checked(write()), 200)
    assert isinstance(plain, keras.optimizers.SGD)
    assert float(plain.learning_rate) == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.strid=3", r"`sampler` only .*'strid'\. Did you mean 'stride'\?"),
        ("sampel.stride=3", r"a run's settings only .*'sampel'.*'sampler'\?"),
        ("data.train.file=a", r"`data\.train` only path, .*'file'"),
        ("objective.seed=3", r"`objective` only advantage.*'seed'"),
        ("optimizer.rate=1", r"`optimizer` only learning_rate.*'rate'"),
        ("optimizer=adamv", r"`optimizer\.name` only .*'adamv'.*'Adam'"),
        ("callbacks=[{name: Stop}]", r"`callbacks\.0\.name` only .*EarlyStopping"),
        ("callbacks=[{name: earlystopping, wait: 1}]", r"`callbacks\.0` only monitor"),
        ("recipe=qa", r"`recipe\.name` to be 'qa_code', .*Received: 'qa'"),
        ("reward.num_frequencies=3", r"'num_frequencies'"),
        ("training.epochs=two", r"`training\.epochs` to be .*integer.*'two'"),
        ("training.epochs=true", r"`training\.epochs` to be .*integer.*True"),
        ("sampler.stride=0", r"`stride` to be at least 1"),
        ("data.train.split=train", "no split in `data.train` with a file"),
        ("data.train.name=alma", "either `path` or `name`"),
        ("data.train.path=nothing.csv", r"existing file or folder.*nothing\.csv"),
        ("model=missing.keras", r"`model\.preset`.*missing\.keras"),
        ("model.lora_layers=[query]", r"`model\.lora_rank`"),
        ("training.epochs", r"section\.key=value"),
        ("output.name=a", "name a setting within a section.*'out'"),
        ("sampler=[1", "Expected YAML"),
    ],
)
def test_what_is_wrong_is_refused_by_name(write, capsys, override, message):
    assert main(["train", write(), override]) == 1
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    with pytest.raises((ValueError, OSError), match=message):
        main(["--traceback", "train", "run.yaml", override])


def test_what_is_missing_is_said_all_at_once(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: {}\ndata: {train: a.csv, valid: b}\n")
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    printed = capsys.readouterr().err
    for part in ("`preset` in `model`", "'valid'", "`output` in a run's settings"):
        assert part in printed
    assert main(["train", str(tmp_path / "no.yaml")]) == 1
    assert "existing file of settings" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "no")]) == 1
    assert "output folder of a run" in capsys.readouterr().err


def test_models_come_from_saved_files_and_features_from_others(write, preset, tmp_path):
    causal_lm = keras_hub.models.CausalLM.from_preset(preset)
    sampler = keras_ebft.BlockSampler(rollout_length=2, stride=6, context_length=4)
    network = keras_ebft.FeatureNetwork(layers=(1,))
    path = str(tmp_path / "saved.keras")
    keras_ebft.EBFTModel(causal_lm, sampler, network, seed=0).save(path)
    own = checked(write(), f"model={path}", f"feature_network.network={preset}")
    model = building.build(settings.check_settings(building.resolved(own)))
    assert is_same(model.causal_lm.get_weights(), causal_lm.get_weights())
    assert model.feature_network.network is not None
    with pytest.raises(ValueError, match=r"no `model\.dtype`"):
        building.load_model(settings.ModelSection(preset=path, dtype="float16"))


def test_without_the_packages_the_extra_is_named(monkeypatch, capsys):
    for name in ("yaml", "pydantic"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert main(["train", "run.yaml"]) == 1
        message = capsys.readouterr().err
        assert name in message
        assert 'pip install "keras_ebft[cli]"' in message
