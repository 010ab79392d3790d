"""Does the units of a study: trains and measures."""

import gc
import os
import time

import keras
import keras_hub
import numpy as np
import study_measures
import study_plan
import study_tasks
from keras import ops

import keras_ebft
from keras_ebft.networks.adapters import adapted_layers

# Shares of a run's steps, and of its learning rate. The rate is a variable of the
# optimizer: a schedule would be a part of the program, and another rate another one.
PHASES = ((0.6, 1.0), (0.2, 0.3), (0.2, 0.1))
# Where the seeds of the base's training begin, which no run has.
BASE_SEED = 1_000_000


class Workshop:
    """A task's model and documents, held while units of the task are done.

    Args:
        plan: dict, see `study_plan`.
        task: str.
        folder: `pathlib.Path` for weights.
        records: `study_plan.Records`.
    """

    def __init__(self, plan, task, folder, records):
        self.plan, self.name, self.folder, self.records = plan, task, folder, records
        self.task = study_tasks.make_task(plan["tasks"][task])
        self.causal_lm = load(plan["model"], plan["length"], self.task)
        self.tokenizer = self.causal_lm.preprocessor.tokenizer
        self.judge = self.start = self.pretrained = None

    def do(self, unit):
        """Does a unit.

        Returns:
            dict of what the line of the unit holds.
        """
        return getattr(self, f"_{unit[0]}")(*unit[2:])

    # The base.

    def _base(self, index):
        settings = self.plan["base"]
        self._prepare_base_training()
        lines = study_plan.base_lines(self.records, self.name)
        model = self._base_model
        losses = [line["cross_entropy"] for line in lines]
        rate = settings["learning_rate"] * (0.1 if study_plan.stalls(losses) else 1.0)
        model.optimizer.learning_rate = rate
        if index:
            restore(model, self._base_path(index - 1))
        steps, size = settings["steps_each"], settings["batch_size"]
        rows = study_measures.pack(
            self.task.parts["base"], self.tokenizer, self.plan["length"]
        )
        rows = taken(rows, steps, size, BASE_SEED, skipped=index * steps)
        start, wall = time.process_time(), time.monotonic()
        history = model.fit(rows, batch_size=size, shuffle=False, verbose=0)
        seconds = time.process_time() - start
        save(model, self._base_path(index))
        pairs = self.task.parts["validation"][: settings["documents"]]
        written, scores = self._base_answers.write(pairs)
        likelihood = self._base_answers.likelihood("validation", pairs)
        return {
            "steps": (index + 1) * steps,
            "learning_rate": rate,
            "loss": float(history.history["loss"][-1]),
            "cross_entropy": likelihood["cross_entropy"],
            "greedy": float(np.mean(scores)),
            "written": [texts[0] for texts in written[:3]],
            "cpu_seconds": round(seconds, 1),
            "seconds": round(time.monotonic() - wall, 1),
        }

    def _prepare_base_training(self):
        if getattr(self, "_base_model", None) is not None:
            return
        if self.plan["adapters"]:
            self.causal_lm.backbone.enable_lora(self.plan["adapters"])
            draw_adapters(self.causal_lm, BASE_SEED)
        self._base_model = keras_ebft.EBFTModel.sft(self.causal_lm, seed=BASE_SEED)
        self._base_model.compile(make_optimizer(1.0))
        self._base_model.optimizer.build(self._base_model.trainable_variables)
        self._base_answers = study_measures.Answers(
            self.causal_lm, self.task, self.plan["evaluation"]
        )

    def _base_path(self, index):
        return self.folder / f"{self.name}_base_{index}.npz"

    def _open(self):
        """Brings the model to the base, with what every method trains on top of it."""
        if self.judge is not None:
            return
        backbone = self.causal_lm.backbone
        lines = study_plan.base_lines(self.records, self.name)
        if any(method.get("network") for method in self.plan["methods"].values()):
            self.pretrained = load(self.plan["model"], self.plan["length"], self.task)
        self._prepare_base_training()
        if lines:
            best = self._base_path(study_plan.best_base(lines))
            restore(self._base_model, best)
        self._base_model = self._base_answers = None
        if self.plan["adapters"]:
            merge(backbone)
        self.start = [to_numpy(v) for v in self.causal_lm.trainable_variables]
        self._reset(0)
        self.judge = study_measures.Judge(
            self.causal_lm, self.task, self.plan["evaluation"], self.plan["length"]
        )
        # Keeps what the base finds likely, before anything is trained.
        for part in ("validation", "test"):
            self.judge.likelihood(part, self.task.parts[part])

    def _reset(self, seed):
        """The base, with adapters as a seed draws them."""
        for variable, array in zip(self.causal_lm.trainable_variables, self.start):
            variable.assign(array)
        if self.plan["adapters"]:
            draw_adapters(self.causal_lm, seed)

    # What is measured of the base.

    def _start(self, part):
        self._open()
        self._reset(0)
        return {"measured": self.judge(part, whole=True)}

    def _audit(self):
        self._open()
        self._reset(0)
        settings = self.plan["audit"]
        rows = study_measures.pack(
            self.task.parts["train"], self.tokenizer, self.plan["length"]
        )
        rows = study_measures.first(rows, settings["rows"])
        method = next(m for m in self.plan["methods"].values() if m.get("audit"))
        model = self.build({**method, "audit": False}, seed=0)
        audit = keras_ebft.evaluation.RewardAudit(model, seed=0)
        result = audit(rows, batch_size=settings["batch_size"])
        best = result.best
        return {
            "features": {
                key: best[key]
                for key in ("layers", "mode", "pooling")
                if best[key] is not None
            },
            "reward": {"whitening": best["whitening"]},
            "advice": result.advice,
            "correlation": best["advantage"][result.headline]["correlation"],
        }

    def _admission(self):
        return study_plan.admission(self.plan, self.records, self.name)

    # A run, and its measurement.

    def build(self, method, seed):
        """The `EBFTModel` of a method of the plan."""
        options = method.get("options") or {}
        if method["kind"] == "sft":
            return keras_ebft.EBFTModel.sft(self.causal_lm, seed=seed, **options)
        if method["kind"] == "rlvr":
            whole_answers = keras_ebft.BlockSampler(
                anchors="answer_start",
                num_anchors=self._most_documents(),
                rollout_length=self.task.answer_tokens,
                temperature=1.0,
            )
            return keras_ebft.EBFTModel(
                self.causal_lm,
                _changed(whole_answers, method.get("sampler")),
                reward=keras_ebft.VerifierReward(self._verify),
                seed=seed,
                **options,
            )
        recipe = getattr(keras_ebft.recipes, method.get("recipe") or "qa_code")()
        found = self._recommended() if method.get("audit") else {}
        return keras_ebft.EBFTModel(
            self.causal_lm,
            _changed(recipe.sampler, self._blocks(method.get("sampler"))),
            self._features(recipe, method, found.get("features")),
            _reward(recipe, method, found.get("reward")),
            seed=seed,
            **{"ce_weight": recipe.ce_weight, **options},
        )

    def _blocks(self, sampler):
        """Settings of blocks; one for every answer of a row where answers begin."""
        if sampler and sampler.get("anchors") == "answer_start":
            return {"num_anchors": self._most_documents(), **sampler}
        return sampler

    def _recommended(self):
        return self.records.get("audit", self.name)

    def _features(self, recipe, method, recommended):
        network = recipe.feature_network
        settings = {
            "layers": network.layers,
            "mode": network.mode,
            "pooling": network.pooling,
            **(recommended or {}),
            **(method.get("features") or {}),
        }
        if method.get("network") == "pretrained":
            settings["network"] = self.pretrained.backbone
        return keras_ebft.FeatureNetwork(**settings)

    def _most_documents(self):
        rows = self._train_rows()
        return int(rows["segment_ids"].max())

    def _train_rows(self):
        return study_measures.pack(
            self.task.parts["train"], self.tokenizer, self.plan["length"]
        )

    def _verify(self, prompts, completions, targets):
        known = dict(self.task.parts["train"])
        scores = [
            [
                [
                    # A dead block has no prompt.
                    self.task.verify(self._as_asked(prompt, known), text)
                    if prompt
                    else 0.0
                    for prompt, text in zip(asked, sample)
                ]
                for sample in samples
            ]
            for asked, samples in zip(prompts, completions)
        ]
        return np.array(scores)

    def _as_asked(self, prompt, known):
        if prompt not in known:
            raise ValueError(
                "Expected prompts that the tokenizer writes as it reads them. "
                f"Received: {prompt!r}, which is none of the task's."
            )
        return prompt

    def _run(self, method, budget, rate, seed):
        self._open()
        self._reset(seed)
        model = self.build(self.plan["methods"][method], seed)
        model.compile(make_optimizer(rate))
        steps = self.plan["steps"]
        if budget == study_plan.COMPUTE:
            steps = study_plan.equal_compute_steps(
                self.plan, self.records, self.name, method
            )
        size = self.plan["batch_size"]
        rows = taken(self._train_rows(), steps, size, seed)
        start, wall = time.process_time(), time.monotonic()
        history = fit_in_phases(model, rows, steps, size, rate)
        seconds = time.process_time() - start, time.monotonic() - wall
        save(model, self._path(method, budget, rate, seed), with_optimizer=False)
        found = {
            "steps": steps,
            "documents": count_documents(rows),
            "history": history,
            "passes_per_step": study_measures.token_passes(
                model, self.plan["length"], size
            ),
            "cpu_seconds": round(seconds[0], 1),
            "seconds": round(seconds[1], 1),
        }
        if seed in study_plan.screening_seeds(self.plan):
            found["validation"] = self.judge("validation", whole=False)
        # Its slots and its frozen network, which refer to each other.
        del model
        gc.collect()
        return found

    def _test(self, method, budget, rate, seed):
        self._open()
        path = self._path(method, budget, rate, seed)
        if not path.exists():
            raise ValueError(
                f"Expected the weights of a finished run in {path}. Received: none. "
                "Remove the line of the run from the file, to do it again."
            )
        for variable, array in zip(
            self.causal_lm.trainable_variables, read_arrays(path), strict=True
        ):
            variable.assign(array)
        return {"measured": self.judge("test", whole=True)}

    def _path(self, method, budget, rate, seed):
        name = "".join(c if c.isalnum() else "_" for c in method)
        return self.folder / f"{self.name}_{name}_{budget}_{rate:g}_{seed}.npz"

    def tidy(self):
        """Removes weights that nobody needs any more."""
        lines = study_plan.base_lines(self.records, self.name)
        for index in range(len(lines) - 1):
            if index != study_plan.best_base(lines):
                self._base_path(index).unlink(missing_ok=True)
        units = study_plan.finished_states(self.plan, self.records, self.name)
        for _, _, *settings in units:
            self._path(*settings).unlink(missing_ok=True)


