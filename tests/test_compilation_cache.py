"""Compiled programs are kept where the next process finds them."""

import keras
import numpy as np
import pytest

import keras_ebft

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def programs():
    """Programs that were read and written, `[hits, misses]`."""
    if keras.backend.backend() != "jax":
        pytest.skip("only JAX has programs that can be kept")
    import jax
    from jax import monitoring
    from jax.experimental.compilation_cache import compilation_cache

    counts = {"cache_hits": 0, "cache_misses": 0}

    def count(event, **_):
        name = event.rsplit("/", 1)[-1]
        if name in counts:
            counts[name] += 1

    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monitoring.register_event_listener(count)
    yield counts
    monitoring.unregister_event_listener(count)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compute():
    import jax

    # Another function every time, as another process would have it.
    return jax.jit(lambda x: jax.numpy.tanh(x @ x) + 17)(np.eye(3, dtype="float32"))


def test_what_was_compiled_is_found_again(programs, tmp_path):
    compute()
    folder = tmp_path / "new" / "folder"
    assert keras_ebft.use_compilation_cache(folder) == folder
    first = compute()
    assert programs["cache_hits"] == 0
    assert programs["cache_misses"] > 0
    assert any(folder.iterdir())
    second = compute()
    assert programs["cache_hits"] == programs["cache_misses"]
    np.testing.assert_array_equal(first, second)


def test_by_default_in_the_users_cache_folder(programs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = keras_ebft.use_compilation_cache()
    assert folder == tmp_path / "keras_ebft" / "compiled"
    assert folder.is_dir()


def test_other_backends_have_nothing_to_keep(tmp_path):
    if keras.backend.backend() == "jax":
        pytest.skip("JAX has")
    assert keras_ebft.use_compilation_cache(tmp_path) is None
    assert not any(tmp_path.iterdir())


@pytest.mark.backend_independent
def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        keras_ebft.use_compilation_cache(tmp_path / "file")
    with pytest.raises(TypeError, match="path or None"):
        keras_ebft.use_compilation_cache(3)
