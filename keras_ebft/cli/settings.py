"""What a run may say, checked by name and type before anything is loaded."""

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

import keras_ebft
from keras_ebft import recipes

RECIPES = ("qa_code", "unstructured_code", "translation")
REWARDS = {
    "feature_matching": keras_ebft.FeatureMatchingReward,
    "characteristic_function": keras_ebft.CharacteristicFunctionReward,
}
# What a section is called by if it is written as one word.
MAIN_KEYS = {
    "model": "preset",
    "recipe": "name",
    "optimizer": "name",
    "reward": "name",
}
PARTS = ("causal_lm", "sampler", "feature_network", "reward", "critic", "seed")


class Section(pydantic.BaseModel):
    """Part of a run's settings: known names only, and no value turned into another."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    def given(self, *left_out: str) -> dict[str, Any]:
        """What was written, without some names, as a dict."""
        return self.model_dump(exclude_unset=True, exclude=set(left_out))


def _section(
    title: str, /, *kinds: Any, without: Iterable[str] = (), **fields: Any
) -> Any:
    """A section whose keys are the arguments of constructors, which check values."""
    for kind in kinds:
        for parameter in inspect.signature(kind).parameters.values():
            is_setting = parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            )
            if is_setting and parameter.name not in without:
                fields.setdefault(parameter.name, (Any, None))
    return pydantic.create_model(title, __base__=Section, **fields)


class ModelSection(Section):
    """The language model that is tuned."""

    preset: str
    dtype: str | None = None
    sequence_length: int | None = None
    lora_rank: int | None = None
    lora_layers: list[str] | None = None


class SourceSection(Section):
    """Where documents are: a `path`, or the `name` of a data set."""

    path: str | None = None
    name: str | None = None
    split: str | None = None
    config: str | None = None
    data_dir: str | None = None
    pattern: str | None = None
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None


PackSection = _section(
    "pack",
    keras_ebft.data.pack,
    without=("documents", "tokenizer", "shard", "window_rows"),
    length=(int, ...),
)


class DataSection(Section):
    """What is trained on, and what is held out."""

    train: SourceSection
    validation: SourceSection | None = None
    validation_split: float = 0.0
    pack: PackSection | None = None


class TrainingSection(Section):
    """How long, and how."""

    batch_size: int | None = None
    epochs: int | None = None
    schedule_epochs: int | None = None
    steps_per_epoch: int | None = None
    shuffle: bool = True
    seed: int | None = None
    save_freq: int | Literal["epoch"] = "epoch"
    progress: Literal["short", "full"] = "short"
    verbose: int | Literal["auto"] = "auto"
    compilation_cache: bool = True


RecipeSection = _section(
    "recipe", recipes.qa_code, without=("base",), name=(Literal[RECIPES], ...)
)
SamplerSection = _section("sampler", keras_ebft.BlockSampler)
FeatureSection = _section("feature_network", keras_ebft.FeatureNetwork)
RewardSection = _section(
    "reward", *REWARDS.values(), name=(Literal[tuple(REWARDS)], "feature_matching")
)
ObjectiveSection = _section("objective", keras_ebft.EBFTModel, without=PARTS)
CompileSection = _section(
    "compile", keras_ebft.EBFTModel.compile, without=("self", "optimizer")
)


class OptimizerSection(Section):
    """An optimizer of Keras, whose own arguments are looked up."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)
    name: str = "AdamW"


class CallbackSection(Section):
    """A callback of Keras or of this library, whose own arguments are looked up."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)
    name: str


class RunSettings(Section):
    """All that a run is made of; `docs/command_line.md` says it in words."""

    model: ModelSection
    data: DataSection
    output: str
    recipe: RecipeSection | None = None
    sampler: SamplerSection = SamplerSection()
    feature_network: FeatureSection = FeatureSection()
    reward: RewardSection = RewardSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    compile: CompileSection = CompileSection()
    training: TrainingSection = TrainingSection()
    callbacks: list[CallbackSection] = []


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a file, with some replaced, as they are written.

    Args:
        path: a YAML file.
        overrides: list of `"section.key=value"`, values as in YAML.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file, or an override, is not to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected an existing file of settings. Received: '{path}'. Check the "
            "path."
        )
    settings = _parse(path.read_text("utf-8"), f"'{path}'")
    if not isinstance(settings, dict):
        raise ValueError(
            f"Expected sections such as 'model:' in '{path}'. Received: "
            f"{str(settings)[:40]!r}. See docs/command_line.md."
        )
    _spell_out(settings)
    for override in overrides:
        _replace(settings, override)
    _spell_out(settings)
    return settings


def check_settings(settings: dict[str, Any]) -> RunSettings:
    """Settings as `RunSettings`.

    Raises:
        ValueError: for names that are unknown, values of a wrong type, and what is
            missing; all of them, with what is known in their place.
    """
    try:
        return RunSettings(**settings)
    except pydantic.ValidationError as error:
        problems = [_explained(problem) for problem in error.errors()]
        raise ValueError("\n       ".join(problems)) from None


def _spell_out(settings: dict[str, Any]) -> None:
    """What is short for a section as one; a section without content is none."""
    for name, key in MAIN_KEYS.items():
        if isinstance(settings.get(name), str):
            settings[name] = {key: settings[name]}
    data = settings.get("data")
    for name in ("train", "validation"):
        if isinstance(data, dict) and isinstance(data.get(name), str):
            data[name] = {"path": data[name]}
    for name in [name for name, value in settings.items() if value is None]:
        del settings[name]


def _replace(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not all((*sections, last)):
        raise ValueError(
            "Expected settings as section.key=value. Received: "
            f"{override!r}. Write for example optimizer.learning_rate=1e-4."
        )
    place = settings
    for name in sections:
        place[name] = {} if place.get(name) is None else place[name]
        place = place[name]
        if not isinstance(place, dict):
            raise ValueError(
                f"Expected {key!r} to name a setting within a section. Received: "
                f"{override!r}, where {name!r} is {place!r}. Give all of it at once, "
                f"in YAML: {name}=..."
            )
    place[last] = _parse(value, repr(override))


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of everyone else: `1e-4` is one."""


_Loader.yaml_implicit_resolvers = {
    first: list(found)
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"Expected YAML. Received: {where}; {error}") from error


def _explained(problem: Any) -> str:
    """One problem that was found, in words."""
    # Steps into unions of types are no names that anyone wrote.
    place = [str(part) for part in problem["loc"]]
    *sections, name = place
    where = f"`{'.'.join(sections)}`" if sections else "a run's settings"
    if problem["type"] == "extra_forbidden":
        return unknown_key(name, _known(sections), where)
    if problem["type"] == "missing":
        return f"Expected `{name}` in {where}. Received: none. Add it."
    received = f"{problem['input']!r} (of type {type(problem['input']).__name__})"
    wanted = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"Expected `{'.'.join(place)}` to be {wanted}. Received: {received}."


def unknown_key(name: str, known: Sequence[str], where: str) -> str:
    """The message for a key that nobody knows.

    Args:
        name: str, the key.
        known: list of str, those that are known.
        where: str, the section.
    """
    spelled = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1)
    remedy = f"Did you mean {spelled[close[0]]!r}?" if close else "Leave it out."
    return f"Expected in {where} only {', '.join(known)}. Received: {name!r}. {remedy}"


def _known(sections: Sequence[str]) -> list[str]:
    kind: Any = RunSettings
    for name in sections:
        kind = _section_within(kind.model_fields[name].annotation)
    return list(kind.model_fields)


def _section_within(annotation: Any) -> Any:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next(c for c in candidates if hasattr(c, "model_fields"))
