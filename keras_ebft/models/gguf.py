"""Reads a GGUF file: its settings, and its tensors as float32."""

from pathlib import Path

_NO_DEFAULT = object()


class GGUFFile:
    """Settings and tensors of one file.

    Which tensors were read is kept, so that none is left behind unnoticed.

    Args:
        path: file in the GGUF format.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the package `gguf` is not installed.
        ValueError: if the file is in another format.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"Expected a GGUF file. Received: {self.path}, which is no file. "
                "Check the path."
            )
        self._gguf = _library()
        try:
            reader = self._gguf.GGUFReader(self.path)
        except ValueError as error:
            raise ValueError(
                f"Expected a GGUF file. Received: {self.path}; {error}."
            ) from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._unread = set(self._tensors)
        self.architecture = self.setting("general.architecture")

    def setting(self, name, default=_NO_DEFAULT):
        """A value of the file's header.

        Args:
            name: str; `{arch}` in it stands for the file's architecture.
            default: what a file without it gives; by default that is an error.
        """
        if "{arch}" in name:
            name = name.format(arch=self.architecture)
        if name in self._fields:
            return self._fields[name].contents()
        if default is _NO_DEFAULT:
            raise ValueError(
                f"Expected a file with the setting {name!r}. Received: {self.path}, "
                "which has none. Convert the model again with a current llama.cpp."
            )
        return default

    def has(self, name):
        """Whether the file has a tensor of this name."""
        return name in self._tensors

    def shape(self, name):
        """Shape of a tensor, matrices as `(outputs, inputs)`."""
        return tuple(int(size) for size in self._named(name).shape[::-1])

    def tensor(self, name):
        """A tensor, dequantized: float32, matrices as `[outputs, inputs]`."""
        tensor = self._named(name)
        self._unread.discard(name)
        try:
            values = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                "Expected tensors of types that the package gguf reads. Received: "
                f"{name!r} of type {tensor.tensor_type.name} in {self.path}. Use a "
                "file quantized otherwise, such as Q8_0 or Q4_K."
            ) from error
        return values.astype("float32", copy=False)

    def _named(self, name):
        if name not in self._tensors:
            raise ValueError(
                f"Expected a file with the tensor {name!r}. Received: {self.path}, "
                "which has none. Use a file that holds the whole model."
            )
        return self._tensors[name]

    def check_all_read(self):
        """Raises a `ValueError` if the model has parts that nothing asked for."""
        if self._unread:
            raise ValueError(
                f"Expected a {self.architecture} model of the usual parts. Received: "
                f"{self.path} with {len(self._unread)} other tensors, such as "
                f"{min(self._unread)!r}. Such models cannot be read."
            )


def _library():
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "Expected the package gguf, which reads such files. Install it: "
            'pip install "keras_ebft[models]".'
        ) from error
    return gguf
