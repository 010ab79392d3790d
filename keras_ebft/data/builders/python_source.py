"""`tfds` builder `python_source`: the standard library of the running interpreter."""

from typing import ClassVar

import tensorflow_datasets as tfds

from keras_ebft.data.builders import standard_library


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """Every `.py` file of the standard library, split by file.

    Configurations are named after the interpreter, whose files they hold:
    `"3.11.7"` and, without the standard library's own tests,
    `"3.11.7-without_tests"`. Files that break Python's own encoding rules (there
    are a few among its tests) are left out and listed in the metadata.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(
            name=standard_library.version(), description="Every file."
        ),
        tfds.core.BuilderConfig(
            name=f"{standard_library.version()}-without_tests",
            description="Without the standard library's own tests.",
        ),
    ]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python source files of the standard library.",
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            homepage="https://www.python.org",
            license=standard_library.LICENCE,
            metadata=tfds.core.MetadataDict(unreadable_files=[]),
        )

    def _split_generators(self, dl_manager):
        with_tests = not self.builder_config.name.endswith("-without_tests")
        files = dict(standard_library.source_files(with_tests))
        return {
            split: self._generate_examples(files, names)
            for split, names in standard_library.by_split(files).items()
        }

    def _generate_examples(self, files, names):
        for name in names:
            text = standard_library.read_source(files[name])
            if text is None:
                self.info.metadata["unreadable_files"].append(name)
            elif text.strip():
                yield name, {"path": name, "text": text}
