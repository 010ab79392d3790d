"""From a data set's name or a folder to rows that `EBFTModel.fit` takes."""

from keras_ebft.data.byte_pairs import train_byte_pair_tokenizer
from keras_ebft.data.chat_templates import ChatTemplate
from keras_ebft.data.packed_rows import PackedRows
from keras_ebft.data.packing import PackedStream, PackingReport, pack
from keras_ebft.data.records import RecordDocuments, from_records
from keras_ebft.data.sources import PRESETS, Preset, load
from keras_ebft.data.text_files import TextFiles

__all__ = [
    "PRESETS",
    "ChatTemplate",
    "PackedRows",
    "PackedStream",
    "PackingReport",
    "Preset",
    "RecordDocuments",
    "TextFiles",
    "from_records",
    "load",
    "pack",
    "train_byte_pair_tokenizer",
]
