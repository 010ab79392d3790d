"""The one door into KerasHub: networks, output heads, sub-networks.

Block-parallel passes need an attention of their own inside KerasHub's models. What a
family needs for it stands in `families`; `RoutedNetwork` and `RowNetwork` run it, and
nothing else in this library imports `keras_hub.src` or knows a family.
"""

from keras_ebft.networks.causal_lm import (
    check_feature_backbone,
    check_supported,
    end_token_ids,
    maximum_length,
    output_head,
    tokenizer,
    vocabulary_size,
)
from keras_ebft.networks.families import (
    FAMILIES,
    REFUSED,
    OutputHead,
    family_of,
    num_layers,
)
from keras_ebft.networks.from_backbone import (
    copied_variables,
    frozen_taps,
    leading,
    routed_backbone,
)
from keras_ebft.networks.quantization import dtype_policy_name
from keras_ebft.networks.rematerialisation import resolve_rematerialize
from keras_ebft.networks.routed_network import RoutedNetwork
from keras_ebft.networks.row_network import RowNetwork
from keras_ebft.networks.texts import (
    TextDecoder,
    export_tokenizer,
    text_markers,
    to_numpy,
)
from keras_ebft.networks.whole_configs import complete_config

__all__ = [
    "FAMILIES",
    "REFUSED",
    "OutputHead",
    "RoutedNetwork",
    "RowNetwork",
    "TextDecoder",
    "check_feature_backbone",
    "check_supported",
    "complete_config",
    "copied_variables",
    "dtype_policy_name",
    "end_token_ids",
    "export_tokenizer",
    "family_of",
    "frozen_taps",
    "leading",
    "maximum_length",
    "num_layers",
    "output_head",
    "resolve_rematerialize",
    "routed_backbone",
    "text_markers",
    "to_numpy",
    "tokenizer",
    "vocabulary_size",
]