def _changed(thing, changes):
    config = {**thing.get_config(), **(changes or {})}
    return type(thing).from_config(config)


def _reward(recipe, method, recommended):
    """The recipe's reward, or another of the plan."""
    given = dict(method.get("reward") or {})
    kind = given.pop("kind", "feature_matching")
    if kind == "characteristic_function":
        return keras_ebft.rewards.CharacteristicFunctionReward(**given)
    if kind != "feature_matching":
        raise ValueError(
            "Expected a reward of kind feature_matching or characteristic_function. "
            f"Received: {kind!r}."
        )
    if recommended:
        # What the audit compared was normalised so.
        recommended = {**recommended, "normalize": "auto"}
    return _changed(recipe.reward, {**(recommended or {}), **given})


def load(settings, length, task):
    """A model of a plan's settings.

    Raises:
        ValueError: for an unknown kind.
    """
    kind = settings["kind"]
    if kind == "smollm2":
        return keras_ebft.models.smollm2(
            dtype=settings.get("dtype"), sequence_length=length
        )
    if kind == "preset":
        return keras_hub.models.CausalLM.from_preset(
            settings["name"], dtype=settings.get("dtype")
        )
    if kind == "tiny":
        return tiny(settings, length, task)
    raise ValueError(
        f"Expected a model of kind smollm2, preset or tiny. Received: {kind!r}."
    )


