"""Let mmcv 2.1.0 be built by Python 3.13.

    PYTHONPATH=tools/mmcv_on_python313 pip install --no-build-isolation --no-binary mmcv mmcv==2.1.0

Its setup.py reads its version by ``exec(code)`` and ``locals()['__version__']``
in a function. From 3.13 on (PEP 667) such an exec writes into a copy and the
build ends with ``KeyError: '__version__'``. Here it writes into the function's
own variables again, as before.
"""

import builtins
import sys
from typing import Any

_exec = builtins.exec


def _exec_in_caller(code: Any, globals: Any = None, locals: Any = None, /, **kwargs: Any) -> None:
    if globals is None:
        caller = sys._getframe(1)
        globals, locals = caller.f_globals, caller.f_locals
    _exec(code, globals, locals, **kwargs)


if sys.version_info >= (3, 13):
    builtins.exec = _exec_in_caller
