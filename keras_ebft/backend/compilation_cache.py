"""Compiled programs that outlive their process."""

from keras_ebft.backend.runtime import backend_name


def keep_compiled_programs(folder: str) -> bool:
    """Looks programs up in a folder, and writes new ones to it.

    Args:
        folder: str, an existing folder.

    Returns:
        bool, whether the backend compiles programs that can be kept.
    """
    if backend_name() != "jax":
        return False
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", folder)
    # A step is a few large programs and many small ones, which add up to seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Whether there is a cache was decided when something was first compiled.
    compilation_cache.reset_cache()
    return True
