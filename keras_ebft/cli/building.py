"""From settings to objects: the parts, the model, the optimizer, the callbacks."""

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np

import keras_ebft
from keras_ebft import callbacks, models, recipes
from keras_ebft.cli.settings import (
    REWARDS,
    ModelSection,
    RunSettings,
    Section,
    unknown_key,
)

# What `compile` takes by default, in words of the optimizer.
ADAMW = {
    "learning_rate": 1e-6,
    "beta_2": 0.95,
    "weight_decay": 0.0,
    "global_clipnorm": 1.0,
}


def make_recipe(settings: RunSettings) -> recipes.Recipe | None:
    """The recipe of a run, or `None`."""
    if settings.recipe is None:
        return None
    make = getattr(recipes, settings.recipe.name)
    return make(**settings.recipe.given("name"))


def make_parts(settings: RunSettings) -> dict[str, Any]:
    """Sampler, feature network and reward, by the names `EBFTModel` gives them.

    The recipe's, with what the settings replace; the network is still a name.

    Raises:
        TypeError, ValueError: for values that the parts refuse.
    """
    recipe = make_recipe(settings)
    base = {} if recipe is None else recipe.options
    sampler = _replaced(keras_ebft.BlockSampler, base.get("sampler"), settings.sampler)
    features = settings.feature_network.given("network")
    own = base.get("feature_network")
    config = {} if own is None else own.get_config()
    if "mode" in features and "layers" not in features:
        # A mode that taps its own layers takes none.
        config.pop("layers", None)
    feature_network = keras_ebft.FeatureNetwork.from_config({**config, **features})
    kind = REWARDS[settings.reward.name]
    own = base.get("reward") if settings.reward.name == "feature_matching" else None
    reward = _replaced(kind, own, settings.reward)
    return {"sampler": sampler, "feature_network": feature_network, "reward": reward}


def _replaced(kind: Any, base: Any, section: Section) -> Any:
    config = {} if base is None else base.get_config()
    given = section.given("name")
    check_arguments(kind.__name__, kind, given)
    return kind.from_config({**config, **given})


def resolved(settings: RunSettings) -> dict[str, Any]:
    """Settings with everything said that a recipe or a default decides.

    Returns:
        dict that YAML can hold, which means the same run wherever it is read.
    """
    recipe, parts = make_recipe(settings), make_parts(settings)
    said = settings.model_dump(exclude_unset=True)
    for name, part in parts.items():
        said[name] = {**said.get(name, {}), **_without_network(part.get_config())}
    said["reward"]["name"] = settings.reward.name
    objective = {} if recipe is None else recipe.options
    kept = {n: v for n, v in objective.items() if n not in parts}
    said["objective"] = {**kept, **settings.objective.given()}
    training = settings.training.model_dump()
    batch_size, epochs = (
        (16, 1) if recipe is None else (recipe.batch_size, recipe.passes)
    )
    seed = int(np.random.randint(2**31 - 3))
    for name, value in {
        "batch_size": batch_size,
        "epochs": epochs,
        "schedule_epochs": training["epochs"] or epochs,
        "seed": seed,
    }.items():
        training[name] = value if training[name] is None else training[name]
    said["training"] = training
    if recipe is not None and "pack" not in settings.data.model_fields_set:
        said["data"]["pack"] = {"length": recipe.length}
    said["optimizer"] = {"name": settings.optimizer.name, **_of_optimizer(settings)}
    # Raises now for what is unknown.
    make_callbacks(settings)
    return json.loads(json.dumps(said))


def _without_network(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "network"}


def load_model(section: ModelSection) -> keras_hub.models.CausalLM:
    """The language model of a run, with adapters if it is to have some.

    Raises:
        FileNotFoundError, ImportError, ValueError: if it cannot be loaded so.
    """
    causal_lm = _load(section)
    if section.lora_rank is not None:
        options = {}
        if section.lora_layers is not None:
            options["target_layer_names"] = section.lora_layers
        causal_lm.backbone.enable_lora(section.lora_rank, **options)
    elif section.lora_layers is not None:
        raise ValueError(
            "Expected `model.lora_rank` with `model.lora_layers`. Received: layers "
            "alone. Give the rank too."
        )
    return causal_lm


def _load(section: ModelSection) -> keras_hub.models.CausalLM:
    preset = section.preset
    options = section.given("preset", "lora_rank", "lora_layers")
    if preset == "smollm2":
        return models.smollm2(**options)
    if preset.endswith(".gguf"):
        return models.from_gguf(preset, **options)
    length = options.pop("sequence_length", None)
    if preset.endswith(".keras"):
        causal_lm = _load_keras(preset, options)
    else:
        causal_lm = keras_hub.models.CausalLM.from_preset(preset, **options)
    if causal_lm.preprocessor is None:
        raise ValueError(
            "Expected a model with a preprocessor, which reads texts. Received: "
            f"{preset!r}, which has none. Save it with one."
        )
    if length is not None:
        causal_lm.preprocessor.sequence_length = length
    return causal_lm


