"""The one door into KerasHub: networks, output heads, sub-networks.

Block-parallel passes need an attention of their own inside KerasHub's models. How
a family gives way to it is decided here (`families`) and done here (the routes);
nothing else in this library imports `keras_hub.src` or knows a family.
"""

from keras_ebft.bridge.families import FAMILIES, REFUSED, family_of, num_layers
from keras_ebft.bridge.frozen import (
    copied_variables,
    frozen_taps,
    leading,
    routed_backbone,
)
from keras_ebft.bridge.hugging_face import (
    BY_KERAS_HUB,
    export_tokenizer,
    hugging_face_model,
)
from keras_ebft.bridge.models import (
    OutputHead,
    check_feature_backbone,
    check_supported,
    dtype_policy_name,
    end_token_ids,
    marker_token_ids,
    maximum_length,
    output_head,
    tokenizer,
    vocabulary_size,
)
from keras_ebft.bridge.networks import RoutedNetwork, RowNetwork
from keras_ebft.bridge.rematerialisation import resolve_rematerialize
from keras_ebft.bridge.texts import preprocess_texts, to_numpy

__all__ = [
    "BY_KERAS_HUB",
    "FAMILIES",
    "REFUSED",
    "OutputHead",
    "RoutedNetwork",
    "RowNetwork",
    "check_feature_backbone",
    "check_supported",
    "copied_variables",
    "dtype_policy_name",
    "end_token_ids",
    "export_tokenizer",
    "family_of",
    "frozen_taps",
    "hugging_face_model",
    "leading",
    "marker_token_ids",
    "maximum_length",
    "num_layers",
    "output_head",
    "preprocess_texts",
    "resolve_rematerialize",
    "routed_backbone",
    "to_numpy",
    "tokenizer",
    "vocabulary_size",
]