def tiny(settings, length, task):
    """A small random Llama, for tests of the study itself."""
    texts = [p + a for pairs in task.parts.values() for p, a in pairs]
    tokenizer = keras_ebft.data.train_byte_pair_tokenizer(
        texts, settings.get("vocabulary", 300)
    )
    keras.utils.set_random_seed(0)
    width = settings.get("width", 32)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=settings.get("layers", 2),
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=width,
        intermediate_dim=2 * width,
        rope_max_wavelength=10000,
        tie_word_embeddings=True,
    )
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
        tokenizer, sequence_length=length
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=preprocessor)


def make_optimizer(rate):
    """AdamW as the authors set it; the rate is changed from outside."""
    return keras.optimizers.AdamW(
        rate, beta_1=0.9, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0
    )


def fit_in_phases(model, rows, steps, size, rate):
    """`fit` with a rate that falls twice.

    Returns:
        dict from names of metrics to one value for each phase.
    """
    history, first = {}, 0
    for number, (share, factor) in enumerate(PHASES):
        last = steps if number == len(PHASES) - 1 else first + round(share * steps)
        count = min(last, steps) - first
        if count <= 0:
            continue
        model.optimizer.learning_rate = rate * factor
        part = slice(first * size, (first + count) * size)
        found = model.fit(
            {name: values[part] for name, values in rows.items()},
            batch_size=size,
            shuffle=False,
            verbose=0,
        )
        for name, values in found.history.items():
            history.setdefault(name, []).append(round(float(values[-1]), 5))
        first += count
    return history