def _load_keras(preset: str, options: dict[str, Any]) -> keras_hub.models.CausalLM:
    if options:
        raise ValueError(
            "Expected no `model.dtype` with a saved model, which has its own. "
            f"Received: {options}. Leave it out."
        )
    if not Path(preset).is_file():
        raise FileNotFoundError(
            f"Expected an existing file as `model.preset`. Received: {preset!r}. Check "
            "the path."
        )
    model = keras.saving.load_model(preset)
    causal_lm = getattr(model, "causal_lm", model)
    if not isinstance(causal_lm, keras_hub.models.CausalLM):
        raise ValueError(
            "Expected an EBFTModel or a CausalLM in the saved file. Received: "
            f"{preset!r}, a {type(model).__name__}."
        )
    return causal_lm


def build(settings: RunSettings) -> keras_ebft.EBFTModel:
    """The model of a run, not compiled.

    Args:
        settings: resolved `RunSettings`.
    """
    keras.utils.set_random_seed(settings.training.seed)
    parts = make_parts(settings)
    causal_lm = load_model(settings.model)
    network = settings.feature_network.given().get("network")
    if network is not None:
        # Its variables need paths of their own.
        with keras.name_scope("feature_network"):
            base = _load(ModelSection(preset=network))
        config = parts["feature_network"].get_config()
        parts["feature_network"] = keras_ebft.FeatureNetwork.from_config(
            {**config, "network": base.backbone}
        )
    return keras_ebft.EBFTModel(
        causal_lm, **parts, **settings.objective.given(), seed=settings.training.seed
    )


def compile_model(
    model: keras_ebft.EBFTModel, settings: RunSettings, rows: int
) -> None:
    """Compiles a model as its settings say.

    Args:
        model: `EBFTModel`.
        settings: resolved `RunSettings`.
        rows: int, rows of training data, which a recipe's warm-up follows from.
    """
    training = settings.training
    steps = training.steps_per_epoch or -(-rows // training.batch_size)
    # Files of earlier versions do not say it.
    planned = training.schedule_epochs or training.epochs
    optimizer = make_optimizer(settings, steps * planned)
    model.compile(optimizer, **settings.compile.given())


def make_optimizer(settings: RunSettings, steps: int) -> keras.optimizers.Optimizer:
    """The optimizer of a run.

    Args:
        settings: resolved `RunSettings`.
        steps: int, updates that a recipe's schedule is planned for.
    """
    config, recipe = _of_optimizer(settings), make_recipe(settings)
    if recipe is not None:
        # Its warm-up, whichever optimizer.
        warm = recipe.optimizer(steps, config["learning_rate"]).get_config()
        rate = keras.saving.deserialize_keras_object(warm["learning_rate"])
        config["learning_rate"] = rate
    return _optimizer_kind(settings)(**config)


def _of_optimizer(settings: RunSettings) -> dict[str, Any]:
    """The arguments of the optimizer, those of the authors where none are given."""
    kind, given = _optimizer_kind(settings), settings.optimizer.given("name")
    names = ADAMW if kind is keras.optimizers.AdamW else ("learning_rate",)
    return {**{name: ADAMW[name] for name in names}, **given}


def _optimizer_kind(settings: RunSettings) -> type[keras.optimizers.Optimizer]:
    base = keras.optimizers.Optimizer
    kind = _named(settings.optimizer.name, (keras.optimizers,), base, "optimizer.name")
    given = settings.optimizer.given("name")
    check_arguments("optimizer", kind, given)
    return kind


def make_callbacks(settings: RunSettings) -> list[keras.callbacks.Callback]:
    """The callbacks that the settings name.

    Raises:
        ValueError: for names or arguments that are unknown.
    """
    made = []
    for index, section in enumerate(settings.callbacks):
        where = f"callbacks.{index}"
        kind = _named(
            section.name,
            (callbacks, keras.callbacks),
            keras.callbacks.Callback,
            f"{where}.name",
        )
        given = section.given("name")
        check_arguments(where, kind, given)
        made.append(kind(**given))
    return made


def _named(name: str, modules: Iterable[Any], base: type, where: str) -> Any:
    """A class by its name, however that is capitalised."""
    kinds = {
        key.lower(): kind
        for module in modules
        for key, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, base) and kind is not base
    }
    if name.lower() not in kinds:
        known = sorted(kind.__name__ for kind in kinds.values())
        raise ValueError(unknown_key(name, known, f"`{where}`"))
    return kinds[name.lower()]


def check_arguments(section: str, kind: Any, given: Iterable[str]) -> None:
    """Raises a `ValueError` for arguments that a constructor does not have."""
    left_out = ("kwargs", "name")
    known = [n for n in inspect.signature(kind).parameters if n not in left_out]
    for name in given:
        if name not in known:
            raise ValueError(unknown_key(name, known, f"`{section}`"))
