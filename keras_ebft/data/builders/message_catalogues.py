"""`tfds` builder `message_catalogues`: translated messages of installed programs."""

import dataclasses
import re
import zlib
from typing import ClassVar

import tensorflow_datasets as tfds

from keras_ebft.data.builders import catalogue_files, standard_library

SOURCE_LANGUAGE = "en"  # of the messages in programs themselves
COMMON = ("de", "es", "fr", "it", "ja", "pl", "pt_BR", "ru", "sv", "uk", "zh_CN")
LETTER = re.compile(r"[^\W\d_]")


@dataclasses.dataclass
class LanguagePair(tfds.core.BuilderConfig):
    """Two languages, named as their folders are.

    Attributes:
        name: str, made from the other attributes unless given.
        source: str such as `"en"`, which is what programs are written in.
        target: str such as `"pt_BR"`.
        folders: tuple of folders with catalogues, by default the system's.
    """

    name: str = ""
    source: str = SOURCE_LANGUAGE
    target: str = "de"
    folders: tuple = ()

    def __post_init__(self):
        if self.target in (SOURCE_LANGUAGE, self.source):
            raise ValueError(
                "Expected two languages, the second not English. Received: "
                f"source={self.source!r}, target={self.target!r}. Swap the columns "
                "`source` and `target` for translation into English."
            )
        if not self.name:
            self.name = f"{self.source}-{self.target}"
            if self.folders:
                # Data from other folders is other data.
                places = "\n".join(map(str, self.folders)).encode()
                self.name += f"-{zlib.crc32(places):08x}"

    @classmethod
    def from_name(cls, name):
        """The pair called `"de-fr"`.

        Raises:
            ValueError: if the name is not of that form.
        """
        source, separator, target = name.partition("-")
        if not (source and separator and target):
            raise ValueError(
                f'Expected a pair of languages such as "en-de". Received: {name!r}.'
            )
        return cls(source=source, target=target)


class MessageCatalogues(tfds.core.GeneratorBasedBuilder):
    """Pairs of source and translation from the system's `.mo` catalogues.

    Any pair of installed languages can be a configuration:
    `MessageCatalogues(config=LanguagePair(source="de", target="fr"))`. The split
    depends on the source text, so that no text is in two of them; of several
    translations the first is taken, and texts without letters or left as they were
    are left out.
    What is found depends on the system and stays as it was when first prepared.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar = {
        "1.1.0": "Messages with a context; LibreOffice's catalogues.",
        "1.0.0": "First version.",
    }
    BUILDER_CONFIGS: ClassVar = [LanguagePair(target=target) for target in COMMON]

    def _info(self):
        names = ("source", "target", "domain")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Messages of programs and their translations.",
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in names}
            ),
            license="Those of the programs, see /usr/share/doc/<package>/copyright.",
            metadata=tfds.core.MetadataDict(unreadable_files=[]),
        )

    def _split_generators(self, dl_manager):
        pairs = self._pairs()
        return {
            split: self._generate_examples(pairs, sources)
            for split, sources in standard_library.by_split(pairs).items()
        }

    def _generate_examples(self, pairs, sources):
        for source in sources:
            target, domain = pairs[source]
            yield source, {"source": source, "target": target, "domain": domain}

    def _pairs(self):
        """A dict from source to `(target, domain)`."""
        config = self.builder_config
        folders = config.folders or catalogue_files.default_folders()
        _check_installed((config.source, config.target), folders)
        originals = dict(catalogue_files.catalogues(folders, config.source))
        pairs = {}
        for domain, path in catalogue_files.catalogues(folders, config.target):
            targets = self._read(path)
            if config.source == SOURCE_LANGUAGE:
                sources = {message: message for message in targets}
            elif domain in originals:
                sources = self._read(originals[domain])
            else:
                continue
            for message, target in targets.items():
                source = sources.get(message, "")
                if source != target and LETTER.search(source):
                    pairs.setdefault(source, (target, domain))
        if not pairs:
            raise ValueError(
                f"Expected messages in both {config.source!r} and {config.target!r}. "
                "Received: catalogues without a common one. Pick another pair."
            )
        return pairs

    def _read(self, path):
        try:
            return catalogue_files.read_catalogue(path)
        except ValueError:
            self.info.metadata["unreadable_files"].append(str(path))
            return {}


def _check_installed(languages, folders):
    found = catalogue_files.installed_languages(folders)
    missing = set(languages) - {SOURCE_LANGUAGE, *found}
    if missing:
        raise FileNotFoundError(
            f"Expected message catalogues for {sorted(missing)} in "
            f"{list(map(str, folders))}. Received: languages {found}. Install programs "
            "with translations (on Debian, desktop programs bring many), or pick one "
            "of those."
        )
