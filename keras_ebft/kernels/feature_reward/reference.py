"""The definition of `feature_reward`: the equations of `functional`, put together."""

from keras_ebft import functional
from keras_ebft.functional.inner_products import feature_inner_products, whiten


def feature_reward_reference(
    generated,
    target,
    *,
    whitening="rollout",
    alignment_weight=1.0,
    diversity_weight=1.0,
    estimator="rloo",
    unbiased=False,
):
    """See `keras_ebft.kernels.feature_reward`."""
    weights = {
        "alignment_weight": alignment_weight,
        "diversity_weight": diversity_weight,
    }
    raw = feature_inner_products(generated, target)
    plain = whiten(raw, None)
    products = whiten(raw, whitening)
    found = functional.rewards_from_inner_products(products, **weights)._asdict()
    found["advantage"] = functional.advantages(
        found["alignment"], found["diversity"], estimator=estimator, **weights
    )
    found["feature_matching_loss"] = functional.feature_matching_loss(plain)
    if whitening is not None:
        found["whitened_feature_matching_loss"] = functional.feature_matching_loss(
            products
        )
    if unbiased:
        found["unbiased_feature_matching_loss"] = (
            functional.unbiased_feature_matching_loss(plain)
        )
    return found
