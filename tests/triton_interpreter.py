"""Triton's interpreter, in less time: its own preparations are half of it where kernels are made of many small functions."""

from __future__ import annotations

import inspect
from typing import Any


def prepare_once() -> None:
    """Have the interpreter put its own functions in the place of Triton's once a launch, not at every call of a function.

    Each function sees `triton.language` or its core, of which what was replaced stays replaced until the launch is over.
    """
    from triton import language
    from triton.runtime import interpreter

    launch, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    prepared: set[bool] = set()

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **kwargs)

    def prepare_the_first_time(fn: Any) -> Any:
        sees_core = any(inspect.ismodule(value) and value is language.core for value in fn.__globals__.values())
        if sees_core in prepared:
            return interpreter._LangPatchScope()
        prepared.add(sees_core)
        return prepare(fn)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = prepare_the_first_time
