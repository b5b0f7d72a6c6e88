"""Loads the compiled module, or says in one sentence what to do."""

import torch  # first: _C needs torch's shared libraries

_REBUILD = "run `pip install --no-build-isolation --force-reinstall --no-deps .` in its source tree"

try:
    from seqmem_fast import _C
except ImportError as error:
    if "undefined symbol" in str(error) or "symbol not found" in str(error).lower():
        reason = f"was built for another torch than the installed {torch.__version__}"
    elif "cannot import name" in str(error):
        reason = "is not built for this Python"
    else:
        reason = f"cannot be loaded ({error})"
    raise ImportError(f"seqmem_fast: the compiled module {reason}: {_REBUILD}") from None


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


_built = _C.build_info()["torch"]
if _release(_built) != _release(torch.__version__):
    raise ImportError(
        f"seqmem_fast: the compiled module was built for torch {_built}, and torch "
        f"{torch.__version__} is installed: {_REBUILD}"
    )
