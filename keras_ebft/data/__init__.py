"""From a data set's name or a folder to rows that `EBFTModel.fit` takes.

To add a data source, do:

1. for a set of `tfds` or Hugging Face: add a `Preset` to `PRESETS` in `sources.py`;
2. for a set made on the machine itself: write a `tfds` builder in `builders/` and add
   its name to `CLASSES` there;
3. for anything else: write an iterable of documents that can be read again, which
   `pack` takes as it is;
4. for a source of batches whose order changes: give it `begin_epoch(epoch)`, and let
   the order follow from that number;
5. add a test to `tests/test_sources.py` and its row to `docs/data.md`.
"""

from keras_ebft.data.byte_pairs import train_byte_pair_tokenizer
from keras_ebft.data.chat_templates import ChatTemplate
from keras_ebft.data.packed_rows import PackedRows
from keras_ebft.data.packing import PackedStream, PackingReport, pack
from keras_ebft.data.process_share import ProcessShare
from keras_ebft.data.records import RecordDocuments, from_records
from keras_ebft.data.sources import PRESETS, Preset, load
from keras_ebft.data.tables import from_path
from keras_ebft.data.text_files import TextFiles
from keras_ebft.data.token_boundary import at_token_boundary

__all__ = [
    "PRESETS",
    "ChatTemplate",
    "PackedRows",
    "PackedStream",
    "PackingReport",
    "Preset",
    "ProcessShare",
    "RecordDocuments",
    "TextFiles",
    "at_token_boundary",
    "from_path",
    "from_records",
    "load",
    "pack",
    "train_byte_pair_tokenizer",
]
