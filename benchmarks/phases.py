"""The phases of one training step, each as a function that can be run alone."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_ebft.backend.runtime import no_gradient
from keras_ebft.layout.documents import read_documents
from keras_ebft.training.batches import as_batch

PHASES = ("prefill", "rollout", "features", "rewards", "policy", "optimizer", "step")


def make_phase(name, model, token_ids):
    """A function without arguments that runs one phase and waits for it.

    Inputs of a phase are made once, outside of it. `policy` is the reading of
    documents, the scores of rollouts and the gradient of the loss; `step` is all
    of a training step, through the model's own `train_on_batch` path.
    """
    if name == "step":
        x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids, bool)}
        return _through_keras(model, x)
    if name == "optimizer":
        return _optimizer(model)
    phases = _Phases(model, token_ids)
    if name == "policy":
        return _gradient(phases.policy_loss, model, phases.rollouts())
    return getattr(phases, name)()


class _Phases:
    def __init__(self, model, token_ids):
        self.model = model
        self.step = model._step
        mask = np.ones(token_ids.shape, bool)
        self.documents = read_documents(
            as_batch({"token_ids": token_ids, "padding_mask": mask})
        )
        self.blocks = self.step.blocks(self.documents)
        samples, length = model.sampler.num_samples, model.sampler.rollout_length
        shape = (token_ids.shape[0], samples, self.blocks.anchors.shape[0], length)
        generator = np.random.default_rng(1)
        self.uniform = ops.convert_to_tensor(generator.random(shape, dtype="float32"))
        self.advantage = ops.convert_to_tensor(
            generator.normal(size=shape[:3]).astype("float32")
        )
        self.vocabulary_size = model.causal_lm.backbone.vocabulary_size
        self.shape = shape

    def rollouts(self):
        """Random token ids `[B, n, K, G]`: their values cost nothing."""
        generator = np.random.default_rng(2)
        tokens = generator.integers(0, self.vocabulary_size, self.shape)
        return ops.convert_to_tensor(tokens.astype("int32"))

    def _compiled(self, function, *tensors):
        run = compiled(function, self.model)
        return lambda: wait(run(*tensors))

    def _read(self, token_ids):
        documents = self.documents._replace(token_ids=token_ids)
        return self.step.read(documents)

    def prefill(self):
        return self._compiled(self._read, self.documents.token_ids)

    def rollout(self):
        state = compiled(self._read, self.model)(self.documents.token_ids)

        def sample(state, uniform):
            numbers = uniform, None
            return self.step.sample(self.documents, state, numbers).token_ids

        return self._compiled(sample, state, self.uniform)

    def _features(self, token_ids, rollout_ids):
        documents = self.documents._replace(token_ids=token_ids)
        rollouts = self.step.replayed(documents, rollout_ids)
        frozen = self.step.read_frozen(rollouts, with_reference=False)
        return frozen.generated, frozen.target

    def features(self):
        tokens = self.documents.token_ids
        return self._compiled(self._features, tokens, self.rollouts())

    def rewards(self):
        found = compiled(self._features, self.model)(
            self.documents.token_ids, self.rollouts()
        )

        def reward(generated, target):
            judged = self.step.reward.judge(
                generated, target, None, self.step.advantage
            )
            return judged["advantage"]

        return self._compiled(reward, *found)

    def policy_loss(self, rollout_ids):
        rollouts = self.step.replayed(self.documents, rollout_ids)
        state = self.step.read(self.documents)
        scores = self.step.score_rollouts(state, rollouts)
        return -ops.mean(scores.log_prob * self.advantage[..., None])


def _through_keras(model, x):
    model.make_train_function()
    return lambda: model.train_on_batch(x)


def _optimizer(model):
    model.optimizer.build(model.trainable_variables)
    gradients = [
        ops.ones(variable.shape, dtype=variable.dtype)
        for variable in model.trainable_variables
    ]
    backend = keras.backend.backend()
    if backend == "jax":
        return _jax_optimizer(model, gradients)
    if backend == "tensorflow":
        import tensorflow as tf

        # Closed over: as an argument a variable would become a tensor.
        pairs = list(zip(gradients, model.trainable_variables))
        apply = tf.function(
            lambda: model.optimizer.apply_gradients(pairs),
            jit_compile=model.jit_compile,
        )
        return apply

    def update():
        with no_gradient():
            model.optimizer.apply(gradients, model.trainable_variables)

    return update


def _jax_optimizer(model, gradients):
    import jax

    optimizer = model.optimizer
    update = jax.jit(optimizer.stateless_apply)
    arguments = (
        [variable.value for variable in optimizer.variables],
        gradients,
        [variable.value for variable in model.trainable_variables],
    )
    return lambda: wait(update(*arguments))


def compiled(function, model):
    """A function of tensors as the backend's trainer would run it."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        variables = model.variables

        @jax.jit
        def stateless(values, *tensors):
            with keras.StatelessScope(state_mapping=list(zip(variables, values))):
                return function(*tensors)

        values = [variable.value for variable in variables]
        return lambda *tensors: stateless(values, *tensors)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=model.jit_compile)

    def without_gradient(*tensors):
        with no_gradient():
            return function(*tensors)

    return without_gradient


def _gradient(loss, model, *tensors):
    """A function that computes the gradient of `loss` to all trained variables."""
    backend = keras.backend.backend()
    trained = model.trainable_variables
    if backend == "jax":
        import jax

        def stateless(values):
            with keras.StatelessScope(state_mapping=list(zip(trained, values))):
                return loss(*tensors)

        gradient = jax.jit(jax.grad(stateless))
        values = [variable.value for variable in trained]
        return lambda: wait(gradient(values))
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=model.jit_compile)
        def gradient(*tensors):
            with tf.GradientTape() as tape:
                value = loss(*tensors)
            return tape.gradient(value, [variable.value for variable in trained])

        return lambda: wait(gradient(*tensors))

    def gradient():
        loss(*tensors).backward()
        for variable in trained:
            variable.value.grad = None

    return gradient


def wait(outputs):
    """Returns when every tensor has been computed."""
    leaves = [leaf for leaf in keras.tree.flatten(outputs) if leaf is not None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_gradient())
        if keras.backend.backend() == "jax":
            import jax

            jax.block_until_ready(leaves)
        elif keras.backend.backend() == "tensorflow":
            leaves[-1].numpy()