def taken(rows, steps, size, seed, skipped=0):
    """Rows of some steps, in an order that a seed decides, again and again."""
    count = len(rows["token_ids"])
    random = np.random.default_rng(seed)
    needed = (skipped + steps) * size
    passes = [random.permutation(count) for _ in range(-(-needed // count))]
    order = np.concatenate(passes)[skipped * size : needed]
    return {name: values[order] for name, values in rows.items()}


def count_documents(rows):
    """Documents of packed rows."""
    return int(rows["segment_ids"].max(axis=1).sum())


def to_numpy(variable):
    """A NumPy array that shares no memory with a variable."""
    return np.array(ops.convert_to_numpy(variable))


def draw_adapters(causal_lm, seed):
    """New adapters: A as Keras draws it, B of zeros."""
    for index, variable in enumerate(causal_lm.trainable_variables):
        zero = variable.path.endswith("lora_kernel_b")
        draw = keras.initializers.HeUniform(seed=seed * 1000 + index)
        variable.assign(np.zeros(variable.shape) if zero else draw(variable.shape))


def merge(backbone):
    """Makes adapters a part of the kernels below them, and new ones of them."""
    for layer in adapted_layers(backbone):
        layer._kernel.assign(to_numpy(layer.kernel))
        layer.lora_kernel_b.assign(np.zeros(layer.lora_kernel_b.shape))


def state_of(model, with_optimizer):
    """Variables that training changes."""
    variables = list(model.causal_lm.trainable_variables)
    if with_optimizer:
        variables += model.optimizer.variables
    return variables


def save(model, path, with_optimizer=True):
    """Writes what training changes, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = [to_numpy(v) for v in state_of(model, with_optimizer)]
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        np.savez(file, *arrays)
    os.replace(partial, path)


def read_arrays(path):
    """Arrays that `save` wrote, in order."""
    with np.load(path) as file:
        return [file[f"arr_{index}"] for index in range(len(file.files))]


def restore(model, path):
    """Assigns what `save` wrote, but for the learning rate."""
    rate = float(model.optimizer.learning_rate)
    for variable, array in zip(state_of(model, True), read_arrays(path), strict=True):
        variable.assign(array)
    model.optimizer.learning_rate = rate
