"""The text files of a folder as documents."""

from collections.abc import Iterator
from pathlib import Path

from keras_ebft.configurable import Shown
from keras_ebft.validation import check_choice

NOT_UTF8 = ("skip", "raise")


class TextFiles(Shown):
    """Every matching file of a folder, read when it is asked for.

    Args:
        folder: path.
        pattern: str, which files below the folder, as for `pathlib.Path.rglob`.
        not_utf8: `"skip"` leaves files out that are not UTF-8 and lists them in
            `skipped`; `"raise"` stops at the first.

    Attributes:
        folder, pattern: as given.
        paths: sorted list of `pathlib.Path`.
        skipped: list of `pathlib.Path`, files left out by the newest pass.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if no file matches or `not_utf8` is unknown.

    Example:
    ```python
    texts = keras_ebft.data.TextFiles("my_project", "*.py")
    rows = keras_ebft.data.pack(texts, tokenizer, length=1024).load()
    ```
    """

    def __init__(
        self, folder: str | Path, pattern: str = "*.txt", not_utf8: str = "skip"
    ) -> None:
        self.folder = folder = Path(folder)
        self.pattern = pattern
        self.not_utf8 = check_choice("not_utf8", not_utf8, NOT_UTF8)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"Expected an existing folder. Received: {str(folder)!r}. Check the "
                "path."
            )
        self.paths = sorted(path for path in folder.rglob(pattern) if path.is_file())
        self.skipped: list[Path] = []
        if not self.paths:
            raise ValueError(
                f"Expected files matching {pattern!r} in {str(folder)!r}. Received: "
                "none. Check the folder and the pattern."
            )

    def __iter__(self) -> Iterator[str]:
        self.skipped = []
        for path in self.paths:
            try:
                yield path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                if self.not_utf8 == "raise":
                    raise ValueError(
                        f"Expected files in UTF-8. Received: {str(path)!r}, {error}. "
                        'Convert it, or pass not_utf8="skip".'
                    ) from error
                self.skipped.append(path)
