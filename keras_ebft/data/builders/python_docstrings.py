"""`tfds` builder `python_docstrings`: write a function from its docstring."""

from typing import ClassVar

import tensorflow_datasets as tfds

from keras_ebft.data.builders import standard_library
from keras_ebft.data.builders.functions import documented_functions


class PythonDocstrings(tfds.core.GeneratorBasedBuilder):
    """Documented functions of the standard library, split by file.

    The configuration is named after the interpreter. `prompt` is signature and
    docstring, `body` the rest; `doctests` is the docstring where its examples can
    be run (`keras_ebft.evaluation.Sandbox.check_doctests`), else empty; `module`
    is where the function comes from, whose names its body may use.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=standard_library.version())
    ]

    def _info(self):
        names = ("name", "module", "prompt", "body", "doctests")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Signatures and docstrings with the bodies that follow them.",
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in names}
            ),
            homepage="https://www.python.org",
            license=standard_library.LICENCE,
            metadata=tfds.core.MetadataDict(unreadable_files=[]),
        )

    def _split_generators(self, dl_manager):
        functions = {}
        for path, file in standard_library.source_files(with_tests=False):
            found = self._functions(path, file)
            if found:
                functions[path] = found
        return {
            split: self._generate_examples(functions, paths)
            for split, paths in standard_library.by_split(functions).items()
        }

    def _generate_examples(self, functions, paths):
        for path in paths:
            for number, function in enumerate(functions[path]):
                yield (
                    f"{path}:{number}",
                    {
                        "name": function.name,
                        "module": _module_name(path),
                        "prompt": function.prompt,
                        "body": function.body,
                        "doctests": function.doctests,
                    },
                )

    def _functions(self, path, file):
        source = standard_library.read_source(file)
        try:
            if source is not None:
                return documented_functions(source)
        except SyntaxError:
            pass  # Listed below, like a file that cannot be decoded.
        self.info.metadata["unreadable_files"].append(path)
        return []


def _module_name(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
