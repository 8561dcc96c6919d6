"""Keeps the bytecode of what Python imports from zip files, as Ansible sends its modules: half of a module's time.

`zipimport` compiles each file at every import, twice: for its loader's get_filename and for its get_code. Only test
hosts have this. A user that may not use the directory, which is root's, compiles as ever.
"""

import _imp
import contextlib
import marshal
import os
import zipimport
from types import CodeType

DIRECTORY = "/var/cache/module-bytecode"
compile_source = zipimport._compile_source


def bytecode(path: str, source: bytes) -> CodeType:
    """Return what `zipimport` would compile, from the cache if it is there."""
    file = f"{DIRECTORY}/{_imp.source_hash(0, source).hex()}"
    try:
        with open(file, "rb") as stored:
            code = marshal.load(stored)
    except OSError:
        code = compile_source(path, source)
        aside = f"{file}.{os.getpid()}"
        with contextlib.suppress(OSError):
            with open(aside, "wb") as stored:
                marshal.dump(code, stored)
            os.replace(aside, file)
    _imp._fix_co_filename(code, path)
    return code


zipimport._compile_source = bytecode
